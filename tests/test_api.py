"""ltxpack from Python: light to import, callable many times, and documented by examples that run."""

from __future__ import annotations

import gc
import inspect
import multiprocessing
import re
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import av
import pytest
import torch
from PIL import Image
from support import HANG, REPOSITORY, Notes, load, ltxpack, relative_l2
from test_architecture import HEAVY, modules_after

import ltxpack as package
from ltxpack.errors import DeviceError, UsageError
from ltxpack.runtime import recipe_run
from ltxpack.runtime.codecs import video
from ltxpack.runtime.codecs.tiles import auto_tiling
from ltxpack.runtime.model import kernels
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.pipeline import Pipeline
from ltxpack.runtime.sampling import recipes
from ltxpack.runtime.session import Session
from ltxpack.runtime.settings import SessionSettings, Settings
from ltxpack.runtime.text import gemma as text
from ltxpack.runtime.torch_settings import INDUCTOR_CACHE
from ltxpack.runtime.weights import plan as planner
from ltxpack.runtime.weights import reading

pytestmark = pytest.mark.usefixtures("short_prompts")
SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 9, "steps": 2}
FLAGS = ("--device=cpu", "--dtype=float32", "--height=64", "--width=64", "--num-frames=9", "--steps=2")
DOCUMENTATION = (REPOSITORY / "docs" / "python.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", DOCUMENTATION, re.DOTALL | re.MULTILINE)


@pytest.fixture
def make(demo: Path) -> Iterator[Pipeline]:
    with Pipeline.from_overlay(demo / "overlay", device="cpu", dtype="float32") as pipeline:
        yield pipeline


def test_the_package_is_light_until_the_pipeline_is_named() -> None:
    assert not modules_after("ltxpack; dir(ltxpack); ltxpack.__version__") & set(HEAVY)


def test_a_fork_of_a_process_that_made_videos_is_told_so(make: Pipeline, demo: Path) -> None:
    """It would wait for threads that it does not have, in a new pipeline too."""
    make("a boat", **SMALL)
    process = multiprocessing.get_context("fork").Process(target=_forked, args=(make, demo / "overlay"))
    process.start()
    process.join(HANG)
    process.kill()
    assert process.exitcode == 0


def _forked(make: Pipeline, overlay: Path) -> None:
    for pipeline in (make, Pipeline.from_overlay(overlay, device="cpu", dtype="float32")):
        with pytest.raises(UsageError, match="is a fork of one that has made videos"):
            pipeline("a boat", **SMALL)


def test_every_public_name_is_there() -> None:
    assert all(getattr(package, name) for name in package.__all__)
    assert set(package.__all__) <= set(dir(package))
    assert package.Pipeline is Pipeline
    with pytest.raises(AttributeError, match="no attribute 'Pipelines'"):
        package.Pipelines  # noqa: B018


def test_many_calls_give_what_the_command_gives(demo: Path, make: Pipeline, tmp_path: Path) -> None:
    other, first = (make("a boat", seed=seed, **SMALL) for seed in (4, 3))
    assert not torch.equal(first.frames, other.frames)
    saved = first.save_tensors(tmp_path / "python.safetensors")
    command = ("--prompt", "a boat", "--seed", "3", "-o", tmp_path / "v.mp4")
    tensors = tmp_path / "command.safetensors"
    assert ltxpack("run", demo / "overlay", *FLAGS, *command, "--save-tensors", tensors).returncode == 0
    assert saved.read_bytes() == tensors.read_bytes()

    assert first.frames.shape == (9, 64, 64, 3)
    assert first.frames.dtype == first.waveform.dtype == torch.float32
    assert 0 <= first.frames.min() < first.frames.max() <= 1
    assert first.waveform.shape == load(tensors)["audio"].shape
    assert first.latents.stage1.video.shape == (1, 128, 2, 1, 1)
    assert first.latents.upsampled.shape == first.latents.stage2.video.shape == (1, 128, 2, 2, 2)
    assert first.latents.stage1.audio.shape == first.latents.stage2.audio.shape == (1, 8, 9, 16)
    assert (first.fps, first.seed, first.sample_rate) == (24.0, 3, 48000)
    assert (first.stage1, first.stage2) == ("distilled-0.25", "distilled-0.5")
    assert list(first.seconds) == ["text", "images", "stage 1", "upsample", "stage 2", "audio", "video"]


