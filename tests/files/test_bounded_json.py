"""JSON from outside is counted before it is parsed, wherever it is read; real files have plenty of room."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ltxpack.errors import FormatError, LtxpackError
from ltxpack.files.bounded_json import JsonFault, Limits, parse
from ltxpack.files.tensorfile import read_index, read_json, read_tensorfile
from ltxpack.manifest import MANIFEST_NAME, read_manifest
from ltxpack.materialize.access import Access, InputFile, local_file
from ltxpack.reporter import SilentReporter
from ltxpack.runtime.weights import load


def read_config(path: Path) -> Any:
    """A library's config, as an input is read."""
    return Access(SilentReporter()).json(local_file(path))


READERS: dict[str, Callable[[Path], object]] = {
    "json": read_json,
    "index": read_index,
    "config": read_config,
    "header": read_tensorfile,
    "config.json": lambda path: load.read_config(path.parent, "X"),
    "x.safetensors.index.json": lambda path: load.read_headers(path.parent),
    MANIFEST_NAME: lambda path: read_manifest(path.parent),
}
CROWDED = {
    "lists": b"[" + b"[]," * 200_000 + b"[]]",
    "objects": b"[" + b"{}," * 200_000 + b"{}]",
    "numbers": b'{"weight_map":[' + b"1," * 500_000 + b"1]}",
    "deep": b"[" * 200_000,
    "pairs": b"{" + b",".join(b'"%d":1' % number for number in range(500_000)) + b"}",
}


@pytest.fixture
def no_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever parses has failed."""
    for name in ("loads", "load"):
        monkeypatch.setattr(json, name, mock.Mock(side_effect=AssertionError("it was parsed before it was counted")))


@pytest.mark.usefixtures("no_parser")
@pytest.mark.parametrize("crowd", CROWDED)
@pytest.mark.parametrize("name", READERS)
def test_too_many_values_are_counted_not_parsed(name: str, crowd: str, tmp_path: Path) -> None:
    path, text = tmp_path / name, CROWDED[crowd]
    path.write_bytes(len(text).to_bytes(8, "little") + text if name == "header" else text)
    with pytest.raises(LtxpackError, match="has too many values to be sound") as caught:
        READERS[name](path)
    assert str(caught.value).startswith(f"{path}: ")


@contextlib.contextmanager
def in_a_megabyte() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("no_parser")
@pytest.mark.parametrize("name", READERS)
def test_a_file_too_large_is_refused_by_its_size(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.write((1 << 40).to_bytes(8, "little"))
        file.truncate(1 << 34)
    with in_a_megabyte(), pytest.raises(LtxpackError, match="at most 16777216 bytes"):
        READERS[name](path)


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    """Not a buffer as large as the largest file that would be taken."""
    path = tmp_path / "x.json"
    path.write_text('{"weight_map": {"a": "x.safetensors"}}')
    read_index(path)
    with in_a_megabyte():
        read_index(path), read_json(path), read_config(path)


def test_what_a_string_hides_is_counted_where_it_is_parsed() -> None:
    """A checkpoint's metadata holds JSON in a string of the header's JSON, where a comma may be written as \\u002c."""
    text = json.dumps({"config": "[" + "1," * 500_000 + "1]"}).replace(",", "\\u002c")
    config = parse(text.encode())["config"]
    with pytest.raises(JsonFault, match="too many values"):
        parse(config.encode())


def test_the_limits_are_those_given() -> None:
    assert parse(b"[1,2,[3]]", Limits(values=2, containers=2)) == [1, 2, [3]]
    for text in (b"[1,2,3,4]", b"[[[1]]]", b'[{"a":{}}]'):
        with pytest.raises(JsonFault, match="more than 2, or 2 lists and objects"):
            parse(text, Limits(values=2, containers=2))


def test_real_files_leave_room(tmp_path: Path) -> None:
    """An index of 50,000 tensors; a tokenizer's configuration with three times the added tokens of Gemma 3."""
    path = tmp_path / "x.json"
    names = [f"model.diffusion_model.transformer_blocks.{n}.audio_to_video_attn.to_out.0.weight" for n in range(50_000)]
    path.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00009.safetensors")}, indent=2))
    assert list(read_index(path)) == names
    token = {"content": "<unused, [99]>", "lstrip": False, "normalized": False, "rstrip": False, "special": True}
    path.write_text(json.dumps({"added_tokens_decoder": {str(n): token for n in range(20_000)}}, indent=2))
    assert len(read_config(path)["added_tokens_decoder"]) == 20_000


def test_a_librarys_config_may_hold_any_number(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"model_max_length": 10**30, "x": float("inf")}))
    assert read_config(path) == {"model_max_length": 10**30, "x": float("inf")}
    for text in ('{"a": 1, "a": 2}', "[" * 100 + "]" * 100, '"\\ud800"', '{"a": %s}' % ("9" * 5000)):
        path.write_text(text)
        with pytest.raises(FormatError):
            read_config(path)


def test_a_config_too_large_is_not_even_fetched() -> None:
    access = Access(SilentReporter(), hub=None)
    access.fetch = None  # type: ignore[method-assign]
    for read in (access.json, access.index):
        with pytest.raises(FormatError, match="is too large"):
            read(InputFile("config.json", 1 << 30, None, Path("config.json"), None, "config.json"))
