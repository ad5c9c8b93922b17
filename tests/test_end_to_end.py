"""The whole path through the command line, held against the recorded official runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from dit_parts import golden_dit, tracing
from golden_runs import Run, Stage, errors_of_stage, runs
from safetensors import safe_open
from support import Done, load, ltxpack, relative_l2

import ltxpack as ltxpack_package
from ltxpack.files import reader
from ltxpack.runtime import session
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.sampling.conditioning import patchify
from ltxpack.runtime.sampling.guidance import Denoiser
from ltxpack.runtime.sampling.shape import AV
from ltxpack.runtime.settings import MODES, RESIDENT

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
    """The golden fixture, materialised, with the bakes of its runs by the official rule."""
    out = tmp_path_factory.mktemp("overlay") / "out"
    done(ltxpack("materialize", golden, out))
    used = {lora for run in runs(golden, "fp32") for stage in run.stages for lora in loras_of(stage, golden)}
    for file in sorted({file for file, _ in used}):
        strengths = [f"--strength={strength}" for name, strength in sorted(used) if name == file]
        done(ltxpack("bake-lora", out, "--lora", golden / file, *strengths, "--rule", "official"))
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs that ``errors_of`` makes with no flags of a test; each is made once."""
    return tmp_path_factory.mktemp("made")


def loras_of(stage: Stage, golden: Path) -> list[tuple[str, float]]:
    """File name and strength of what was fused into the stage's transformer."""
    return [(next(golden.glob(file)).name, strength) for file, strength in stage.loras]


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
            **{f"{name}-skip-step": p[f"{name}_guider"]["skip_step"] for name in ("video", "audio")},
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
        **transformers(run, golden, overlay),
        "device": "cpu",
        "dtype": str(run.dtype).removeprefix("torch."),
    }
    given = [f"--{name}={value}" for name, value in settings.items()]
    return given + [f"--image={golden}/image_{index}.png@{frame}:{s}" for index, frame, s in p["images"]]


def transformers(run: Run, golden: Path, overlay: Path) -> dict[str, str]:
    """The stages of a recorded run and the bakes they used."""
    bakes = json.loads((overlay / "ltxpack.json").read_text())["bakes"]
    names = {(): "base"} | {
        tuple((lora["file"], lora["strength"]) for lora in bake["loras"]): name for name, bake in bakes.items()
    }
    return {f"stage{stage.number}": names[tuple(loras_of(stage, golden))] for stage in run.stages}


def errors_of(run: Run, golden: Path, overlay: Path, folder: Path, *more: str) -> dict[str, float]:
    """Make ``run`` into ``folder``; its frames are checked. Returns the error of each other saved tensor."""
    tensors, video = folder / f"{run.name}.safetensors", folder / f"{run.name}.mp4"
    outputs = ("-o", video, "--save-tensors", tensors)
    given = [flag for flag in flags(run, golden, overlay) if flag != "--device=cpu" or "--devices" not in more]
    if not video.exists():
        result = done(ltxpack("run", overlay, *given, *more, *outputs))
        assert result.stdout.splitlines()[-1] == str(video)
        expected = [mode for mode in MODES if mode in more] or [RESIDENT]
        assert "--devices" in more or all(f"residency {mode}: " in result.stderr for mode in expected)
    found = load(tensors)
    assert {*found} - {"video"} == {name for name, key in RECORDED.items() if key in run.tensors}
    check_frames(found["video"], run.tensors)
    return {name: relative_l2(found[name], run.tensors[RECORDED[name]]) for name in found if name != "video"}


@pytest.mark.parametrize(("kind", "bound"), [("run", BOUND), ("recipe", 1e-5)], ids=["hq", "other recipes"])
def test_every_recorded_fp32_run_is_met(kind: str, bound: float, golden: Path, overlay: Path, made: Path) -> None:
    """All weights stay: on a CPU, ``auto`` is resident."""
    for run in runs(golden, "fp32", kind):
        errors = errors_of(run, golden, overlay, made)
        assert max(errors.values()) <= bound, (run.name, errors)
        if kind == "run":
            assert errors.keys() == RECORDED.keys()
            check_metadata(made / f"{run.name}.safetensors", run)


@pytest.mark.usefixtures("warm_workers")
def test_a_recorded_run_is_met_on_two_devices(golden: Path, overlay: Path, tmp_path: Path) -> None:
    """Passes of stage 1 are shared out, and the tokens of stage 2, those of the last image among them."""
    (run,) = [run for run in runs(golden, "fp32", "run") if run.name == "run_i2v_first_last_fp32"]
    errors = errors_of(run, golden, overlay, tmp_path, "--devices", "cpu:2", "--parallel", "both")
    assert max(errors.values()) <= 1e-5, errors


