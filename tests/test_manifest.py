"""The manifest: there and back, and what a hand that edited it could try."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltxpack.errors import OverlayError
from ltxpack.manifest import (
    MANIFEST_NAME,
    Bake,
    BakedLora,
    Component,
    FileRecord,
    Lora,
    Manifest,
    Source,
    SourceFile,
    parse_manifest,
    read_manifest,
    safe_relative_path,
)

HASH = "ab" * 32


def manifest() -> Manifest:
    return Manifest(
        model_version="2.3.0",
        image_crf=33,
        licence="none",
        source=Source("Lightricks/LTX-2.3", "abc", (SourceFile("checkpoint", "dev.safetensors", 5, HASH, "dev"),)),
        components={
            "vae": Component("diffusers", "AutoencoderKLLTX2Video", (FileRecord("vae/config.json", 3, HASH),), ("x",))
        },
        loras=(Lora("distilled", FileRecord("loras/d.safetensors", 9, HASH, "hard")),),
        files=(FileRecord("model_index.json", 2, HASH),),
        bakes={
            "distilled-0.5": Bake(
                loras=(BakedLora("distilled", "d.safetensors", 9, HASH, 0.5, None),),
                rule="fp32",
                kernel="fp32",
                device="cpu",
                files=(FileRecord("bakes/distilled-0.5/a.safetensors", 4, HASH, "../../transformer/a.safetensors"),),
                changed=("proj_in.weight",),
            )
        },
    )


def document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(manifest().dump())
    return found


def refused(text: str, tmp_path: Path) -> str:
    with pytest.raises(OverlayError) as caught:
        parse_manifest(text, tmp_path / MANIFEST_NAME)
    return str(caught.value)


def test_there_and_back(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(manifest().dump())
    assert read_manifest(tmp_path) == manifest()
    assert read_manifest(tmp_path).dump() == manifest().dump()


def test_a_folder_without_one_is_no_overlay(tmp_path: Path) -> None:
    with pytest.raises(OverlayError, match="is not an overlay"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd.json",
        "../x.json",
        "vae/../../x.json",
        "vae/config.py",
        "vae//x.json",
        "a\\b.json",
        "vae/\u202ex.json",
    ],
)
def test_paths_an_overlay_may_not_hold(path: str, tmp_path: Path) -> None:
    edited = document()
    edited["components"]["vae"]["files"][0]["path"] = path
    assert "an overlay may not hold" in refused(json.dumps(edited), tmp_path)


@pytest.mark.parametrize("link", ["/etc/passwd", "../../../x.safetensors", "../../../../x"])
def test_links_that_leave_the_overlay(link: str, tmp_path: Path) -> None:
    edited = document()
    edited["bakes"]["distilled-0.5"]["files"][0]["link"] = link
    assert "leaves the overlay" in refused(json.dumps(edited), tmp_path)


def test_one_file_named_twice(tmp_path: Path) -> None:
    edited = document()
    edited["files"].append({"path": "vae/config.json", "size": 3, "blake3": HASH, "link": None})
    assert "twice" in refused(json.dumps(edited), tmp_path)


@pytest.mark.parametrize("name", ["base", "..", "a/b", ""])
def test_names_a_bake_may_not_have(name: str, tmp_path: Path) -> None:
    edited = document()
    edited["bakes"] = {name: edited["bakes"]["distilled-0.5"]}
    assert "schema" in refused(json.dumps(edited), tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "format": 1}', "[" * 100_000, '{"a": NaN}', "\x00"],
)
def test_json_that_is_no_manifest(text: str, tmp_path: Path) -> None:
    refused(text, tmp_path)


@pytest.mark.parametrize("strength", ["NaN", "Infinity", "1e999", "1" * 4001])
def test_numbers_that_are_none(strength: str, tmp_path: Path) -> None:
    text = json.dumps(document()).replace('"strength": 0.5', f'"strength": {strength}')
    assert strength in text
    assert "not sound JSON" in refused(text, tmp_path)


@pytest.mark.parametrize("text", ["[" + "[]," * 5_000_000 + "[]]", '{"format": [' + "1," * 5_000_000 + "1]}"])
def test_a_hostile_manifest_is_refused_in_a_second_and_a_short_message(text: str, tmp_path: Path) -> None:
    begin = time.process_time()
    assert len(refused(text, tmp_path)) < 1000
    assert time.process_time() - begin < 1


def test_another_format_is_told_as_such(tmp_path: Path) -> None:
    assert "another version of ltxpack" in refused(json.dumps({**document(), "format": 2}), tmp_path)


@given(st.text(max_size=40))
def test_safe_paths_stay_inside(path: str) -> None:
    if safe_relative_path(path):
        inside = Path("/overlay") / path
        assert inside.is_relative_to("/overlay")
        assert ".." not in inside.parts


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)
    )
)
def test_any_json_is_a_manifest_or_a_clear_error(value: Any) -> None:
    edited = {**document(), "source": value}
    try:
        parse_manifest(json.dumps(edited), Path("out") / MANIFEST_NAME)
    except OverlayError as error:
        assert "ltxpack materialize" in str(error)
