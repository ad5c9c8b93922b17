"""The audio-video transformer, in its own code (spec 06). The model needs torch alone; only loading it needs more."""
