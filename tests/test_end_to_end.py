"""The whole path through the command line, held against the recorded official runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime.golden_runs import Run, runs
from safetensors import safe_open
from support import Done, load, ltxpack, relative_l2

from ltxpack.files import reader
from ltxpack.runtime import session
from ltxpack.runtime.weights.plan import MODES

BOUND = 1e-4
# What --save-tensors calls it -> what the recording calls it.
RECORDED = {
    "stage1.video": "stage1.video_final_latent",
    "stage1.audio": "stage1.audio_final_latent",
    "upsampled.video": "upsampler.out",
    "stage2.video": "stage2.video_final_latent",
    "stage2.audio": "stage2.audio_final_latent",
    "audio": "audio_waveform",
}


def done(result: Done) -> Done:
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="session")
def overlay(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden fixture, materialised, with both bakes of its runs by the official rule."""
    out = tmp_path_factory.mktemp("overlay") / "out"
    strengths = json.loads((golden / "fixture_params.json").read_text())["run"]
    done(ltxpack("materialize", golden, out))
    baked = [f"--strength={strength}" for strength in (strengths["s1"], strengths["s2"], 1)]
    done(ltxpack("bake-lora", out, *baked, "--rule", "official"))
    style = golden / "style-lora-4.safetensors"
    if style.exists():
        done(ltxpack("bake-lora", out, "--lora", style, "--strength", "0.8", "--rule", "official"))
    return out


def flags(run: Run, golden: Path, overlay: Path) -> list[str]:
    """The command-line equivalent of a recorded run."""
    p = run.params
    guided = {}
    if p["video_guider"] is not None:
        video, audio = run.guidance.video, run.guidance.audio
        assert video.modality == audio.modality
        guided = {
            "negative-prompt": p["negative_prompt"],
            "steps": p["steps"],
            "video-cfg": video.cfg,
            "audio-cfg": audio.cfg,
            "video-rescale": video.rescale,
            "audio-rescale": audio.rescale,
            "video-stg": video.stg,
            "audio-stg": audio.stg,
            "video-stg-blocks": ",".join(map(str, video.stg_blocks)),
            "audio-stg-blocks": ",".join(map(str, audio.stg_blocks)),
            "modality": video.modality,
            **{f"{name}-skip-step": p[f"{name}_guider"]["skip_step"] for name in ("video", "audio") if "recipe" in p},
        }
    settings = {
        "prompt": p["prompt"],
        "recipe": p.get("recipe", "hq"),
        **guided,
        "seed": p["seed"],
        "height": p["height"],
        "width": p["width"],
        "num-frames": p["num_frames"],
        "fps": p["frame_rate"],
        "image-crf": p["crf"],
        **transformers(p, overlay),
        "device": "cpu",
        "dtype": str(run.dtype).removeprefix("torch."),
    }
    given = [f"--{name}={value}" for name, value in settings.items()]
    return given + [f"--image={golden}/image_{index}.png@{frame}:{s}" for index, frame, s in p["images"]]


def transformers(params: dict[str, Any], overlay: Path) -> dict[str, str]:
    """The stages of a recorded run and the bakes they used."""
    bakes = json.loads((overlay / "ltxpack.json").read_text())["bakes"]
    used = {name: [(lora["file"], lora["strength"]) for lora in bake["loras"]] for name, bake in bakes.items()}
    distilled = next(loras[0][0] for name, loras in used.items() if name.startswith("distilled"))
    hq = {"stage1": [[distilled, params["s1"]]], "stage2": [[distilled, params["s2"]]]}
    stages = {stage: loras for stage, loras in params.get("loras", hq).items() if loras is not None}
    return {
        stage: next((name for name, found in used.items() if found == list(map(tuple, loras))), "base")
        for stage, loras in stages.items()
    }


def errors_of(run: Run, golden: Path, overlay: Path, folder: Path, *more: str) -> dict[str, float]:
    """Make ``run`` anew into ``folder``; its frames are checked. Returns the error of each other saved tensor."""
    tensors, video = folder / f"{run.name}.safetensors", folder / f"{run.name}.mp4"
    outputs = ("-o", video, "--save-tensors", tensors)
    result = done(ltxpack("run", overlay, *flags(run, golden, overlay), *more, *outputs))
    assert result.stdout.splitlines()[-1] == str(video)
    assert all(f"residency {mode}: " in result.stderr for mode in MODES if mode in more)
    found = load(tensors)
    assert {*found} - {"video"} == {name for name, key in RECORDED.items() if key in run.tensors}
    check_frames(found["video"], run.tensors)
    return {name: relative_l2(found[name], run.tensors[RECORDED[name]]) for name in found if name != "video"}


