"""Headers: round trips, the safetensors library as oracle, and everything hostile refused quickly."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import Mount, in_fresh_process

from ltxpack.errors import FormatError, SourceError
from ltxpack.files import tensorfile
from ltxpack.files.tensorfile import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    build_header,
    parse_header,
    read_index,
    read_json,
    read_tensorfile,
    tensor_nbytes,
)

WHOLE_BYTE = [dtype for dtype, bits in DTYPE_BITS.items() if bits % 8 == 0]


def blob(header: str | bytes | dict[str, Any], data: bytes = b"") -> bytes:
    """A file with this header, sound or not."""
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw + data


def parse(data: bytes) -> tensorfile.TensorFile:
    return parse_header(data, len(data), "x.safetensors")


def entry(dtype: str = "U8", shape: Any = (1,), offsets: Any = (0, 1)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


names = st.text(
    st.characters(codec="utf-8", categories=("L", "N", "P", "S"), exclude_characters="/\\."), min_size=1, max_size=20
)
described = st.lists(
    st.tuples(names, st.sampled_from(WHOLE_BYTE), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
    unique_by=lambda item: item[0],
    max_size=8,
).filter(lambda items: all(name != "__metadata__" for name, _, _ in items))
metadata = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=10), st.text(max_size=10), max_size=3)


@given(described, metadata)
def test_built_headers_are_read_back_by_us_and_by_the_library(
    tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    metadata = {key: value.encode("utf-8", "ignore").decode() for key, value in metadata.items()}
    header = build_header(tensors, metadata)
    assert len(header) % 8 == 0
    assert header == build_header(iter(tensors), dict(reversed(metadata.items())))
    data = random.Random(0).randbytes(sum(tensor_nbytes(dtype, shape) for _, dtype, shape in tensors))
    file = parse(header + data)
    assert {info.name: (info.dtype, info.shape) for info in file.tensors.values()} == {
        name: (dtype, shape) for name, dtype, shape in tensors
    }
    assert file.metadata == metadata
    found = dict(safetensors.deserialize(header + data))
    for name, info in file.tensors.items():
        assert found[name]["shape"] == list(info.shape)
        assert bytes(found[name]["data"]) == (header + data)[info.start : info.start + info.nbytes]


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "b": torch.tensor(1.5),
        "c": torch.zeros(0, 4, dtype=torch.float16),
    }
    path, metadata = tmp_path / "m.safetensors", {"format": "pt", "config": '{"a": 1}\n'}
    save_file(tensors, path, metadata)
    file, data = read_tensorfile(path), path.read_bytes()
    assert (file.size, file.metadata) == (len(data), metadata)
    for name, tensor in tensors.items():
        info = file.tensors[name]
        assert info.shape == tuple(tensor.shape)
        assert data[info.start : info.start + info.nbytes] == bytes(tensor.flatten().view(torch.uint8).numpy())


def test_the_dtypes_are_those_of_the_library() -> None:
    for dtype, bits in DTYPE_BITS.items():
        data = blob({"a": entry(dtype, [8], [0, bits])}, bytes(bits))
        safetensors.deserialize(data)
        assert parse(data).tensors["a"].nbytes == bits


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "short": (b"\1\2\3\4\5\6\7", "found 7 bytes"),
    "length beyond the file": (b"\xff\0\0\0\0\0\0\0{}", "truncated: 253 bytes are missing"),
    "huge length": (b"\xff" * 8 + b"{}", "header of at most"),
    "not JSON": (blob("{nope"), "not sound JSON"),
    "list": (blob("[]"), "not a JSON object"),
    "byte order mark": (blob("\ufeff{}"), "not sound JSON"),
    "not UTF-8": (blob(b'{"\xff\xfe": 1}'), "not UTF-8"),
    "lone surrogate": (blob('{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'), "not UTF-8"),
    "NaN": (blob('{"a": NaN}'), "not sound JSON"),
    "duplicate tensor": (
        blob('{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},'
             ' "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"1"), "twice",
    ),
    "duplicate field": (
        blob('{"a": {"dtype": "U8", "dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}', b"1"), "twice",
    ),
    "duplicate metadata": (blob('{"__metadata__": {"a": "1", "a": "2"}}'), "twice"),
    "metadata number": (blob('{"__metadata__": {"a": 1}}'), "not an object of strings"),
    "metadata list": (blob('{"__metadata__": ["a"]}'), "not an object of strings"),
    "overlap": (blob({"a": entry(shape=[4], offsets=[0, 4]), "b": entry(shape=[4], offsets=[2, 6])}, bytes(6)),
                "overlaps another"),
    "gap": (blob({"a": entry(), "b": entry(offsets=[2, 3])}, bytes(3)), "leaves a gap"),
    "gap at the start": (blob({"a": entry(offsets=[1, 2])}, bytes(2)), "leaves a gap"),
    "backwards": (blob({"a": entry(offsets=[1, 0])}, bytes(1)), "shape and byte range differ"),
    "negative offset": (blob({"a": entry(offsets=[-1, 0])}, bytes(1)), "no sound data_offsets"),
    "negative dim": (blob({"a": entry(shape=[-1])}, bytes(1)), "not a list of sizes"),
    "two negative dims": (blob({"a": entry(shape=[-1, -1])}, bytes(1)), "not a list of sizes"),
    "bool dim": (blob({"a": entry(shape=[True])}, bytes(1)), "not a list of sizes"),
    "float dim": (blob({"a": entry(shape=[1.0])}, bytes(1)), "not a list of sizes"),
    "minus zero": (blob('{"a": {"dtype": "U8", "shape": [1], "data_offsets": [-0, 1]}}', b"1"), "no sound data_off"),
    "huge integer": (blob('{"a": {"dtype": "U8", "shape": [%s], "data_offsets": [0, 1]}}' % ("9" * 5000), b"1"),
                     "beyond 64 bits"),
    "overflow": (blob({"a": entry(shape=[2**32, 2**32, 16])}, bytes(1)), "overflows"),
    "overflow before zero": (blob({"a": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}), "overflows"),
    "unknown dtype": (blob({"a": entry("U9")}, b"1"), "unknown dtype"),
    "no dtype": (blob({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"1"), "no dtype"),
    "part of a byte": (blob({"a": entry("F4", [3])}, bytes(1)), "whole number of bytes"),
    "shape and span": (blob({"a": entry("BF16", [2], [0, 2])}, bytes(2)), "expected 4 bytes for BF16"),
    "trailing bytes": (blob({"a": entry()}, bytes(9)), "bytes after its last tensor"),
    "truncated": (blob({"a": entry(shape=[100], offsets=[0, 100])}, bytes(58)), "42 bytes are missing"),
    "empty name": (blob({"": entry()}, b"1"), "empty, too long, or has control"),
    "NUL in a name": (blob({"a\0b": entry()}, b"1"), "control characters"),
    "newline in a name": (blob({"a\nb": entry()}, b"1"), "control characters"),
    "escape in a name": (blob({"\x1b[2Ja": entry()}, b"1"), "control characters"),
    "reversed text in a name": (blob({"a\u202eb": entry()}, b"1"), "control characters"),
    "long name": (blob({"a" * 1025: entry()}, b"1"), "too long"),
    "slash": (blob({"../../etc/passwd": entry()}, b"1"), "path parts"),
    "backslash": (blob({"a\\b": entry()}, b"1"), "path parts"),
    "dots": (blob({"a..b": entry()}, b"1"), "path parts"),
    "nested": (blob('{"a":' * 65 + "1" + "}" * 65), "nested deeper"),
    "nested in an unknown field": (
        blob('{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "x": ' + "[" * 63 + "]" * 63 + "}}", b"1"),
        "nested deeper",
    ),
    "tensor that is no object": (blob('{"a": ["U8", [1], [0, 1]]}', b"1"), "not described by an object"),
    "pickle in a zip": (b"PK\x03\x04" + bytes(100), "a zip archive"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1", "git LFS pointer"),
    "web page": (b"<!DOCTYPE html><html>", "a web page"),
    "web page after a blank line": (b"\xef\xbb\xbf\n  <html>", "a web page"),
    "a server's XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document"),
    "a server's JSON": (b'{"error":"Access to model is restricted"}', 'JSON text: {"error":"Access to model'),
    "a server's word": (b"Entry not found", "plain text: Entry not found"),
    "a long text": (b"Not a model. " * 1000, "…"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(100), "a 7z archive"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "a gzip archive"),
    "tar": (b"model.safetensors" + bytes(240) + b"ustar\x0000" + bytes(600), "a tar archive"),
    "rar": (b"Rar!\x1a\x07\x01\0" + bytes(100), "a rar archive"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(100), "a GGUF file"),
    "zeros": (bytes(4096), "found zeros"),
    "random bytes": (bytes(range(128, 228)), "is not a safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_one_message(case: str, tmp_path: Path) -> None:
    data, told = HOSTILE[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        read_tensorfile(path)
    message = str(caught.value)
    assert told in message and message.startswith(str(path))
    assert len(message) < 1000 and message.replace("\n", "").isprintable()


def test_headers_made_to_be_slow_are_refused_quickly_and_in_little_memory() -> None:
    """In a process that may map 700 MB in all: each of these would cost gigabytes or minutes to a naive parser."""
    script = """
    import resource, time
    resource.setrlimit(resource.RLIMIT_AS, (700 << 20, 700 << 20))
    from ltxpack.errors import FormatError
    from ltxpack.files.tensorfile import parse_header
    M = 1 << 20
    fields = b'"dtype":"U8","shape":[0],"data_offsets":[0,0]'
    bodies = [
        b'{"a":' * 3 * M, b"[" * 16 * M, b'"' * 16 * M, b'{"a":[' + b"1," * 399_000 + b"1]}",
        b'{"a":[' + b"[]," * 149_000 + b"1]}", b'{"a":[' + b"1," * 8 * M + b"1]}",
        b"{" + b",".join(b'"%d":1' % n for n in range(399_000)) + b"}",
        b'{"a":' + b"1" * 15 * M + b"}", b'{"a":1.' + b"1" * 15 * M + b"}",
        b'{"a":"' + "\\U0001F600".encode() * 3 * M + b'"}', b'{"a":"' + b"\\\\ud83d\\\\ude00" * M + b'"}',
        b'{"a":{"dtype":"U8","shape":[0,' + b"9223372036854775807," * 300_000 + b'1],"data_offsets":[0,1]}}',
        b"{" + b",".join(b'"%d":{%s}' % (n, fields) for n in range(45_000)) + b',"a/b":{' + fields + b"}}",
        b" " * 16 * M, b'{"' + b"a" * 15 * M + b'":1}',
    ]
    for body in bodies:
        data = len(body).to_bytes(8, "little") + body
        start = time.process_time()
        try:
            parse_header(data, len(data), "x")
        except FormatError as error:
            assert len(str(error)) < 1000
        else:
            raise SystemExit(f"accepted: {body[:60]}")
        spent = time.process_time() - start
        if spent > 20:
            raise SystemExit(f"{spent:.2f} s: {body[:60]}")
    answer = None
    """
    in_fresh_process(script)


@pytest.mark.parametrize(("begin", "told"), [(b"{", "hostile"), (b"\0", "is not a safetensors file")])
def test_a_header_over_the_limit_is_refused_before_it_is_read(begin: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((100_000_000).to_bytes(8, "little") + begin)
        file.truncate(200_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=told):
            read_tensorfile(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_header_fetched_in_part_is_not_taken_for_the_whole() -> None:
    data = blob({"a": entry()}, b"1")
    assert parse_header(data[:-1], len(data), "x").tensors["a"].start == len(data) - 1
    with pytest.raises(FormatError, match="truncated"):
        parse_header(data[:20], len(data), "x")


def test_building_refuses_what_reading_would() -> None:
    for tensors in (
        [("a", "U8", (1,)), ("a", "U8", (1,))],
        [("a/b", "U8", (1,))],
        [("", "U8", (1,))],
        [("a", "U9", (1,))],
        [("a", "U8", (2**62, 4))],
        [("a", "F4", (1,))],
        [(f"{number:01000}", "U8", (1,)) for number in range(MAX_HEADER_BYTES // 1000)],
    ):
        with pytest.raises(FormatError):
            build_header(tensors, {})


def test_a_file_that_a_disk_cannot_read_is_named() -> None:
    """The first page of a process's memory is such a file."""
    with pytest.raises(SourceError, match="/proc/self/mem: cannot be read: Input/output error"):
        tensorfile.read_tensorfile("/proc/self/mem")
    with tensorfile.open_source(Path("/proc/self/mem")) as file, pytest.raises(SourceError, match="cannot be read"):
        file.read()


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "null"])
def test_what_is_no_file_is_told_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "null":
        path = Path("a\0b")
    with pytest.raises(SourceError):
        read_tensorfile(path)


