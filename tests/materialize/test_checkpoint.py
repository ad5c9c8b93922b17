"""Matching a checkpoint's tensors to what its config asks for, from the header alone."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from materialize import tiny_source

from ltxpack.errors import UnsupportedError
from ltxpack.files.tensorfile import build_header, parse_header
from ltxpack.ltx23.expected import inventory
from ltxpack.ltx23.renames import CHECKPOINT_TABLES, component_of
from ltxpack.materialize.checkpoint import Checkpoint, read_checkpoint

Shapes = dict[str, tuple[int, ...]]
SHAPES = tiny_source.tensor_shapes(tiny_source.CONFIG)
NAMES = sorted(SHAPES)


def read(shapes: Shapes, order: list[str] | None = None) -> Checkpoint:
    metadata = {"config": json.dumps(tiny_source.CONFIG), "model_version": "2.3.0"}
    header = build_header(((name, "BF16", shapes[name]) for name in order or sorted(shapes)), metadata)
    size = len(header) + sum(2 * math.prod(shape) for shape in shapes.values())
    return read_checkpoint(parse_header(header, size, "base.safetensors"), "base.safetensors")


def test_every_tensor_has_one_target_in_one_component() -> None:
    found = read(SHAPES)
    assert sum(len(tensors) for tensors in found.tensors.values()) == len(SHAPES)
    for component, tensors in found.tensors.items():
        assert tensors.keys() == inventory(component, found.configs[component]).keys()


@given(st.randoms())
@settings(max_examples=3, deadline=None)
def test_the_files_order_does_not_matter(random) -> None:
    shuffled = random.sample(NAMES, len(NAMES))
    targets = {name: list(tensors) for name, tensors in read(SHAPES, shuffled).tensors.items()}
    assert targets == {name: list(tensors) for name, tensors in read(SHAPES).tensors.items()}


# What the configs need is found by name before tensors are matched; losing it is another error.
ANCHORS = ("learnable_registers", "aggregate_embed.weight")


@given(st.sampled_from(NAMES), st.text("abcdefgh_0123456789", min_size=1, max_size=8))
@settings(max_examples=12, deadline=None)
def test_a_missing_a_misshapen_and_an_unknown_tensor_are_named(name: str, part: str) -> None:
    unknown = f"{name}.{part}"
    with pytest.raises(UnsupportedError) as caught:
        read({**SHAPES, unknown: (1,)})
    assert caught.value.items == (f"unknown: {unknown}",)
    with pytest.raises(UnsupportedError) as caught:
        read({**SHAPES, name: (*SHAPES[name], 2)})
    assert name in str(caught.value)
    if not name.endswith(ANCHORS):
        with pytest.raises(UnsupportedError) as caught:
            read({other: shape for other, shape in SHAPES.items() if other != name})
        assert caught.value.items == (f"missing: {name} {list(SHAPES[name])}",)


def test_tables_are_injective_and_reversible() -> None:
    for component, table in CHECKPOINT_TABLES.items():
        assert len(set(table.paths.values())) == len(table.paths)
        assert len(set(table.roots.values())) == len(table.roots)
        for name in NAMES:
            if component_of(name) == component:
                assert table.reverse().rename(table.rename(name)) == name


DIT, BLOCKS = "model.diffusion_model.", "model.diffusion_model.transformer_blocks."
RENAMES = {
    f"{DIT}adaln_single.linear.weight": "time_embed.linear.weight",
    f"{DIT}prompt_adaln_single.linear.bias": "prompt_adaln.linear.bias",
    f"{DIT}av_ca_a2v_gate_adaln_single.linear.bias": "av_cross_attn_video_a2v_gate.linear.bias",
    f"{DIT}scale_shift_table": "scale_shift_table",
    f"{BLOCKS}0.scale_shift_table_a2v_ca_audio": "transformer_blocks.0.audio_a2v_cross_attn_scale_shift_table",
    f"{BLOCKS}1.attn2.q_norm.weight": "transformer_blocks.1.attn2.norm_q.weight",
    f"{DIT}video_embeddings_connector.transformer_1d_blocks.0.attn1.k_norm.weight":
        "video_connector.transformer_blocks.0.attn1.norm_k.weight",
    "vae.encoder.down_blocks.8.res_blocks.0.conv1.conv.bias": "encoder.mid_block.resnets.0.conv1.conv.bias",
    "vae.encoder.down_blocks.3.conv.conv.bias": "encoder.down_blocks.1.downsamplers.0.conv.conv.bias",
    "vae.decoder.up_blocks.0.res_blocks.0.conv1.conv.bias": "decoder.mid_block.resnets.0.conv1.conv.bias",
    "vae.decoder.up_blocks.2.res_blocks.1.conv2.conv.bias": "decoder.up_blocks.0.resnets.1.conv2.conv.bias",
    "vae.per_channel_statistics.std-of-means": "latents_std",
    "vocoder.vocoder.ups.0.weight": "vocoder.upsamplers.0.weight",
    "vocoder.vocoder.resblocks.3.acts1.0.downsample.lowpass.filter": "vocoder.resnets.3.acts1.0.downsample.filter",
    "vocoder.vocoder.resblocks.3.acts1.0.upsample.filter": "vocoder.resnets.3.acts1.0.upsample.filter",
    "vocoder.mel_stft.mel_basis": "mel_stft.mel_basis",
}  # fmt: skip


@pytest.mark.parametrize(("official", "target"), RENAMES.items())
def test_renames_of_the_spec(official: str, target: str) -> None:
    component = component_of(official)
    assert component is not None
    table = CHECKPOINT_TABLES[component]
    assert table.rename(official) == target
    assert table.reverse().rename(target) == official