def test_every_recorded_fp32_run_is_met(golden: Path, overlay: Path, tmp_path: Path) -> None:
    recorded = runs(golden, "fp32")
    assert recorded
    for run in recorded:
        errors = errors_of(run, golden, overlay, tmp_path)
        assert errors.keys() == RECORDED.keys() and max(errors.values()) <= BOUND, (run.name, errors)
        check_metadata(tmp_path / f"{run.name}.safetensors", run)


def test_every_recorded_run_of_the_other_recipes_is_met(golden: Path, overlay: Path, tmp_path: Path) -> None:
    for run in runs(golden, "fp32", "recipe"):
        errors = errors_of(run, golden, overlay, tmp_path)
        assert max(errors.values()) <= 1e-5, (run.name, errors)


@pytest.mark.parametrize("mode", MODES)
def test_distilled_loads_one_transformer_once_in_every_residency_mode(
    mode: str, golden: Path, overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Path] = []
    read: Counter[Path] = Counter()
    load_dit, begin = session.load_dit, reader.ReadQueue._begin
    monkeypatch.setattr(session, "load_dit", lambda folder, *more: (loads.append(folder), load_dit(folder, *more))[1])
    monkeypatch.setattr(
        reader.ReadQueue,
        "_begin",
        lambda queue, part, file: (read.update({part.file: part.nbytes}), begin(queue, part, file))[1],
    )
    (run,) = (run for run in runs(golden, "fp32", "recipe") if run.name == "recipe_distilled_i2v_first_last_fp32")
    tensors = tmp_path / "run.safetensors"
    given = (*flags(run, golden, overlay), "--residency", mode, "--no-cache")
    result = ltxpack("run", overlay, *given, "-o", tmp_path / "run.mp4", "--save-tensors", tensors)
    assert f"residency {mode}: " in done(result).stderr
    found = load(tensors)
    errors = {name: relative_l2(found[name], run.tensors[key]) for name, key in RECORDED.items()}
    assert max(errors.values()) <= 1e-5, errors
    assert loads == [overlay / "bakes" / "distilled-0.5"]
    assert sum(read[path] for path in loads[0].glob("*.safetensors")) <= sum(
        path.stat().st_size for path in loads[0].glob("*.safetensors")
    )
    with safe_open(tensors, framework="pt") as file:
        assert [file.metadata()[name] for name in ("recipe", "stage1", "stage2")] == [
            "distilled",
            *["distilled-0.5"] * 2,
        ]


@pytest.mark.parametrize("mode", MODES)
def test_a_recorded_run_is_met_in_every_residency_mode(mode: str, golden: Path, overlay: Path, tmp_path: Path) -> None:
    """The run with the most images passes through every phase."""
    run = max(runs(golden, "fp32"), key=lambda run: len(run.params["images"]))
    errors = errors_of(run, golden, overlay, tmp_path, "--residency", mode, "--no-cache")
    assert errors.keys() == RECORDED.keys() and max(errors.values()) <= BOUND, errors


def check_frames(video: torch.Tensor, recorded: dict[str, torch.Tensor]) -> None:
    """Frames against whatever the recording kept of them."""
    stated = recorded["decoded_frames_mean_std_min_max"]
    found = torch.stack([video.mean(), video.std(), video.min(), video.max()])
    assert torch.allclose(found, stated, atol=1e-4)
    if "decoded_frames_sel_fhwc_0_1" in recorded:
        chosen = video[recorded["decoded_frames_sel_idx"]]
        assert relative_l2(chosen, recorded["decoded_frames_sel_fhwc_0_1"]) <= BOUND
    for name, frames in (
        ("decoded_frames_fhwc_u8_round", video),
        ("decoded_frames_sel_fhwc_u8_round", video[recorded.get("decoded_frames_sel_idx", torch.zeros(0)).long()]),
    ):
        if name in recorded:
            difference = (frames * 255).round() - recorded[name].float()
            assert difference.shape == frames.shape
            assert difference.abs().max() <= 1


def check_metadata(path: Path, run: Run) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert int(metadata["audio_sample_rate"]) == int(run.tensors["audio_sampling_rate"])
    assert float(metadata["fps"]) == run.params["frame_rate"]
    assert int(metadata["seed"]) == run.params["seed"]
    assert metadata["stage1"] != metadata["stage2"]
