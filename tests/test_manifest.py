"""The manifest: there and back, and what a hand that edited it could try."""

from __future__ import annotations

import functools
import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltxpack import manifest as manifest_module
from ltxpack.errors import OverlayError
from ltxpack.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Bake,
    BakedLora,
    Calibration,
    Component,
    FileRecord,
    Lora,
    Manifest,
    Source,
    SourceFile,
    checked_bytes,
    parse_manifest,
    read_manifest,
    safe_relative_path,
)

HASH = "ab" * 32


def manifest() -> Manifest:
    vae = (FileRecord("vae/config.json", 3, HASH),)
    link = (FileRecord("bakes/distilled-0.5/a.safetensors", 4, HASH, "../../transformer/a.safetensors"),)
    lora = (BakedLora("distilled", "d.safetensors", 9, HASH, 0.5, None),)
    return Manifest(
        model_version="2.3.0",
        image_crf=33,
        licence="none",
        source=Source("Lightricks/LTX-2.3", "abc", (SourceFile("checkpoint", "dev.safetensors", 5, HASH, "dev"),)),
        components={"vae": Component("diffusers", "AutoencoderKLLTX2Video", vae, ("x",))},
        loras=(Lora("distilled", FileRecord("loras/d.safetensors", 9, HASH, "hard")),),
        files=(FileRecord("model_index.json", 2, HASH),),
        bakes={"distilled-0.5": Bake(lora, "fp32", "fp32", "cpu", link, ("proj_in.weight",))},
    )


def document() -> dict[str, Any]:
    return json.loads(manifest().dump())


