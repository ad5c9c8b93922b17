"""What is computed from noise to latents: shapes, conditioning, schedules, guidance, samplers."""
