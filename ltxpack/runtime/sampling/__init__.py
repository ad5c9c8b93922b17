"""From noise to latents: shapes, conditioning, schedules, guidance, samplers."""
