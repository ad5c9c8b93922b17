"""Strengths and LoRAs as people write them for other tools: each told with the command to type, which then works."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_support import STYLE, make_overlay, official_keys, save
from support import ltxpack, refused

from ltxpack.cli.lora_words import _meant, _taken_apart


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an overlay ``out`` and two LoRAs, one with a number behind its name. Nothing is written there."""
    folder = tmp_path_factory.mktemp("place")
    make_overlay(folder / "out")
    for name in ("style.safetensors", "my style.safetensors", "odd=0.5"):
        save(folder / name, official_keys(STYLE))
    return folder


DISTILLED, STACKED = "distilled-0.5", "distilled-0.5+style-0.8"


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("--strength 0.25 0.5", ["distilled-0.25", DISTILLED]),
        ("out --strength 0.25 0.5 1", ["distilled-0.25", DISTILLED, "distilled-1"]),
        ("--strength 0.25,0.5", ["distilled-0.25", DISTILLED]),
        ("--strength '0.25, 0.5'", ["distilled-0.25", DISTILLED]),
        ("--strength '[0.25 0.5]'", ["distilled-0.25", DISTILLED]),
        ("out 0.5", [DISTILLED]),
        ("--strength 0,5", [DISTILLED]),
        ("--strength=0,5", [DISTILLED]),
        ("--strength 50%", [DISTILLED]),
        ("--strength '50 %'", [DISTILLED]),
        ("--strength -12,5%", ["distilled--0.125"]),
        ("--strength 0.5 -0.25", [DISTILLED, "distilled--0.25"]),
        ("--strength 0.5 --add style.safetensors:0.8", [STACKED]),
        ("--strength 0.5 --add style.safetensors:0.8@0-1:0.5", [f"{STACKED}_0-1at0.5"]),
        ("--strength 0.5 --add style.safetensors=0,8", [STACKED]),
        ("--strength 0.5 --add style.safetensors=80%", [STACKED]),
        ("--strength 0.5 --add 'style.safetensors = 80%'", [STACKED]),
        ("--strength 0.5 --add 'style.safetensors 0.8'", [STACKED]),
        ("--strength 0.5 --add style.safetensors 0.8", [STACKED]),
        ("--add style.safetensors 0.8 --strength 0.5", [STACKED]),
        ("--add style.safetensors 0.8", ["distilled-0+style-0.8"]),
        ("--add style.safetensors=0.8 0.5", [STACKED]),
        ("--strength 0.5 --add style.safetensors", ["distilled-0.5+style-1"]),
        ("--strength 0.5 --add 'my style.safetensors:0,8'", ["distilled-0.5+my-style-0.8"]),
        ("--strength 0.5 --add odd=0.5", ["distilled-0.5+odd-0-1"]),
        ("--lora style.safetensors:0.8", ["style-0.8"]),
        ("--lora style.safetensors:0.8@0:0.5@2:1", ["style-0.8_0at0.5_2at1"]),
        ("--lora style.safetensors=80% --strength 0,5", ["style-0.5"]),
        ("--lora style.safetensors 0.8", ["style-0.8"]),
        ("", ["distilled-1"]),
        ("--lora style.safetensors", ["style-1"]),
        ("--add style.safetensors=0.8", ["distilled-0+style-0.8"]),
    ],
)  # fmt: skip
def test_what_to_type_is_told_and_works(written: str, names: list[str], place: Path) -> None:
    words = [*shlex.split(written), "--plan", "--json"]
    message = refused(ltxpack("bake-lora", *words, cwd=place), 2)
    told = shlex.split(message.partition("next: ")[2])
    done = ltxpack(*told[1:], cwd=place)
    assert done.returncode == 0, done.stderr
    planned = dict.fromkeys(file["path"].split("/")[1] for file in json.loads(done.stdout)["files"])
    assert list(planned) == names


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("--strength 0.25 --strength 0.5", "--strength 0.25"),
        ("--strength 0,5", "--strength 0.5"),
        ("--strength 0.5 --add style.safetensors:80%", "--strength 0.5 --add style.safetensors=0.8"),
    ],
)
def test_an_export_is_told_the_same(written: str, wanted: str, place: Path) -> None:
    message = refused(ltxpack("export", "out", "-o", "x.safetensors", *shlex.split(written), cwd=place), 2)
    assert message.endswith(f"next: ltxpack export out -o x.safetensors {wanted}\n")


def test_what_is_there_as_typed_is_no_number_and_no_strength(place: Path) -> None:
    make_overlay(place / "0.5")
    done = ltxpack("bake-lora", "0.5", "--strength", "1", "--add", "odd=0.5=.8", "--plan", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"][0]["path"].startswith("bakes/distilled-1+odd-0-0.8/")


@pytest.mark.parametrize("written", ["--strength half", "--strength 0.5 --add style.safetensors=half",
                                     "--strength 1,2,3,", "--strength 0.5 --add =0.5"])  # fmt: skip
def test_what_is_no_number_at_all_is_refused(written: str, place: Path) -> None:
    refused(ltxpack("bake-lora", "out", *shlex.split(written), cwd=place), 2)


WORDS = st.lists(
    st.one_of(
        st.sampled_from(["--strength", "--add", "--lora", "--strength=0,5", "--add=a:1", "--plan", "out", "--", "-o"]),
        st.text("0123456789.,:=@%- eab", max_size=8),
    ),
    max_size=8,
)


@given(WORDS)
def test_what_is_told_is_not_told_again(words: list[str]) -> None:
    """Whatever is typed: the corrected words need no correction, and are words."""
    valued = {"--strength", "--add", "--lora", "-o"}
    meant = _meant(list(_taken_apart(words, valued)))
    typed = [part for word in meant for part in word if part is not None]
    assert _meant(list(_taken_apart(typed, valued))) == meant
