"""Whatever a user or a broken disk brings: one clear message, no traceback, nothing left that looks whole."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from support import ltxpack, refused

pytestmark = pytest.mark.usefixtures("short_prompts")

SIZE = ("--height", "64", "--width", "64", "--num-frames", "9", "--steps", "2")
RUN = ("--prompt", "x", "--device", "cpu", "--dtype", "float32", *SIZE)


def test_a_missing_lora_and_an_addition_without_strength(demo: Path) -> None:
    refused(ltxpack("bake-lora", demo / "overlay", "--lora", "nowhere.safetensors", "--strength", "1"), 1)
    for added in ("x.safetensors=inf", "x.safetensors"):
        refused(ltxpack("bake-lora", demo / "overlay", "--strength", "0.5", "--add", added), 2)


def test_the_folder_of_a_user_that_is_not_there(demo: Path, tmp_path: Path) -> None:
    nowhere = "~nobody-called-so/x.safetensors"
    for command in (
        ("inspect", nowhere),
        ("materialize", nowhere, tmp_path / "out"),
        ("materialize", demo / "source", tmp_path / "out", "--lora", nowhere),
        ("bake-lora", demo / "overlay", "--strength", "1", "--lora", nowhere),
    ):
        assert nowhere in refused(ltxpack(*command), 1)
    assert nowhere in refused(ltxpack("run", demo / "overlay", *RUN, f"--image={nowhere}"), 2)


def test_an_overlay_without_the_needed_bake(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert ltxpack("materialize", demo / "source", out).returncode == 0
    message = refused(ltxpack("run", out, *RUN, "-o", tmp_path / "v.mp4"), 1)
    assert "ltxpack bake-lora" in message
    refused(ltxpack("run", out, *RUN, "--stage2", "mine", "-o", tmp_path / "v.mp4"), 2)
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize(
    "victim",
    ["transformer/config.json", "bakes/distilled-0.25/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json",
     "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["byte", "truncated", "gone"])
def test_an_overlay_changed_since_it_was_written(victim: str, damage: str, overlay: Path, tmp_path: Path) -> None:
    path = overlay / victim
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(
            content[:-1] if damage == "truncated" else content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        )
    checked = ltxpack("verify", overlay)
    assert checked.returncode == 1
    assert victim in checked.stdout
    if victim != "transformer/config.json":  # the run uses the bakes, not the base
        video = tmp_path / "video.mp4"
        message = refused(ltxpack("run", overlay, *RUN, "-o", video, "--save-tensors", tmp_path / "t.safetensors"), 1)
        assert victim in message and "ltxpack verify" in message
        assert sorted(path.name for path in tmp_path.iterdir()) == ["overlay"]


def test_what_a_run_has_not(overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is asked for, a picture that is one, memory on the host."""
    run = ("run", overlay, *RUN, "-o", tmp_path / "v.mp4")
    (tmp_path / "a.png").write_bytes(b"not a picture")
    assert "a.png" in refused(ltxpack(*run, "--image", tmp_path / "a.png"), 1)
    if not torch.cuda.is_available():
        message = refused(ltxpack(*run, "--device", "cuda"), 1)
        assert "CUDA" in message and "--device cpu" in message
    # Whatever this process holds by now counts as usable as well.
    monkeypatch.setattr("ltxpack.runtime.weights.machine.own_memory", lambda: 0)
    monkeypatch.setattr("ltxpack.runtime.weights.machine.free_host", lambda: 600_000_000)
    message = refused(ltxpack(*run), 1)
    assert "GB" in message and "cpu" in message
    assert not (tmp_path / "v.mp4").exists()


def test_pictures_are_checked_before_the_overlay_is_opened(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + bytes(200))
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "images": [{"path": "a.heic"}]}\n')
    done = ltxpack("run", tmp_path / "none", *RUN, "-o", tmp_path / "v.mp4", "--image", tmp_path / "a.heic")
    assert "found a HEIC picture" in refused(done, 1)
    told = refused(ltxpack("run", tmp_path / "none", "--prompts", tmp_path / "a.jsonl", *RUN[2:]), 2)
    assert "1 of 2 lines" in told and "line 2" in told and "found a HEIC picture" in told


def test_an_interrupt_leaves_the_older_video(overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = tmp_path / "v.mp4"
    video.write_bytes(b"older")
    monkeypatch.setattr("ltxpack.runtime.codecs.video.decode_video", mock.Mock(side_effect=KeyboardInterrupt))
    assert ltxpack("run", overlay, *RUN, "-o", video).returncode == 130
    assert video.read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["overlay", "v.mp4"]