def test_progress_and_images(make: Pipeline, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "a.png")
    told: list[tuple[str, int, int]] = []
    spec = package.ImageSpec(tmp_path / "a.png", frame=8, strength=0.5)
    video = make("a boat", images=[f"{tmp_path}/a.png", spec], progress=lambda *step: told.append(step), **SMALL)
    assert told == [
        ("text", 0, 2), ("text", 1, 2), ("text", 2, 2),
        ("stage 1", 0, 2), ("stage 1", 1, 2), ("stage 1", 2, 2),
        ("stage 2", 0, 3), ("stage 2", 1, 3), ("stage 2", 2, 3), ("stage 2", 3, 3),
        ("decode", 0, 9), ("decode", 9, 9),
    ]  # fmt: skip
    path = video.save(str(tmp_path / "v.mkv"))
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "v.mkv"]


def test_one_load_serves_what_is_encoded_ahead(demo: Path, make: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [package.Request.of(prompt, **SMALL) for prompt in ("a boat", "a dog")]
    assert make.encode_ahead(requests) > 0
    monkeypatch.setattr(text, "load_text_encoder", None)
    make.session.prompts.cache = None
    for request in requests:
        assert len(make.session.prompts.contexts(request.prompts, make.session.reporter)) == 2


NO_RUN: list[dict[str, Any]] = [
    {"height": 100}, {"num_frames": 10}, {"steps": 1}, {"images": ["nowhere.png"]}, {"video_cfg": float("nan")},
    {"images": [package.ImageSpec(Path("nowhere.png"))]}, {"images": [package.ImageSpec(Path(__file__), frame=9)]},
    {"images": [package.ImageSpec(Path(__file__), strength=1.5)]}, {"decode": "slow"},
]  # fmt: skip


@pytest.mark.parametrize("settings", NO_RUN)
def test_values_no_run_could_use(settings: dict[str, Any], make: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_run, "generate", None)
    with pytest.raises(UsageError):
        make("a boat", **{**SMALL, **settings})


def test_prompts_that_are_no_text_and_a_setting_that_does_not_exist(make: Pipeline) -> None:
    for prompt, others in (("caf\udce9", {}), ("a", {"negative_prompt": "caf\udce9"})):
        with pytest.raises(UsageError, match="UTF-8"):
            make(prompt, **others, **SMALL)
    with pytest.raises(TypeError, match="heigth"):
        make("a boat", heigth=64)


def test_settings_of_the_pipeline(demo: Path, tmp_path: Path) -> None:
    overlay = demo / "overlay"
    with Pipeline.from_overlay(str(overlay), dtype=torch.bfloat16, device="cpu", cache=False) as plain:
        assert plain.session.dtype == torch.bfloat16
        assert plain.session.prompts.cache is None
    with Pipeline.from_overlay(overlay, device="cpu", cache=tmp_path / "mine") as kept:
        assert kept.session.prompts.cache is not None
        assert kept.session.prompts.cache.folder == tmp_path / "mine"
    wrong: dict[str, Any] = {"dtype": "float16", "device": "tpu", "residency": "all", "reads": "fast", "stage1": "x"}
    for name, value in wrong.items():
        with pytest.raises(UsageError):
            Pipeline.from_overlay(overlay, **{name: value})
    for kernel, told in (("fastest", "unknown"), ("cudnn", "cannot be used here")):
        with pytest.raises(UsageError, match=told) as caught:
            Pipeline.from_overlay(overlay, device="cpu", dtype="float32", attention=kernel)
        assert "auto, flash, sdpa, math" in caught.value.next


def test_the_attention_kernel_is_chosen_once_before_anything_is_loaded(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = Notes()
    for owner, name in ((kernels, "choose"), (reading.FileReader, "fill")):
        real = getattr(owner, name)

        def noted(*arguments: Any, real: Any = real, name: str = name, **options: Any) -> Any:
            notes.notes.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, noted)
    with Pipeline.from_overlay(demo / "overlay", device="cpu", dtype="float32", cache=False, reporter=notes) as make:
        assert not notes.notes, "nothing is measured before there is something to make"
        for _ in range(2):
            make("a boat", **SMALL)
    assert notes.notes.count("choose") == 1
    assert [line for line in notes.notes if line.startswith("attention: ")] == [
        "attention: sdpa (torch's own choice; nothing is measured on a CPU)"
    ]
    assert notes.notes.index("choose") < notes.notes.index("fill")


@pytest.mark.parametrize(
    ("given", "variable", "note"),
    [
        ("math", None, "attention: math (asked for)"),
        ("flash", "math", "attention: flash (asked for)"),
        ("auto", "math", "attention: sdpa (torch's own choice; nothing is measured on a CPU)"),
        (None, "math", "attention: math (by LTXPACK_ATTENTION)"),
    ],
)
def test_an_attention_kernel_asked_for_serves_both_stages(
    given: str | None, variable: str | None, note: str, demo: Path, make: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[object] = set()
    passes = DiT.passes

    def watched(self: DiT, *arguments: Any) -> Any:
        used.update((block, block.attn1.kernel) for block in self.blocks())
        return passes(self, *arguments)

    expected = make("a boat", **SMALL).frames
    if variable is not None:
        monkeypatch.setenv(kernels.VARIABLE, variable)
    monkeypatch.setattr(DiT, "passes", watched)
    notes = Notes()
    with Pipeline.from_overlay(
        demo / "overlay", device="cpu", dtype="float32", attention=given, reporter=notes
    ) as pinned:
        found = pinned("a boat", **SMALL).frames
    assert note in notes.notes
    assert relative_l2(found, expected) <= 1e-4
    name = note.split()[1]
    assert len(used) == 4 and {kernel for _, kernel in used} == {kernels.KERNELS[name]}  # type: ignore[misc]


def test_larger_tiles_and_the_official_ones(make: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's codec in full: fast is the decoder on the whole, official as ever."""
    wide: dict[str, Any] = {"height": 64, "width": 832, "num_frames": 9, "steps": 2}
    make.session.reporter = make.session.residency.reporter = notes = Notes()
    official = make("a boat", **wide)
    assert make.decoding == "decode official: 2 tiles of at most 9 frames of 64x768 pixels"
    assert not [line for line in notes.notes if line.startswith("decode")]
    fast = make("a boat", decode="fast", **wide)
    told = "decode fast: one tile of 9 frames of 64x832 pixels (official: 2 tiles of at most 9 frames of 64x768 pixels)"
    assert make.decoding == told and notes.notes.count(told) == 1
    assert torch.equal(fast.latents.stage2.video, official.latents.stage2.video)
    folder = make.session.overlay.folder("vae")
    vae = video.load_video_vae(folder, torch.device("cpu"), torch.float32)
    latents = official.latents.stage2.video
    with torch.inference_mode():
        whole = vae.decode(video.LatentStatistics.of(vae).denormalise(latents)).sample[0].permute(1, 2, 3, 0)
        tiled = torch.cat(list(video.decode_video(vae, latents)))
    assert relative_l2(fast.frames, ((whole + 1) / 2).clamp(0, 1)) <= 1e-6
    assert torch.equal(official.frames, tiled)
    assert not torch.equal(fast.frames, official.frames)

    monkeypatch.setattr(planner, "tiling_within", lambda grid, *_: auto_tiling(*grid[1:]))
    again = make("a boat", decode="fast", **wide)
    assert torch.equal(again.frames, official.frames)
    assert notes.notes[-1].startswith(
        "decode fast: no larger tiles than the official ones fit, which are used: 2 tiles"
    )


def test_a_transformer_is_loaded_ahead_only_for_a_video_that_is_to_come(
    make: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead: list[str] = []
    monkeypatch.setattr(Session, "load_ahead", lambda session, name: ahead.append(name))
    first, second = "distilled-0.25", "distilled-0.5"
    for _ in range(2):
        make("a boat", **SMALL)
    assert ahead == [first, second] * 2, "nobody knows of another"
    ahead.clear()
    requests = [package.Request.of("a boat", seed=seed, **SMALL) for seed in (1, 2)]
    make.encode_ahead(requests)
    for request in requests:
        make.make(request)
    assert ahead == [first, second, first, first, second]


def test_a_recipe_of_three_stages_is_only_a_value(
    make: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = recipes.HQ.stages
    stages = (replace(first, divide=4), replace(second, divide=2), second)
    monkeypatch.setitem(recipes.RECIPES, "three", recipes.Recipe("three", stages, sound=1))
    video = make("a boat", recipe="three", **{**SMALL, "height": 128, "width": 128})
    assert [stage.video.shape[-1] for stage in video.latents.stages] == [1, 2, 4]
    assert video.transformers == ("distilled-0.25", "distilled-0.5", "distilled-0.5")
    assert list(video.seconds) == ["text", "images", "stage 1", "upsample", "stage 2", "stage 3", "audio", "video"]
    assert {"stage1.video", "stage3.audio"} < load(video.save_tensors(tmp_path / "t.safetensors")).keys()


def test_prompts_encoded_ahead_are_in_the_plan(make: Pipeline) -> None:
    requests = [package.Request.of(prompt, **SMALL) for prompt in ("a boat", "a dog", "a boat")]
    make.encode_ahead(requests)
    assert make.session.residency.plan is not None
    assert make.session.residency.plan.work.prompts == 2
    make.make(requests[0])
    assert make.session.residency.plan.work.prompts == 2, "their contexts are still there"
    make.encode_ahead(requests[:1])
    assert make.session.residency.plan.work.prompts == 1
    recipe_run.generate(make.session, requests[0], once=True)
    assert make.session.residency.plan.work.once


def test_a_video_is_warned_of_and_refused_before_anything_is_loaded(
    make: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe_run, "sample", lambda *_: pytest.fail("is made"))
    warned: list[tuple[dict[str, Any], list[str]]] = [
        ({"num_frames": 41, "fps": 2.0}, []),
        ({"num_frames": 49, "fps": 2.0}, ["at most 44 (20 s)"]),
        ({"video_stg": 1.0, "audio_stg_blocks": (1,)}, ["no block: give --video-stg-blocks", "give --audio-stg too"]),
        ({"recipe": "one-stage", "video_stg": 0.0, "audio_stg_blocks": (1,)}, []),
    ]
    for changes, told in warned:
        notes = Notes()
        with pytest.raises(pytest.fail.Exception), make.session.reporting(notes):
            recipe_run.generate(make.session, package.Request.of("a boat", **{**SMALL, **changes}))
        assert [end in warning for end, warning in zip(told, notes.warnings, strict=True)] == [True] * len(told)
    with pytest.raises(UsageError, match="no schedule for this size"):
        recipe_run.generate(make.session, package.Request.of("a boat", height=2176, width=3840, num_frames=241))


def test_a_closed_pipeline_makes_nothing(make: Pipeline) -> None:
    make.close()
    make.close()
    for use in (lambda: make("a boat", **SMALL), lambda: make.encode_ahead([]), make.__enter__):
        with pytest.raises(UsageError, match="closed"):
            use()


class Stop(Exception):
    """What a caller's own callback raises."""


def test_after_an_error_the_pipeline_can_be_called_again(make: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if phase == "stage 2":
            raise Stop

    with pytest.raises(Stop):
        make("a boat", progress=stop, **SMALL)

    held: list[weakref.ref[torch.Tensor]] = []

    def full(vae: object, latents: torch.Tensor, *how: object) -> None:
        large = torch.zeros_like(latents)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(video, "decode_video", full)
        with pytest.raises(DeviceError, match="7 GiB") as raised:
            make("a boat", **SMALL)
    assert held[0]() is None, "the failed work's tensors are released while the error is still held"
    assert raised.value.__context__ is None
    assert make("a boat", **SMALL).frames.shape == (9, 64, 64, 3)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
     RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
     RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")],
)  # fmt: skip
def test_whatever_says_that_memory_ran_out(error: Exception, make: Pipeline) -> None:
    with pytest.raises(DeviceError, match="ran out of memory"):
        make.session.within_memory(mock.Mock(side_effect=error))
    with pytest.raises(RuntimeError, match="shapes differ"):
        make.session.within_memory(mock.Mock(side_effect=RuntimeError("shapes differ")))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiler_that_fails_is_told_with_what_to_do(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is none, or where a power cut left empty files of compiled code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(INDUCTOR_CACHE, "")
    backend = mock.Mock(side_effect=AttributeError("module 'c6b6' has no attribute 'call'"))
    monkeypatch.setattr(DiT, "compile_blocks", partialmethod(DiT.compile_blocks, backend=backend))
    compiling = Pipeline.from_overlay(demo / "overlay", device="cpu", dtype="float32", compile=True)
    with compiling as make, pytest.raises(DeviceError, match="no attribute 'call'") as raised:
        make("a boat", **SMALL)
    assert raised.value.next.startswith("leave --compile out") and str(tmp_path) in raised.value.next


def test_nothing_is_held_when_the_pipeline_is_gone(demo: Path) -> None:
    gone = weakref.ref(Pipeline.from_overlay(demo / "overlay", device="cpu", dtype="float32"))
    gc.collect()
    assert gone() is None


def test_the_documentation_has_every_setting() -> None:
    arguments = set(inspect.signature(Pipeline.from_overlay).parameters) - {"path", "given"}
    settings = {one.name for table in (Settings, SessionSettings) for one in fields(table)}
    assert EXAMPLES and not [name for name in arguments | settings if f"`{name}`" not in DOCUMENTATION]


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"example {number}" for number in range(1, len(EXAMPLES) + 1)])
def test_the_examples_of_the_documentation_run(
    example: str, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo / "overlay", tmp_path / "out", symlinks=True)
    if "images=" not in example:  # a CPU takes twenty times as long for a convolution in bfloat16, the default
        monkeypatch.setattr(Pipeline, "from_overlay", partial(Pipeline.from_overlay, dtype="float32"))
    exec(compile(example, "docs/python.md", "exec"), {})