def edited(place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """The document with ``value`` at ``place``."""
    found = document()
    node: Any = functools.reduce(lambda node, part: node[part], place[:-1], found)
    node[place[-1]] = value
    return found


def refused(text: str, tmp_path: Path) -> str:
    with pytest.raises(OverlayError) as caught:
        parse_manifest(text.encode(), tmp_path / MANIFEST_NAME)
    return str(caught.value)


def test_there_and_back(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(manifest().dump())
    assert read_manifest(tmp_path) == manifest()
    assert read_manifest(tmp_path).dump() == manifest().dump()


def test_the_kind_of_transformer_is_the_manifests_else_that_of_the_files_name() -> None:
    earlier = manifest()
    assert "transformer_kind" not in document() and not earlier.distilled
    bases = [SourceFile("checkpoint", name, 5) for name in ("x-distilled.safetensors", "x.safetensors")]
    named, unnamed = (replace(earlier, source=replace(earlier.source, files=(base,))) for base in bases)
    assert (named.distilled, unnamed.distilled) == (True, False)
    for one, kind in ((named, "full"), (unnamed, "distilled")):
        stated = replace(one, transformer_kind=kind)
        assert stated.distilled == (kind == "distilled")
        assert parse_manifest(stated.dump(), Path(MANIFEST_NAME)) == stated


def test_a_quantised_bake_states_its_form_and_a_plain_one_nothing_new(tmp_path: Path) -> None:
    plain = manifest().bakes["distilled-0.5"]
    one = replace(plain, format="fp8", quantised=("blocks.1.to_q",), calibration=Calibration("a", HASH, (0.5,)))
    stated = manifest().with_bake("distilled-0.5", one)
    assert parse_manifest(stated.dump(), Path(MANIFEST_NAME)) == stated
    for odd in (
        replace(one, calibration=Calibration("a", HASH, (0.5, 1.0))),
        replace(one, quantised=(), calibration=None),
    ):
        text = manifest().with_bake("distilled-0.5", odd).dump().decode()
        assert "do not go together" in refused(text, tmp_path)
    assert document()["bakes"]["distilled-0.5"].keys() == {"loras", "rule", "kernel", "device", "files", "changed"}


def test_no_command_writes_what_the_next_one_refuses(tmp_path: Path) -> None:
    assert checked_bytes(manifest(), tmp_path) == manifest().dump()
    one = manifest().bakes["distilled-0.5"]
    crowded = replace(one, changed=("x",) * 300_000)
    large = replace(one, changed=("x" * 1000,) * 20_000)
    odd = replace(one, device="tpu")
    for bake, told in ((crowded, "too many values"), (large, "is larger than"), (odd, "does not fit its schema")):
        with pytest.raises(OverlayError, match=f"that ltxpack cannot read: it .*{told}"):
            checked_bytes(manifest().with_bake("distilled-0.5", bake), tmp_path)


@pytest.mark.parametrize("method", ["stat", "read_bytes"])
def test_a_manifest_that_may_not_be_read_is_no_broken_one(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = tmp_path / "my overlay"
    overlay.mkdir()
    path = overlay / MANIFEST_NAME
    path.write_bytes(manifest().dump())
    real = getattr(Path, method)

    def refuse(self: Path, **options: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, **options)

    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(OverlayError) as caught:
        read_manifest(overlay)
    assert str(caught.value) == f"{path}: cannot be read: Permission denied\n  next: ls -ld '{overlay}' '{path}'"


def test_a_missing_or_broken_manifest_is_made_anew_by_a_command_that_can_be_typed(tmp_path: Path) -> None:
    overlay = tmp_path / "my overlay"
    path = overlay / MANIFEST_NAME
    remake = ["ltxpack", "materialize", "SOURCE", str(overlay)]

    def command(told: str = "") -> list[str]:
        with pytest.raises(OverlayError, match=told or None) as caught:
            read_manifest(overlay)
        return shlex.split(caught.value.next)

    assert command("is not an overlay") == remake
    path.mkdir(parents=True)
    assert command() == remake
    path.rmdir()
    for text in ("{", json.dumps({**document(), "format": 2}), "{}"):
        path.write_text(text)
        assert command() == [*remake, "--force"]
    os.truncate(path, MAX_MANIFEST_BYTES + 1)
    assert command() == [*remake, "--force"]


RECORD = {"path": "a.json", "size": 3, "blake3": HASH, "link": None}
FILE, LINK = ("components", "vae", "files", 0, "path"), ("bakes", "distilled-0.5", "files", 0, "link")
REFUSED: list[tuple[tuple[str | int, ...], Any, str]] = [
    *((FILE, path, "an overlay may not hold") for path in (
        "/etc/p.json", "../x.json", "vae/../../x.json", "vae/x.py", "vae//x.json", "a\\b.json", "vae/\u202ex.json"
    )),
    *((LINK, link, "leaves the overlay") for link in ("/etc/passwd", "../../../x.safetensors", "../../../../x")),
    *((("bakes",), {name: document()["bakes"]["distilled-0.5"]}, "schema") for name in ("base", "..", "a/b", "")),
    (("files",), [RECORD | {"path": "vae/config.json"}], "names a file twice"),
    (("files",), [RECORD] * 20_000, "too many values"),
    (("format",), 2, "another version of ltxpack"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value", "told"), REFUSED, ids=lambda value: ascii(value)[:40])
def test_what_an_overlay_may_not_say(place: tuple[str | int, ...], value: Any, told: str, tmp_path: Path) -> None:
    """Paths and links out of it, names of bakes, files named twice, more files than any has, another format."""
    assert told in refused(json.dumps(edited(place, value)), tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "format": 1}', "[" * 100_000, '{"a": NaN}', "\x00"]
)
def test_json_that_is_no_manifest(text: str, tmp_path: Path) -> None:
    refused(text, tmp_path)


@pytest.mark.parametrize("strength", ["NaN", "Infinity", "1e999", "1" * 4001])
def test_numbers_that_are_none(strength: str, tmp_path: Path) -> None:
    text = json.dumps(document())
    assert "not sound JSON" in refused(text.replace('"strength": 0.5', f'"strength": {strength}'), tmp_path)


def test_a_manifest_that_is_read_again_is_not_validated_again() -> None:
    other = replace(manifest(), image_crf=31)
    with mock.patch.object(manifest_module, "_validator", wraps=manifest_module._validator) as validator:
        found = [parse_manifest(bytes(bytearray(one.dump())), Path(MANIFEST_NAME)) for one in (other, other)]
    assert found == [other, other] and validator.call_count == 1


COUNTS = (("image_crf",), ("source", "max_shard_size"), ("source", "files", 0, "size"), ("files", 0, "size"))


@pytest.mark.parametrize("place", COUNTS)
def test_a_number_of_bytes_is_an_integer(place: tuple[str | int, ...], tmp_path: Path) -> None:
    """JSON Schema takes 5.0 for an integer; what counts bytes with it would not."""
    told = f"does not fit its schema at {'/'.join(map(str, place))}: 5.0 is not of type"
    assert told in refused(json.dumps(edited(place, 5.0)), tmp_path)


@given(st.text(max_size=40))
def test_safe_paths_stay_inside(path: str) -> None:
    if safe_relative_path(path):
        inside = Path("/overlay") / path
        assert inside.is_relative_to("/overlay")
        assert ".." not in inside.parts
