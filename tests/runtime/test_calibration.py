"""``--save-activations``: several videos add up to one file, and only what fits is added; a killed run adds nothing."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import signal
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import FORKS, Done, ltxpack, refused

from ltxpack.activations import FORMAT, ActivationsFile, base_digest, calibrated
from ltxpack.cli import main
from ltxpack.errors import UsageError
from ltxpack.files.publish import Temporary
from ltxpack.files.tensorfile import build_header
from ltxpack.manifest import read_manifest
from ltxpack.runtime import calibration, recipe_run
from ltxpack.runtime.calibration import LargestInputs, linears
from ltxpack.runtime.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("short_prompts")
FLAGS = ("--device=cpu", "--dtype=float32", "--height=64", "--width=64", "--num-frames=9", "--recipe=distilled")
BAKE, FP8, LINEARS = "distilled-0.5", "distilled-0.5-fp8", linears(2)
STG = ("--video-stg-blocks=1", "--audio-stg-blocks=1")
SMALL: Any = {"height": 64, "width": 64, "num_frames": 9, "recipe": "distilled"}


def run(overlay: Path, folder: Path, *more: str | Path, prompt: str = "a boat") -> Done:
    """A video of eleven forwards with one bake, and its activations."""
    where = ("-o", folder / "v.mp4", "--save-activations", folder / "a.safetensors")
    return ltxpack(
        "run", overlay, *FLAGS, *(() if "--prompts" in more else ("--prompt", prompt, *where[:2])), *where[2:], *more
    )


@pytest.fixture(scope="module")
def first(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of one video of a boat."""
    folder = tmp_path_factory.mktemp("first")
    done = run(demo / "overlay", folder)
    assert done.returncode == 0, done.stderr
    assert f"largest inputs of 68 linears (68 of {BAKE}): {folder / 'a.safetensors'}" in done.stdout.splitlines()
    return (folder / "a.safetensors").read_bytes()


def test_prompts_add_up_by_the_maximum(demo: Path, first: bytes, tmp_path: Path) -> None:
    """In one command, in two, and from Python; a video that is done is made again, as its numbers may be missing."""
    folders = [tmp_path / name for name in ("boat", "dog", "both", "many")]
    boat, dog, both, many = folders
    for folder in folders:
        folder.mkdir()
    (boat / "a.safetensors").write_bytes(first)
    assert run(demo / "overlay", dog, prompt="a dog").returncode == 0
    with Pipeline.from_overlay(
        demo / "overlay", device="cpu", dtype="float32", save_activations=str(both / "a.safetensors")
    ) as make:
        for prompt in ("a boat", "a dog"):
            make(prompt, **SMALL)
    (many / "p.jsonl").write_text('{"prompt": "a dog"}\n{"prompt": "a boat"}\n')
    for _ in range(2):
        done = run(demo / "overlay", many, "--prompts", many / "p.jsonl")
        assert "2 done, 0 skipped" in done.stdout and f"(68 of {BAKE}): {many}" in done.stdout
        (many / "a.safetensors").rename(many / "found")
    ours, others, sums = (load_file(folder / "a.safetensors") for folder in (boat, dog, both))
    assert list(sums) == list(ours) and set(sums) == {f"{BAKE}:{name}" for name in LINEARS}
    assert all(torch.equal(sums[name], torch.maximum(ours[name], others[name])) for name in sums)
    assert any(ours[name] < others[name] for name in sums) and any(ours[name] > others[name] for name in sums)
    assert (both / "a.safetensors").read_bytes() == (many / "found").read_bytes()
    assert run(demo / "overlay", boat, prompt="a dog").returncode == 0
    assert (boat / "a.safetensors").read_bytes() == (both / "a.safetensors").read_bytes()


