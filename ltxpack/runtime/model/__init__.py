"""The audio-video transformer, in its own code (spec 06)."""
