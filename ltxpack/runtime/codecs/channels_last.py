"""The video VAE's convolution with the channels innermost.

Imports diffusers, which takes seconds: whoever needs this module imports it when a VAE is there.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import LTX2VideoCausalConv3d
from torch import Tensor


class ChannelsLastConv(LTX2VideoCausalConv3d):  # type: ignore[misc]  # diffusers is untyped
    """A convolution that pads into channels-last memory: its input may be in planes, which the convolution would copy
    once more.
    """

    def forward(self, hidden_states: Tensor, causal: bool = True) -> Tensor:
        """Pad with copies of the first frame; without ``causal`` with half as many, and with copies of the last one."""
        missing = self.kernel_size[0] - 1
        before, after = (missing, 0) if causal else (missing // 2, missing // 2)
        batch, channels, frames, height, width = hidden_states.shape
        padded = torch.empty(
            (batch, channels, before + frames + after, height, width),
            dtype=hidden_states.dtype,
            device=hidden_states.device,
            memory_format=torch.channels_last_3d,
        )
        padded[:, :, :before] = hidden_states[:, :, :1]
        padded[:, :, before : before + frames] = hidden_states
        padded[:, :, before + frames :] = hidden_states[:, :, -1:]
        return self.conv(padded)