def test_the_other_recipes_in_bfloat16_are_the_recorded_bits(golden: Path, overlay: Path) -> None:
    """Up to the last latents, with one thread and the recorder's kind of processor; elsewhere roundings add up."""
    cpu = Path("/proc/cpuinfo").read_text()
    limit = 0.0 if "AuthenticAMD" in cpu and "avx512" not in cpu and torch.get_num_threads() == 1 else 0.2
    with ltxpack_package.Pipeline.from_overlay(overlay, device="cpu", dtype="bfloat16", cache=False) as make:
        for run in runs(golden, "bf16", "recipe"):
            generator = torch.Generator().manual_seed(run.params["seed"])
            batch = (run.params["prompt"], run.params["negative_prompt"])[: 1 + run.recipe.negative]
            contexts = make.session.prompts.contexts(batch, make.session.reporter)
            for stage in run.stages:
                dit = golden_dit(golden, stage.loras, run.dtype)
                errors = errors_of_stage(stage, Denoiser(dit, *contexts, guidance=stage.guidance), generator)
                assert max(errors) <= limit, (run.name, stage.number, errors)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_meet_a_run_with_stg_skipped_steps_and_images(
    golden: Path, overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As traced: that compiled code computes what was traced is shown in runtime/model/test_dit_compile.py."""
    graphs, backend = tracing()
    compile_blocks = DiT.compile_blocks
    monkeypatch.setattr(DiT, "compile_blocks", lambda dit: compile_blocks(dit, backend=backend, fullgraph=True))
    recorded = runs(golden, "fp32", "recipe_one-stage")
    run = max(recorded, key=lambda run: (run.guidance.video.skip, len(run.params["images"])))
    errors = errors_of(run, golden, overlay, tmp_path, "--compile")
    assert graphs and max(errors.values()) <= 1e-5, errors


@pytest.mark.filterwarnings("ignore")
def test_diffusers_makes_the_same_latents_by_the_distilled_recipe(golden: Path, overlay: Path, made: Path) -> None:
    """Its LTX2 pipeline on the same overlay and transformer, given the sigmas and the first latents of each stage."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTX2Pipeline, LTX2VideoTransformer3DModel

    recorded = runs(golden, "fp32", "recipe_distilled")
    run = next(run for run in recorded if not run.params["images"] and run.params["s1"])
    assert max(errors_of(run, golden, overlay, made).values()) <= 1e-5
    ours = load(made / f"{run.name}.safetensors")
    bake = f"bakes/{transformers(run, golden, overlay)['stage1']}"
    transformer = LTX2VideoTransformer3DModel.from_pretrained(overlay, subfolder=bake, torch_dtype=torch.float32)
    pipeline = LTX2Pipeline.from_pretrained(overlay, transformer=transformer, torch_dtype=torch.float32)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()  # that of an overlay of the dev checkpoint shifts the sigmas
    pipeline.set_progress_bar_config(disable=True)
    video_scale = pipeline.vae.latents_mean, pipeline.vae.latents_std, pipeline.vae.config.scaling_factor
    audio_scale = pipeline.audio_vae.latents_mean, pipeline.audio_vae.latents_std
    off = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
    generator = torch.Generator().manual_seed(run.params["seed"])
    for stage in run.stages:
        first = stage.state(generator).map(lambda state: state.latents)
        video, audio = pipeline(
            run.params["prompt"],
            height=stage.shape.height,
            width=stage.shape.width,
            num_frames=stage.shape.frames,
            frame_rate=stage.shape.fps,
            sigmas=stage.sigmas[:-1].tolist(),
            latents=first.video,
            audio_latents=pipeline._denormalize_audio_latents(first.audio, *audio_scale),
            output_type="latent",
            return_dict=False,
            **off,
            **{f"audio_{name}": value for name, value in off.items()},
        )
        found = AV(
            pipeline._normalize_latents(video, *video_scale),
            pipeline._normalize_audio_latents(pipeline._pack_audio_latents(audio), *audio_scale),
        )
        expected = AV(ours[f"stage{stage.number}.video"], ours[f"stage{stage.number}.audio"])
        expected = AV(expected.video, patchify(expected).audio)
        errors = found.map(relative_l2, expected)
        assert max(errors.video, errors.audio) <= 1e-5, (stage.number, errors)


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
    run = next(run for run in runs(golden, "fp32", "recipe_distilled") if run.params["images"] and run.params["s1"])
    tensors = tmp_path / "run.safetensors"
    given = (*flags(run, golden, overlay), "--residency", mode, "--no-cache")
    result = ltxpack("run", overlay, *given, "-o", tmp_path / "run.mp4", "--save-tensors", tensors)
    assert f"residency {mode}: " in done(result).stderr
    found = load(tensors)
    errors = {name: relative_l2(found[name], run.tensors[key]) for name, key in RECORDED.items()}
    assert max(errors.values()) <= 1e-5, errors
    name = f"distilled-{run.params['s1']:g}"
    assert loads == [overlay / "bakes" / name]
    assert sum(read[path] for path in loads[0].glob("*.safetensors")) <= sum(
        path.stat().st_size for path in loads[0].glob("*.safetensors")
    )
    with safe_open(tensors, framework="pt") as file:
        assert [file.metadata()[name] for name in ("recipe", "stage1", "stage2")] == ["distilled", *[name] * 2]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != RESIDENT])
def test_a_recorded_run_is_met_in_every_residency_mode(mode: str, golden: Path, overlay: Path, tmp_path: Path) -> None:
    """The run with the most images passes through every phase."""
    run = max(runs(golden, "fp32", "run"), key=lambda run: len(run.params["images"]))
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
