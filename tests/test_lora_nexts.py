"""Every ``next`` of bake-lora and export is typed as it stands, and the command then goes further."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import Done, ltxpack, refused

from ltxpack.ltx23.classes import DISTILLED
from ltxpack.manifest import MANIFEST_NAME, read_manifest

BAKE = ("bake-lora", "overlay", "--plan")
EXPORT = ("export", "overlay", "-o", "x.safetensors", "--plan")
HALF = ("--strength", "0.5")


@pytest.fixture
def place(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with ``overlay``, ``style.safetensors`` and ``foreign.safetensors``, which has a target too many."""
    folder = overlay.parent
    own = load_file(next((overlay / "loras").iterdir()))
    style = {name: tensor for name, tensor in own.items() if ".attn1." in name}
    save_file(style, folder / "style.safetensors")
    others = {f"diffusion_model.nowhere.lora_{ab}.weight": torch.ones(2, 2) for ab in "AB"}
    save_file({**style, **others}, folder / "foreign.safetensors")
    monkeypatch.chdir(folder)
    return folder


def followed(words: tuple[str, ...], message: str, filled: dict[str, str]) -> Done:
    """The result of the command that ``next`` of ``message`` says; ``filled``: its placeholders."""
    advice = message.partition("next: ")[2].strip()
    if found := re.match(r"the same command with (--.*?)(?: leaves|, and|\Z)", advice):
        return ltxpack(*words, *(filled.get(word, word) for word in shlex.split(found[1])))
    if found := re.match(r"choose (?:another )?-o( \S+\Z)?", advice):
        return ltxpack(*words, "-o", found[1].strip() if found[1] else "another.safetensors")
    assert advice.startswith("ltxpack "), advice
    told = [filled.get(word, word) for word in shlex.split(advice.partition(" (")[0])[1:]]
    return ltxpack(*told, *([] if "--plan" in told else ["--plan"]))


def recorded(**changes: object) -> Callable[[Path], None]:
    """Makes the overlay's manifest say ``changes``."""

    def change(place: Path) -> None:
        path = place / "overlay" / MANIFEST_NAME
        manifest = dataclasses.replace(read_manifest(path.parent), **changes)
        path.unlink()
        path.write_bytes(manifest.dump())

    return change


distilled_base, without_lora = recorded(transformer_kind="distilled"), recorded(loras=())


def called_distilled(place: Path) -> None:
    (place / "style.safetensors").rename(place / f"{DISTILLED}.safetensors")


def written(place: Path) -> None:
    (place / "x.safetensors").write_bytes(b"there")


NO_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize("command", [BAKE, EXPORT], ids=["bake-lora", "export"])
@pytest.mark.parametrize(
    ("words", "status", "before"),
    [
        ((*HALF, "--keep-blocks", "0"), 2, None),
        ((*HALF, "--format", "fp8", "--keep-blocks", "0,99"), 2, None),
        (("--strength", "0.5@1-99:0"), 2, None),
        ((*HALF, "--add", "style.safetensors=1@99:0.5"), 2, None),
        ((*HALF, "--add", "style.safetensors"), 2, None),
        ((*HALF, "--add", "foreign.safetensors=1"), 1, None),
        ((*HALF, "--lora", "foreign.safetensors"), 1, None),
        pytest.param((*HALF, "--device", "cuda"), 1, None, marks=NO_CARD),
        (HALF, 1, distilled_base),
        (HALF, 1, without_lora),
        (("--strength", "0.5", "--add", "style.safetensors=1"), 1, without_lora),
    ],
)  # fmt: skip
def test_of_what_both_make(
    command: tuple[str, ...], words: tuple[str, ...], status: int, before: Callable[[Path], None] | None, place: Path
) -> None:
    if before is not None:
        before(place)
    if "cuda" in words and command == EXPORT:
        command = command[:-1]  # a plan needs no card
    message = refused(ltxpack(*command, *words), status)
    done = followed((*command, *words), message, {"FILE": "style.safetensors"})
    assert done.returncode == 0, message + done.stderr


@pytest.mark.parametrize(
    ("words", "before"),
    [
        ((*BAKE, *HALF, "--rule", "official"), None),
        ((*BAKE, *HALF, "--lora", "distilled.safetensors"), called_distilled),
        ((*EXPORT, "--bake", "distilled-0.50"), None),
        ((*EXPORT[:-1], "--bake", "distilled-0.5"), written),
        (("export", "overlay", "-o", "x.txt", "--bake", "distilled-0.5"), None),
        (("export", "overlay", "-o", "overlay/x.safetensors", "--bake", "distilled-0.5"), None),
        (("bake-lora", "nowhere", *HALF), None),
    ],
)
def test_of_each_alone(words: tuple[str, ...], before: Callable[[Path], None] | None, place: Path, demo: Path) -> None:
    if before is not None:
        before(place)
    message = refused(ltxpack(*words), 2 if words[0] == "export" or "distilled.safetensors" in words else 1)
    done = followed(words, message, {"NAME": "mine", "SOURCE": str(demo / "source")})
    assert done.returncode == 0, message + done.stderr
