"""Whatever a user or a broken disk brings: one clear message, no traceback, nothing left that looks whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import ltxpack, refused

from ltxpack.demo.config import checkpoint_config

RUN = ("--prompt", "x", "--device", "cpu", "--height", "64", "--width", "64", "--num-frames", "9", "--steps", "2")


@pytest.fixture
def source(demo: Path, tmp_path: Path) -> Path:
    """A copy of the demo's source files that may be damaged."""
    return Path(shutil.copytree(demo / "source", tmp_path / "source"))


def checkpoint(source: Path) -> Path:
    return next(source.glob("*-dev.safetensors"))


def edit(path: Path, renamed: Mapping[str, str] = MappingProxyType({}), **metadata: str) -> None:
    """Write ``path`` again with tensors of other names, and other metadata."""
    with safe_open(path, framework="pt") as file:
        kept = file.metadata()
    tensors = {renamed.get(name, name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={**kept, **metadata})


def refuses_source(source: Path, tmp_path: Path, status: int = 1) -> str:
    message = refused(ltxpack("materialize", source, tmp_path / "out"), status)
    assert not (tmp_path / "out").exists()
    assert "next: " in message
    return message


def test_a_truncated_checkpoint(source: Path, tmp_path: Path) -> None:
    path = checkpoint(source)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)
    message = refuses_source(source, tmp_path)
    assert path.name in message and "1000" in message


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(100), b"<html>not found</html>", b"\xff" * 64])
def test_a_checkpoint_that_is_no_safetensors_file(content: bytes, source: Path, tmp_path: Path) -> None:
    checkpoint(source).write_bytes(content)
    assert checkpoint(source).name in refuses_source(source, tmp_path)


def test_a_missing_tensor_and_an_unknown_one_are_named_together(source: Path, tmp_path: Path) -> None:
    name = "model.diffusion_model.transformer_blocks.0.attn{}.to_q.weight"
    edit(checkpoint(source), {name.format(1): name.format(3)})
    message = refuses_source(source, tmp_path)
    assert "attn1.to_q.weight" in message and "attn3.to_q.weight" in message


@pytest.mark.parametrize("version", ["2.0.0", "2.5.1", "not a version"])
def test_another_generation(version: str, source: Path, tmp_path: Path) -> None:
    edit(checkpoint(source), model_version=version)
    assert version in refuses_source(source, tmp_path)


def test_a_config_field_that_changes_the_maths(source: Path, tmp_path: Path) -> None:
    changed = checkpoint_config()
    changed["transformer"].update(rope_type="interleaved", new_norm="layer")
    edit(checkpoint(source), config=json.dumps(changed))
    message = refuses_source(source, tmp_path)
    assert "rope_type" in message and "new_norm" in message


def test_nothing_that_fits_and_too_much_that_fits(source: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoint(source), source / "another-dev.safetensors")
    assert "another-dev.safetensors" in refuses_source(source, tmp_path)
    for path in source.glob("*dev*"):
        path.unlink()
    assert "dev" in refuses_source(source, tmp_path)


@pytest.mark.parametrize("flags", [[], ["--force"], ["--plan"]])
def test_a_target_that_is_not_ours_is_left_alone(flags: list[str], demo: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert "not an overlay" in refused(ltxpack("materialize", demo / "source", tmp_path, *flags), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_lora_for_another_model(overlay: Path, tmp_path: Path) -> None:
    before = (overlay / "ltxpack.json").read_bytes()
    other = tmp_path / "sdxl.safetensors"
    names = ["lora_unet_down_blocks_1_attentions_0_proj_in", "lora_te1_text_model_encoder_layers_0_mlp_fc1"]
    save_file({f"{name}.{part}.weight": torch.ones(4, 4) for name in names for part in ("lora_down", "lora_up")}, other)
    message = refused(ltxpack("bake-lora", overlay, "--lora", other, "--strength", "1"), 1)
    assert "sdxl.safetensors" in message
    assert (overlay / "ltxpack.json").read_bytes() == before
    assert not (overlay / "bakes" / "sdxl-1").exists()


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        (("--lora", "nowhere.safetensors", "--strength", "1"), 1),
        (("--strength", "0.5", "--add", "x.safetensors=inf"), 2),
        (("--strength", "0.5", "--add", "x.safetensors"), 2),
    ],
)
def test_a_missing_lora_and_an_addition_without_strength(flags: tuple[str, ...], status: int, demo: Path) -> None:
    refused(ltxpack("bake-lora", demo / "overlay", *flags), status)


def test_an_overlay_without_the_needed_bake(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert ltxpack("materialize", demo / "source", out).returncode == 0
    message = refused(ltxpack("run", out, *RUN, "-o", tmp_path / "v.mp4"), 1)
    assert "ltxpack bake-lora" in message
    refused(ltxpack("run", out, *RUN, "--stage2", "mine", "-o", tmp_path / "v.mp4"), 2)
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize(
    "victim",
    [
        "transformer/config.json",
        "bakes/distilled-0.25/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "tokenizer/tokenizer.json",
        "text_encoder/model.safetensors",
    ],
)
@pytest.mark.parametrize("damage", ["byte", "truncated", "gone"])
def test_an_overlay_changed_since_it_was_written(victim: str, damage: str, overlay: Path, tmp_path: Path) -> None:
    path = overlay / victim
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "byte":
        content[-3] ^= 1
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    checked = ltxpack("verify", overlay)
    assert checked.returncode == 1
    assert victim in checked.stdout
    if victim != "transformer/config.json":  # the run uses the bakes, not the base
        video = tmp_path / "video.mp4"
        message = refused(ltxpack("run", overlay, *RUN, "-o", video, "--save-tensors", tmp_path / "t.safetensors"), 1)
        assert victim in message and "ltxpack verify" in message
        assert sorted(path.name for path in tmp_path.iterdir()) == ["overlay"]


def test_cuda_asked_for_and_not_there(overlay: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    message = refused(ltxpack("run", overlay, *RUN, "--device", "cuda", "-o", tmp_path / "v.mp4"), 1)
    assert "CUDA" in message and "--device cpu" in message


def test_an_image_that_is_none(overlay: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"not a picture")
    message = refused(ltxpack("run", overlay, *RUN, "--image", tmp_path / "a.png", "-o", tmp_path / "v.mp4"), 1)
    assert "a.png" in message
    assert not (tmp_path / "v.mp4").exists()


def test_a_host_too_small_is_refused_before_loading(
    overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ltxpack.runtime.weights.machine.free_host", lambda: 600_000_000)
    message = refused(ltxpack("run", overlay, *RUN, "-o", tmp_path / "v.mp4"), 1)
    assert "GB" in message and "cpu" in message


def test_an_interrupt_leaves_the_older_video(overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = tmp_path / "v.mp4"
    video.write_bytes(b"older")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ltxpack.runtime.codecs.video.decode_video", interrupted)
    assert ltxpack("run", overlay, *RUN, "-o", video).returncode == 130
    assert video.read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["overlay", "v.mp4"]
