"""Between latents and pictures or sound: video VAE, audio VAE with vocoder, latent upsampler.

The networks are diffusers' modules; the tiling, the latent statistics and the dtypes are ours (spec 06, sections 5 and
6; spec 05, section 6). Knows no file format of pictures, video or sound. ``tiles`` needs no torch.
"""
