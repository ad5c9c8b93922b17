"""The inventories against diffusers' modules and against the full-size listing of LTX-2.3."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from materialize import tiny_source
from materialize.modules import module_shapes, needs_spec, spec

from ltxpack.files.tensorfile import read_tensorfile
from ltxpack.ltx23.configs import checkpoint_configs, upsampler_config
from ltxpack.ltx23.expected import inventory, source_inventory
from ltxpack.ltx23.renames import CHECKPOINT_TABLES, LATENT_UPSAMPLER
from ltxpack.materialize.checkpoint import read_checkpoint, read_upsampler


@pytest.fixture(scope="module")
def full_size() -> tuple[dict[str, Any], dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Configs of the real model, and the names and shapes of its checkpoint and of its upsampler."""
    config, shapes, upsampler = spec()
    configs = checkpoint_configs(config["config"], shapes, "spec")
    configs["latent_upsampler"] = upsampler_config(config["upsampler_config_x2"], 128, "spec")
    return configs, shapes, upsampler


@needs_spec
def test_full_size_checkpoint_is_exactly_what_the_configs_ask_for(full_size) -> None:
    configs, shapes, upsampler = full_size
    expected: dict[str, tuple[int, ...]] = {}
    for component in CHECKPOINT_TABLES:
        expected.update(source_inventory(component, configs[component]))
    assert len(shapes) == 5947
    assert expected == shapes
    assert len(upsampler) == 72
    assert source_inventory("latent_upsampler", configs["latent_upsampler"]) == upsampler


@needs_spec
def test_full_size_parameter_counts_are_the_published_ones(full_size) -> None:
    configs, _, _ = full_size
    counts = {name: sum(map(math.prod, inventory(name, configs[name]).values())) for name in CHECKPOINT_TABLES}
    assert round(counts["transformer"] / 1e9, 3) == 18.989
    assert round(counts["connectors"] / 1e9, 3) == round(2.016 + 1.156, 3)
    assert [round(counts[name] / 1e9, 3) for name in ("vae", "audio_vae", "vocoder")] == [0.726, 0.053, 0.129]


@needs_spec
@pytest.mark.parametrize("component", [*CHECKPOINT_TABLES, "latent_upsampler"])
def test_full_size_inventory_is_the_modules_state_dict(full_size, component: str) -> None:
    config = full_size[0][component]
    assert inventory(component, config) == module_shapes(component, config)


def test_golden_files_match_the_modules(golden: Path) -> None:
    (path,) = golden.glob("*-dev.safetensors")
    checkpoint = read_checkpoint(read_tensorfile(path), path)
    for component, config in checkpoint.configs.items():
        found = {target: info.shape for target, info in checkpoint.tensors[component].items()}
        assert found == inventory(component, config) == module_shapes(component, config)
    (path,) = golden.glob("*spatial-upscaler-x2*.safetensors")
    upsampler = read_upsampler(read_tensorfile(path), checkpoint.configs["vae"]["latent_channels"], path)
    assert upsampler.as_is
    found = {target: info.shape for target, info in upsampler.tensors.items()}
    assert found == module_shapes("latent_upsampler", upsampler.config)
    assert all(LATENT_UPSAMPLER.rename(name) == name for name in found)


_few = st.integers(1, 3)


@st.composite
def _configs(draw: st.DrawFn) -> dict[str, Any]:
    """Checkpoint configs of other depths, widths and counts than any we have."""
    config = copy.deepcopy(tiny_source.CONFIG)
    transformer = config["transformer"]
    heads = draw(st.sampled_from([1, 2, 4]))
    transformer.update(num_layers=draw(_few), num_attention_heads=heads, audio_num_attention_heads=heads)
    for prefix in ("", "audio_"):
        width = heads * draw(st.sampled_from([6, 12, 24]))
        transformer.update({f"{prefix}attention_head_dim": width // heads, f"{prefix}cross_attention_dim": width})
        connector = {"num_attention_heads": 1, "attention_head_dim": width}
        transformer.update({f"{prefix}connector_{name}": value for name, value in connector.items()})
    transformer.update(connector_num_layers=draw(_few), audio_connector_num_layers=draw(_few))
    for side in ("encoder", "decoder"):
        for block in config["vae"][f"{side}_blocks"][::2]:
            block[1]["num_layers"] = draw(st.integers(0, 2))
    ddconfig = config["audio_vae"]["model"]["params"]["ddconfig"]
    ddconfig.update(ch_mult=draw(st.lists(_few, min_size=3, max_size=3)), num_res_blocks=draw(_few))
    config["vocoder"]["vocoder"].update(upsample_initial_channel=draw(st.sampled_from([8, 16, 32])))
    config["vocoder"]["bwe"].update(use_bias_at_final=draw(st.booleans()))
    return config


@settings(max_examples=6, deadline=None)
@given(_configs())
def test_inventories_of_other_sizes_match_the_modules(config: dict[str, Any]) -> None:
    shapes = tiny_source.tensor_shapes(config)
    for component, found in checkpoint_configs(config, shapes, "drawn").items():
        assert inventory(component, found) == module_shapes(component, found), component
