"""Several devices for one video: one process a device, the same latents as one device makes."""