INDEXES: dict[str, tuple[str, str]] = {
    "list": ("[]", "not a shard index"),
    "no weight_map": ("{}", "not a shard index"),
    "parent": ('{"weight_map": {"a": "../x.safetensors"}}', "plain .safetensors file name"),
    "absolute": ('{"weight_map": {"a": "/etc/x.safetensors"}}', "plain .safetensors file name"),
    "backslash": ('{"weight_map": {"a": "..\\\\x.safetensors"}}', "plain .safetensors file name"),
    "drive": ('{"weight_map": {"a": "c:x.safetensors"}}', "plain .safetensors file name"),
    "pickle": ('{"weight_map": {"a": "x.bin"}}', "plain .safetensors file name"),
    "number": ('{"weight_map": {"a": 1}}', "plain .safetensors file name"),
    "null character": ('{"weight_map": {"a": "x\\u0000.safetensors"}}', "plain .safetensors file name"),
    "key": ('{"weight_map": {"a/b": "x.safetensors"}}', "path parts"),
    "twice": ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "twice"),
    "deep": ('{"weight_map": ' + "[" * 100_000, "nested deeper"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_hostile_index_files_are_refused(case: str, tmp_path: Path) -> None:
    text, told = INDEXES[case]
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=told):
        read_index(path)


def test_index_and_json_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors.index.json"
    path.write_text('{"metadata": {"total_size": 12}, "weight_map": {"a": "x-1.safetensors"}}')
    assert read_index(path) == {"a": "x-1.safetensors"}
    with pytest.raises(FormatError, match="too large"):
        read_json(path, 20)
    with pytest.raises(SourceError, match="does not exist"):
        read_json(tmp_path / "none.json")


unicode = st.text(st.characters(codec="utf-8"))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | unicode,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(unicode, inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(json_values, st.booleans())
def test_sound_json_is_read_as_it_is(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert tensorfile.parse_json(text.encode(), "x") == value


def test_a_file_that_cannot_be_mapped_is_hashed(mount: Mount, tmp_path: Path) -> None:
    """As on a disk that fails: a mapping of a hole takes room, and where there is none the process gets SIGBUS."""
    mount(tmp_path / "disk", options="size=1m")
    with (tmp_path / "disk/hole").open("wb") as hole:
        hole.truncate(1_000_000)
    with pytest.raises(OSError, match="No space left"):
        (tmp_path / "disk/ballast").write_bytes(bytes(2_000_000))
    code = """
        import sys; from pathlib import Path; from ltxpack.files.reader import hash_file
        answer = hash_file(Path(sys.argv[1]), cached=True)
    """
    assert in_fresh_process(code, tmp_path / "disk/hole")[0] == blake3(bytes(1_000_000)).hexdigest()
