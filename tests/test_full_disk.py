"""Disks that fill up while a run writes: told, nothing half left, and the other outputs kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import Done, Mount, load, ltxpack, refused

pytestmark = pytest.mark.usefixtures("fsync_waits", "short_prompts")

SMALL = ["--device=cpu", "--dtype=float32", "--recipe=distilled", "--height=64", "--width=64", "--num-frames=9"]


@pytest.fixture
def disk(tmp_path: Path, mount: Mount) -> Path:
    """A disk that takes 500 KiB: the frames of the video as tensors, but not all tensors."""
    mount(tmp_path / "disk", options="size=500k")
    return tmp_path / "disk"


def fill(disk: Path) -> None:
    (disk / "ballast").write_bytes(bytes(500 * 1024 - 8192))


def run(demo: Path, *arguments: str | Path) -> Done:
    return ltxpack("run", demo / "overlay", *SMALL, *arguments)


def test_at_the_video(demo: Path, disk: Path, tmp_path: Path) -> None:
    fill(disk)
    output, tensors, inputs = disk / "a.mp4", tmp_path / "t.safetensors", tmp_path / "inputs.safetensors"
    message = refused(run(demo, "--prompt", "boat", "-o", output), 1)
    assert f"error: {output}: the disk is full\n  - nothing of this video is kept\n" in message
    saving = ["--save-tensors", tensors, "--save-activations", inputs]
    message = refused(run(demo, "--prompt", "boat", "-o", output, *saving), 1)
    assert f"error: {output}: the disk is full\n  - kept: {tensors}\n  - kept: {inputs}\n" in message
    assert load(tensors)["video"].shape == (9, 64, 64, 3) and inputs.exists()
    assert [path.name for path in disk.iterdir()] == ["ballast"]
    said = run(demo, "--prompt", "boat", "-o", tmp_path / "a.mp4", "--save-tensors", tmp_path / "again.safetensors")
    assert said.returncode == 0
    assert (tmp_path / "again.safetensors").read_bytes() == tensors.read_bytes()


def test_at_the_tensors(demo: Path, disk: Path, tmp_path: Path) -> None:
    output, tensors = tmp_path / "a.mp4", disk / "t.safetensors"
    message = refused(run(demo, "--prompt", "boat", "-o", output, "--save-tensors", tensors), 1)
    assert f"error: {tensors}: the disk is full\n  - kept: {output}\n" in message
    assert output.exists() and not list(disk.iterdir())
    output.unlink()
    fill(disk)
    message = refused(run(demo, "--prompt", "boat", "-o", output, "--save-tensors", tensors), 1)
    assert f"{disk}: the disk is too small\n  expected 442368 bytes free" in message
    assert not output.exists(), "that is told before anything is made"


def test_at_one_of_many_videos(demo: Path, disk: Path, tmp_path: Path) -> None:
    fill(disk)
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "boat", "output": str(disk / "a.mp4")}, {"prompt": "boat", "output": str(tmp_path / "b.mp4")}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    done = run(demo, "--prompts", prompts)
    message = refused(done, 1)
    assert "1 of 2 videos were not made" in message and f"{disk}/a.mp4: the disk is full" in message
    assert (tmp_path / "b.mp4").exists() and (tmp_path / "b.mp4.json").exists()
    assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_at_the_record_of_a_video(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ltxpack.runtime import record

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "atomic_write", full)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "boat", "output": "a.mp4"}')
    message = refused(run(demo, "--prompts", tmp_path / "prompts.jsonl"), 1)
    assert f"{tmp_path}/a.mp4.json: the disk is full" in message and f"kept: {tmp_path}/a.mp4" in message
