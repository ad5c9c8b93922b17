"""Media files: reads pictures, writes one video with sound. Knows no latents (spec 04, section 4; 06, section 7)."""
