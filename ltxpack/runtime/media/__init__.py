"""Files seen and heard: pictures in, one video with sound out. Knows no latents (spec 04, section 4; 06, section 7)."""
