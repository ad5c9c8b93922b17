"""The demo is the newcomer's first command: its files, that it repeats itself, and that diffusers loads its overlay."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from safetensors import safe_open
from support import load, ltxpack, refused

from ltxpack.demo.checkpoint import REGISTERS
from ltxpack.manifest import read_manifest


def test_both_streams_of_the_video_decode(demo: Path) -> None:
    with av.open(str(demo / "video.mp4")) as container:
        frames = sum(1 for _ in container.decode(video=0))
        rate = container.streams.video[0].average_rate
        container.seek(0)
        samples = sum(frame.samples for frame in container.decode(audio=0))
        sample_rate = container.streams.audio[0].rate
    assert frames == 25
    assert samples / sample_rate == pytest.approx(frames / float(rate), abs=0.1)


def test_saved_tensors_are_those_of_the_design(demo: Path) -> None:
    tensors = load(demo / "video.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        "stage1.video": (1, 128, 4, 3, 5),
        "stage1.audio": (1, 8, 26, 16),
        "upsampled.video": (1, 128, 4, 6, 10),
        "stage2.video": (1, 128, 4, 6, 10),
        "stage2.audio": (1, 8, 26, 16),
        "video": (25, 192, 320, 3),
        "audio": (2, (4 * 26 - 3) * 480),
    }
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors.values())
    assert 0 <= tensors["video"].min() < tensors["video"].max() <= 1
    assert tensors["audio"].abs().max() < 1
    with safe_open(demo / "video.safetensors", framework="pt") as file:
        stages = {"stage1": "distilled-0.25", "stage2": "distilled-0.5"}
        assert file.metadata() == {"audio_sample_rate": "48000", "fps": "24.0", "seed": "10", "recipe": "hq", **stages}


def test_a_second_demo_gives_the_same_bytes_and_names_what_there_is_to_look_at(demo: Path) -> None:
    before = [(demo / name).read_bytes() for name in ("video.safetensors", "overlay/ltxpack.json")]
    done = ltxpack("demo", demo)
    assert done.returncode == 0
    assert [(demo / name).read_bytes() for name in ("video.safetensors", "overlay/ltxpack.json")] == before
    named = [line.rpartition(": ")[2] for line in done.stdout.splitlines() if line.count(": ") == 1]
    assert [Path(name).name for name in named] == ["overlay", "coverage.html", "video.safetensors"]
    assert all(Path(name).exists() for name in named)


def test_the_overlay_verifies_and_names_no_path_of_this_machine(demo: Path) -> None:
    report = json.loads(ltxpack("verify", demo / "overlay", "--json").stdout)
    assert report["ok"] and report["faults"] == []
    for path in (demo / "overlay").rglob("*.json"):
        assert str(demo) not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("mine", ["mine.txt", "source/metadata.json"])
def test_another_folder_is_not_taken_for_a_demo(mine: str, tmp_path: Path) -> None:
    """An overlay has a folder source too."""
    (tmp_path / mine).parent.mkdir(exist_ok=True)
    (tmp_path / mine).write_text("mine")
    assert "not a demo" in refused(ltxpack("demo", tmp_path), 1)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / mine]


@pytest.mark.filterwarnings("ignore")
def test_diffusers_loads_the_overlay_and_runs_two_steps(demo: Path) -> None:
    from diffusers import LTX2Pipeline, LTX2VideoTransformer3DModel

    pipeline = LTX2Pipeline.from_pretrained(str(demo / "overlay"), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
    noise = torch.Generator().manual_seed(0)
    video, audio = pipeline("a boat", "rain", **size, generator=noise, output_type="pt", return_dict=False)
    assert tuple(video.shape) == (1, 9, 3, 64, 64)
    assert video.isfinite().all() and audio.isfinite().all()
    assert pipeline.connectors.config.video_connector_num_learnable_registers == REGISTERS
    baked = LTX2VideoTransformer3DModel.from_pretrained(str(demo / "overlay"), subfolder="bakes/distilled-0.5")
    base = pipeline.transformer.state_dict()
    changed = [name for name, tensor in baked.state_dict().items() if not torch.equal(tensor, base[name])]
    manifest = json.loads((demo / "overlay" / "ltxpack.json").read_text())
    assert set(changed) == set(manifest["bakes"]["distilled-0.5"]["changed"])


def test_what_to_type_next_takes_the_bakes_that_run_would_not_take(overlay: Path, tmp_path: Path) -> None:
    """Before, ``run`` refused what the bake had said: several bakes could serve, or none."""
    plain = tmp_path / "out"
    lora = next((overlay / "loras").iterdir())
    shutil.copytree(overlay, plain, ignore=shutil.ignore_patterns("bakes"))
    manifest = read_manifest(plain)
    (plain / "ltxpack.json").write_bytes(manifest.with_baked({}).dump())
    told = [
        ltxpack("bake-lora", plain, *flags.split()).stdout.splitlines()[-1].partition(" --prompt ")[0]
        for flags in (
            "--strength 0.25", "--strength 0.75", "--strength 2", f"--strength 1 --lora {lora} --name mine",
            "--strength 0.25 --strength 0.5", f"--strength 0.25 --strength 0.5 --add {lora}=1",
            "--strength 0 --format int8 --keep-blocks none",
        )
    ]  # fmt: skip
    assert told == [
        f"next: ltxpack bake-lora {plain} --strength 0.25 --strength 0.5",
        f"next: ltxpack run {plain}",
        *(f"next: ltxpack run {plain} --stage2 {name}" for name in ("distilled-2", "mine")),
        f"next: ltxpack run {plain}",
        f"next: ltxpack run {plain} --stage1 distilled-0.25+{lora.stem}-1 --stage2 distilled-0.5+{lora.stem}-1",
        f"next: ltxpack run {plain}",
    ]
    (plain / "ltxpack.json").write_bytes(replace(read_manifest(plain), transformer_kind="distilled").dump())
    own = ltxpack("bake-lora", plain, "--strength", "1", "--lora", lora, "--name", "own", "--force")
    assert f"next: ltxpack run {plain} --recipe distilled --stage1 own --stage2 own --prompt " in own.stdout


def test_a_bake_says_how_large_it_is_what_it_changed_and_what_to_type_next(overlay: Path) -> None:
    told = ltxpack("bake-lora", overlay, "--strength", "0.75").stdout.splitlines()
    assert told[0] == "bakes/distilled-0.75: baked" and told[1].startswith("  distilled at 0.75: 96 of 96 linears")
    assert told[2].startswith("  ") and " kB; what changed: " in told[2]
    assert Path(told[2].rpartition(": ")[2]).is_file()
    assert told[3].startswith(f"next: ltxpack run {overlay} --stage2 distilled-0.75 --prompt ") and len(told) == 4
    assert len(ltxpack("bake-lora", overlay, "--strength", "0.875", "-v").stdout.splitlines()) > 4


@pytest.mark.usefixtures("short_prompts")
@pytest.mark.parametrize("recipe", ["distilled", "one-stage"])
def test_the_demo_runs_every_recipe(recipe: str, demo: Path, tmp_path: Path) -> None:
    other = shutil.copytree(demo, tmp_path / "demo")
    assert ltxpack("demo", other, "--recipe", recipe).returncode == 0
    with safe_open(other / "video.safetensors", framework="pt") as file:
        assert file.metadata()["recipe"] == recipe
        assert ("stage2" in file.metadata()) is (recipe != "one-stage")
    assert all(tensor.isfinite().all() for tensor in load(other / "video.safetensors").values())