def test_transformers_of_one_file_stand_beside_one_another(demo: Path, first: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(first)
    done = run(demo / "overlay", tmp_path, "--recipe=one-stage", "--steps=2", *STG)
    assert f"136 linears (68 of {BAKE}, 68 of base)" in done.stdout
    file, manifest = ActivationsFile.read(tmp_path / "a.safetensors"), read_manifest(demo / "overlay")
    (lora,) = manifest.bakes[BAKE].loras
    assert file.transformers == {BAKE: ((lora.blake3, 0.5),), "base": ()}
    assert (file.model_version, file.base) == (
        manifest.model_version,
        base_digest(manifest.components["transformer"].files),
    )
    assert file.largest[BAKE] == of(first, tmp_path).largest[BAKE] and sorted(file.largest["base"]) == LINEARS


def of(data: bytes, folder: Path) -> ActivationsFile:
    (folder / "read").write_bytes(data)
    return ActivationsFile.read(folder / "read")


def changed(**fields: Any) -> Callable[[ActivationsFile], bytes]:
    return lambda file: dataclasses.replace(file, **fields).dump()


def header(metadata: dict[str, str]) -> Callable[[ActivationsFile], bytes]:
    return lambda _: build_header([(f"x:{name}", "F32", ()) for name in ("a", "b")], metadata) + bytes(8)


OURS = {"format": FORMAT, "model_version": "2.3.0", "base": "0"}
BAD: dict[str, tuple[Callable[[ActivationsFile], bytes], str]] = {
    "text": (lambda _: b"hello", "is not a safetensors file"),
    "text that a user cannot fetch again": (
        lambda _: b'{"a": 1}',
        "next: choose another file, or write a new one with",
    ),
    "another format": (
        header(OURS | {"format": "1"}),
        "is not an activations file\n  expected format ltxpack-activations-1, found 1",
    ),
    "no transformers": (header(OURS), "is not an activations file"),
    "loras of another form": (header(OURS | {"transformers": '{"x": [[1]]}'}), "does not say which transformers"),
    "another transformer": (header(OURS | {"transformers": '{"y": []}'}), "x:a: is not the largest |x| of an input"),
    "infinite": (
        lambda file: file.dump()[:-4] + struct.pack("<f", float("inf")),
        "expected one finite F32 that is not negative, found inf",
    ),
    "cut off": (lambda file: file.dump()[:-1], "is truncated"),
    "another version": (changed(model_version="2.5.0"), "is of another version of the model"),
    "another base": (changed(base="0" * 64), "is of another base transformer"),
    "another model": (changed(largest={BAKE: dict.fromkeys(linears(3), 1.0)}), "holds other linears than the model"),
    "other LoRAs": (changed(transformers={BAKE: (("0" * 64, 0.5),)}), f"holds a transformer {BAKE} made from other"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_added_to_is_refused_before_anything_is_made(
    case: str, demo: Path, first: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, told = BAD[case]
    data = make(of(first, tmp_path))
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    monkeypatch.setattr(recipe_run, "generate", None)
    done = run(demo / "overlay", tmp_path)
    message = refused(done, done.returncode)
    assert done.returncode in (1, 2) and told in message and str(path) in message
    assert path.read_bytes() == data and not (tmp_path / "v.mp4").exists()


def test_places_where_it_cannot_be_written(demo: Path, tmp_path: Path) -> None:
    assert "is a folder" in refused(run(demo / "overlay", tmp_path, "--save-activations", tmp_path), 2)
    assert "no such folder" in refused(run(demo / "overlay", tmp_path, "--save-activations", tmp_path / "x" / "a"), 2)
    one = "--save-activations and -o are one file"
    assert one in refused(run(demo / "overlay", tmp_path, "--save-activations", tmp_path / "v.mp4"), 2)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "output": "v.mp4"}\n')
    again = ("--prompts", tmp_path / "p.jsonl", "--save-activations", tmp_path / "v.mp4")
    assert "--save-activations and line 1 are one file" in refused(run(demo / "overlay", tmp_path, *again), 2)


@pytest.mark.parametrize("beside", [True, False], ids=["a bf16 bake beside it", "none"])
def test_a_quantised_bake_is_refused_with_what_to_take(beside: bool, overlay: Path, tmp_path: Path) -> None:
    manifest = read_manifest(overlay)
    bakes = dict(manifest.bakes)
    files = tuple(dataclasses.replace(file, path=file.path.replace(BAKE, FP8)) for file in bakes[BAKE].files)
    (overlay / "bakes" / BAKE).rename(overlay / "bakes" / FP8)
    if beside:
        shutil.copytree(overlay / "bakes" / FP8, overlay / "bakes" / BAKE)
    bakes[FP8] = dataclasses.replace(bakes[BAKE], format="fp8", quantised=("x",), files=files)
    if not beside:
        del bakes[BAKE]
    (overlay / "ltxpack.json").unlink()
    (overlay / "ltxpack.json").write_bytes(dataclasses.replace(manifest, bakes=bakes).dump())
    message = refused(run(overlay, tmp_path, f"--stage1={FP8}", "--stage2=base"), 2)
    assert "stage1 is a quantised one" in message and f"found {FP8} (fp8)" in message
    taken = f"ltxpack run {overlay} --stage1 {BAKE} --save-activations {tmp_path}"
    assert f"next: {taken if beside else f'ltxpack bake-lora {overlay} --strength 0.5'}" in message


def killed_before_the_rename(arguments: list[str]) -> None:
    """The command line, in a process that is killed when the activations are written and not yet published."""
    publish = Temporary.publish

    def kill(self: Temporary, **more: Any) -> None:
        if self.target.name == "a.safetensors":
            os.kill(os.getpid(), signal.SIGKILL)
        publish(self, **more)

    Temporary.publish = kill  # type: ignore[method-assign]
    torch.set_num_threads(1)
    sys.argv = ["ltxpack", *arguments]
    main()


def test_a_killed_run_leaves_the_old_file(demo: Path, first: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(first)
    arguments = ["run", demo / "overlay", *FLAGS, "--prompt", "a dog", "-o", tmp_path / "v.mp4"]
    process = FORKS.Process(
        target=killed_before_the_rename, args=([*map(str, arguments), "--save-activations", str(path)],)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and (tmp_path / "v.mp4").exists()
    assert path.read_bytes() == first
    assert run(demo / "overlay", tmp_path, prompt="a dog").returncode == 0
    assert path.read_bytes() != first


def test_a_video_that_failed_adds_nothing_to_the_next(
    demo: Path, first: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, decode, read = tmp_path / "a.safetensors", recipe_run.decode_video, LargestInputs.read

    def failing(*_: Any) -> None:
        raise UsageError("no more")

    with Pipeline.from_overlay(demo / "overlay", device="cpu", dtype="float32", save_activations=path) as make:
        monkeypatch.setattr(recipe_run, "decode_video", failing)
        with pytest.raises(UsageError, match="no more"):
            make("a dog", **SMALL)
        assert not path.exists()
        monkeypatch.setattr(recipe_run, "decode_video", decode)
        make("a boat", **SMALL)
        assert path.read_bytes() == first
        nan = {"transformer_blocks.1.ff.net.2": float("nan")}
        monkeypatch.setattr(LargestInputs, "read", lambda self: read(self) | nan)
        with pytest.raises(Exception, match=rf"not finite\n  - {BAKE}:transformer_blocks.1.ff.net.2\n"):
            make("a dog", **SMALL)
    assert path.read_bytes() == first


def test_two_that_add_at_once_wait_for_one_another(demo: Path, first: bytes, tmp_path: Path) -> None:
    """Nothing that one has added is lost by the other's rename."""
    path = tmp_path / "a.safetensors"
    with Pipeline.from_overlay(demo / "overlay", device="cpu", save_activations=path) as make:
        recorder = make.session.activations
        assert recorder is not None
        with calibration._alone_in(tmp_path):
            adding = threading.Thread(target=recorder.save)
            adding.start()
            adding.join(0.2)
            assert adding.is_alive()
            path.write_bytes(first)
        adding.join()
    assert path.read_bytes() == first


floats = st.floats(0, 2.0**100, width=32)
runs = st.lists(
    st.tuples(st.sampled_from(["base", BAKE, "a+b_0.5"]), st.lists(floats, min_size=2, max_size=2)), max_size=6
)


@given(runs, st.randoms())
def test_a_file_holds_the_maximum_of_its_runs_in_any_order(caches: Path, found: list[Any], draw: Any) -> None:
    def added(order: list[Any]) -> ActivationsFile:
        file = ActivationsFile("2.3.0", "0" * 64)
        for name, values in order:
            file = file.with_larger(
                name, (("1" * 64, 0.3),) if name != "base" else (), dict(zip("ab", values, strict=True))
            )
        return file

    file = added(found)
    assert file.largest == {
        name: {each: max(values[k] for other, values in found if other == name) for k, each in enumerate("ab")}
        for name, _ in found
    }
    assert of(file.dump(), caches) == file
    draw.shuffle(found)
    assert added(found).dump() == file.dump()


def test_scales_are_of_all_transformers_with_the_same_loras(tmp_path: Path) -> None:
    """Recorded under another name, as of a bake by the other rule."""
    loras, file = (("1" * 64, 0.5),), ActivationsFile("2.3.0", "0" * 64)
    for name, values in (("a", (448.0, 1.0)), ("b", (1.0, 896.0))):
        file = file.with_larger(name, loras, dict(zip("xy", values, strict=True)))
    (tmp_path / "a.safetensors").write_bytes(file.dump())
    assert calibrated(tmp_path / "a.safetensors", loras, file.base, ["x", "y"], "next").scales == (1.0, 2.0)


def test_a_fp8_bake_takes_its_scales_from_the_file(overlay: Path, first: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(first)
    flags = ("--format", "fp8", "--keep-blocks", "none", "--activations", path)
    done = ltxpack("bake-lora", overlay, "--strength", "0.5", *flags)
    assert f"calibrated by {path.name}" in done.stdout, done.stderr
    (shard,) = (overlay / "bakes" / FP8).glob("*.safetensors")
    stored, largest = load_file(shard), load_file(path)
    for linear in LINEARS:
        scale, least = stored[f"{linear}.input_scale"].item(), largest[f"{BAKE}:{linear}"].item() / 448
        assert least <= scale < 2 * least and math.frexp(scale)[0] == 0.5, linear
