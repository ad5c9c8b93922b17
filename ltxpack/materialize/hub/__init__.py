"""The hub: listing, resumable downloads, and sentences for what can go wrong."""
