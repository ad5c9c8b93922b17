"""Key renames, official name -> diffusers name: one table per component (spec 01, section 4). Change a rename here.

A table says which key roots of the checkpoint belong to the component and which paths inside them change their name.
Everything else keeps its name. The result is checked against the module's own parameter names (expected.py). The
reverse table is derived, never written down.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RenameTable:
    """Renames of one component.

    ``roots`` maps a key prefix in the source to the prefix in the target (both end in ``.`` or are empty).
    ``paths`` maps a run of whole path components to another; the longest run that matches at a position wins.
    """

    roots: Mapping[str, str]
    paths: Mapping[str, str]

    def source_root(self, key: str) -> str | None:
        """The root that ``key`` starts with, or None if it is not this component's."""
        return max((root for root in self.roots if key.startswith(root)), key=len, default=None)

    def rename(self, key: str) -> str:
        """The target name of ``key``. Raises KeyError if it starts with no root."""
        root = self.source_root(key)
        if root is None:
            raise KeyError(key)
        return self.roots[root] + self._runs.sub(lambda found: self.paths[found[0]], key[len(root) :])

    def reverse(self) -> RenameTable:
        """The table that undoes this one."""
        return RenameTable(
            {target: source for source, target in self.roots.items()},
            {target: source for source, target in self.paths.items()},
        )

    @functools.cached_property
    def _runs(self) -> re.Pattern[str]:
        """Matches any of ``paths``, between dots or ends, and the longer one of two that begin together."""
        runs = sorted(map(re.escape, self.paths), key=len, reverse=True)
        return re.compile(rf"(?<![^.])(?:{'|'.join(runs)})(?![^.])" if runs else r"(?!)")


_ATTENTION_NORMS = {"q_norm": "norm_q", "k_norm": "norm_k"}
_STATISTICS = {
    "per_channel_statistics.mean-of-means": "latents_mean",
    "per_channel_statistics.std-of-means": "latents_std",
}

TRANSFORMER = RenameTable(
    roots={"model.diffusion_model.": ""},
    paths={
        "patchify_proj": "proj_in",
        "audio_patchify_proj": "audio_proj_in",
        "adaln_single": "time_embed",
        "audio_adaln_single": "audio_time_embed",
        "prompt_adaln_single": "prompt_adaln",
        "audio_prompt_adaln_single": "audio_prompt_adaln",
        "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
        "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
        "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
        "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
        "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
        "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
        **_ATTENTION_NORMS,
    },
)

CONNECTORS = RenameTable(
    roots={
        "model.diffusion_model.video_embeddings_connector.": "video_connector.",
        "model.diffusion_model.audio_embeddings_connector.": "audio_connector.",
        "text_embedding_projection.video_aggregate_embed.": "video_text_proj_in.",
        "text_embedding_projection.audio_aggregate_embed.": "audio_text_proj_in.",
    },
    paths={"transformer_1d_blocks": "transformer_blocks", **_ATTENTION_NORMS},
)

VAE = RenameTable(
    roots={"vae.": ""},
    paths={
        **{f"encoder.down_blocks.{2 * i}": f"encoder.down_blocks.{i}" for i in range(4)},
        **{f"encoder.down_blocks.{2 * i + 1}": f"encoder.down_blocks.{i}.downsamplers.0" for i in range(4)},
        "encoder.down_blocks.8": "encoder.mid_block",
        "decoder.up_blocks.0": "decoder.mid_block",
        **{f"decoder.up_blocks.{2 * i + 1}": f"decoder.up_blocks.{i}.upsamplers.0" for i in range(4)},
        **{f"decoder.up_blocks.{2 * i + 2}": f"decoder.up_blocks.{i}" for i in range(4)},
        "res_blocks": "resnets",
        **_STATISTICS,
    },
)

AUDIO_VAE = RenameTable(roots={"audio_vae.": ""}, paths=_STATISTICS)

VOCODER = RenameTable(
    roots={"vocoder.": ""},
    paths={
        "ups": "upsamplers",
        "resblocks": "resnets",
        "conv_pre": "conv_in",
        "conv_post": "conv_out",
        "act_post": "act_out",
        "downsample.lowpass": "downsample",
    },
)

LATENT_UPSAMPLER = RenameTable(roots={"": ""}, paths={})

CHECKPOINT_TABLES = {
    "transformer": TRANSFORMER,
    "connectors": CONNECTORS,
    "vae": VAE,
    "audio_vae": AUDIO_VAE,
    "vocoder": VOCODER,
}

# Start of the keys of statistics in earlier files, which no module reads: left out on purpose.
DROPPED = tuple(
    f"{vae}.per_channel_statistics.{name}" for vae in ("vae", "audio_vae") for name in ("channel", "mean-of-stds")
)


_ROOTS = {root: component for component, table in CHECKPOINT_TABLES.items() for root in table.roots}
_LONGEST_FIRST = sorted(_ROOTS, key=len, reverse=True)


def component_of(key: str) -> str | None:
    """The component with the longest root that ``key`` starts with, or None for an unknown key."""
    return next((_ROOTS[root] for root in _LONGEST_FIRST if key.startswith(root)), None)
