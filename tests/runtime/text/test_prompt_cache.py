"""Encoded prompts on disk: what comes back is what was put in, or nothing; and what it saves is the text encoder."""

from __future__ import annotations

import ast
import functools
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from support import REPOSITORY, Notes, distance
from torch import Tensor

from ltxpack.errors import LtxpackError, OverlayError, UsageError
from ltxpack.files.tensorfile import build_header, read_tensorfile
from ltxpack.ltx23.classes import TEXT_TOKENS
from ltxpack.manifest import FileRecord
from ltxpack.runtime.overlay import Overlay
from ltxpack.runtime.sampling.shape import AV
from ltxpack.runtime.text import gemma as text
from ltxpack.runtime.text import prompt_cache
from ltxpack.runtime.text.encode import PromptEncoder
from ltxpack.runtime.text.prompt_cache import PromptCache, backend, batch_key, cache_root
from ltxpack.runtime.weights.keeper import Residency

DTYPES = [torch.float32, torch.bfloat16]
CPU = torch.device("cpu")
KEY = "0" * 64


def contexts(count: int = 2, width: int = 4, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[AV[Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def made(size: int) -> Tensor:
        return torch.randn(1, TEXT_TOKENS, size, generator=generator).to(dtype)

    return [AV(made(width), made(width // 2)) for _ in range(count)]


def equal(found: list[AV[Tensor]] | None, wanted: list[AV[Tensor]]) -> bool:
    return found is not None and all(
        torch.equal(f.video, w.video) and torch.equal(f.audio, w.audio) for f, w in zip(found, wanted, strict=True)
    )


# The key


RECORDS = [FileRecord("text_encoder/model.safetensors", 3, "a" * 64), FileRecord("tokenizer/t.json", 3, "b" * 64)]


def test_the_key_is_of_everything_the_contexts_depend_on() -> None:
    changed = [*RECORDS[:1], FileRecord("tokenizer/t.json", 3, "c" * 64)]
    keys = [batch_key(prompts, RECORDS, torch.bfloat16, "cpu") for prompts in ("ab", "ba", "a", ["a b"], "aB")]
    keys += [batch_key("ab", records, torch.bfloat16, "cpu") for records in (changed, RECORDS[:1])]
    keys += [batch_key("ab", RECORDS, torch.float32, "cpu"), batch_key("ab", RECORDS, torch.bfloat16, "another card")]
    assert len(set(keys)) == len(keys)
    assert batch_key([" a\n", "b "], RECORDS[::-1], torch.bfloat16, "cpu") == keys[0], "prompts are stripped"


def test_the_key_is_of_what_computes_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> str:
        return batch_key(["a"], RECORDS, torch.float32, backend(CPU))

    keys = [key()]
    assert keys == [key()]
    monkeypatch.setattr(prompt_cache, "TEXT_VERSION", "another")
    keys.append(key())
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        keys.append(key())
    finally:
        torch.set_float32_matmul_precision(precision)
    monkeypatch.setattr(prompt_cache, "version", lambda name: f"another {name}")
    keys.append(key())
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    for number in range(2):
        monkeypatch.setattr(torch.version, "cuda", f"13.{number}")
        keys.append(batch_key(["a"], RECORDS, torch.float32, backend(card)))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    keys.append(batch_key(["a"], RECORDS, torch.float32, backend(card)))
    assert len(set(keys)) == len(keys)


# Version of the text path -> the digest of its code.
DIGESTS = {"2": "1b3efb92cac6a9f7"}
TEXT_PATH = ("runtime/text/gemma.py", "runtime/text/encode.py", "runtime/model/rope.py")


def test_the_text_path_has_a_version_of_its_own() -> None:
    """A cache filled by another text path would serve other contexts (3.19). Comments and docstrings do not count."""
    code = [code_of(ast.parse((REPOSITORY / "ltxpack" / name).read_text())) for name in TEXT_PATH]
    digest = blake3(repr(code).encode()).hexdigest()[:16]
    assert DIGESTS[prompt_cache.TEXT_VERSION] == digest, (
        f"the text path changed: if a context can differ by a bit, raise TEXT_VERSION in {prompt_cache.__file__}; "
        f"then DIGESTS here holds {{{prompt_cache.TEXT_VERSION!r}: {digest!r}}}"
    )


def code_of(node: object) -> object:
    """What ``node`` of a syntax tree says, without docstrings and what Python versions add to the tree."""
    if isinstance(node, list):
        return [code_of(each) for each in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    body = getattr(node, "body", None)
    if isinstance(body, list) and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        node.body = body[1:]  # type: ignore[attr-defined]
    fields = [(name, code_of(value)) for name, value in ast.iter_fields(node) if value not in (None, [])]
    return type(node).__name__, fields


# Put and get


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_there_and_back_to_the_bit(dtype: torch.dtype, count: int, tmp_path: Path) -> None:
    cache = PromptCache(tmp_path / "new" / "contexts")
    assert cache.get(KEY, count, dtype) is None
    wanted = contexts(count, dtype=dtype)
    cache.put(KEY, wanted)
    assert equal(cache.get(KEY, count, dtype), wanted)
    (path,) = cache.folder.iterdir()
    assert path.name == f"{KEY}.safetensors"
    file = read_tensorfile(path)
    assert list(file.tensors) == [f"{number}.{side}" for number in range(count) for side in ("video", "audio")]
    assert set(file.metadata) == {"format", "key", "blake3"}
    assert (cache.folder.stat().st_mode & 0o077) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_kept(value: float, tmp_path: Path) -> None:
    bad = contexts()
    bad[1].audio[0, 3, 1] = value
    PromptCache(tmp_path).put(KEY, bad)
    assert not list(tmp_path.iterdir())


# Damage


Layout = dict[str, tuple[str, tuple[int, ...]]]
Change = Callable[[Layout, dict[str, str], bytearray], object]
LIES: dict[str, Change] = {
    "renamed": lambda layout, metadata, body: layout.update({"2.video": layout.pop("0.video")}),
    "reshaped": lambda layout, metadata, body: layout.update({"0.video": ("BF16", (1, 2 * TEXT_TOKENS, 2))}),
    "integers": lambda layout, metadata, body: layout.update({"0.video": ("I16", layout["0.video"][1])}),
    "another key": lambda layout, metadata, body: metadata.update(key="1" * 64),
    "another format": lambda layout, metadata, body: metadata.update(format="0"),
    "not a number": lambda layout, metadata, body: body.__setitem__(slice(0, 2), b"\xff\x7f"),
}
DAMAGES: dict[str, Callable[[Path], object]] = {
    **{lie: lambda path, change=change: rewrite(path, change) for lie, change in LIES.items()},
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(8)),
    "a page": lambda path: path.write_bytes(b"<html>"),
    "JSON": lambda path: path.write_bytes(b"{}"),
    "a huge header": lambda path: path.write_bytes(b"\xff" * 4096),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


def rewrite(path: Path, change: Change) -> None:
    """Write ``path`` again with another header or content, its stated hash made to fit."""
    file = read_tensorfile(path)
    layout = {name: (info.dtype, info.shape) for name, info in file.tensors.items()}
    body = bytearray(path.read_bytes()[min(info.start for info in file.tensors.values()) :])
    metadata = dict(file.metadata)
    change(layout, metadata, body)
    listed = [(name, dtype, shape) for name, (dtype, shape) in layout.items()]
    described = json.dumps([[name, dtype, list(shape)] for name, dtype, shape in listed])
    metadata["blake3"] = blake3(described.encode()).update(body).hexdigest()
    path.write_bytes(build_header(listed, metadata) + body)


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_entry_that_is_damaged_or_says_something_else(damage: str, tmp_path: Path) -> None:
    store, path = PromptCache(tmp_path), tmp_path / f"{KEY}.safetensors"
    store.put(KEY, contexts())
    rewrite(path, lambda *_: None)
    assert equal(store.get(KEY, 2, torch.bfloat16), contexts())
    DAMAGES[damage](path)
    with pytest.raises(LtxpackError) as raised:
        store.get(KEY, 2, torch.bfloat16)
    assert raised.value.file == str(path)


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unseen(where: float, bit: int, caches: Path) -> None:
    cache = PromptCache(caches / "flipped")
    wanted = contexts(width=2)
    cache.put(KEY, wanted)
    path = cache.folder / f"{KEY}.safetensors"
    data = bytearray(path.read_bytes())
    # Half of the flips in the header, which is a fraction of the file.
    header = 8 + int.from_bytes(data[:8], "little")
    place = int(where * 2 * header) if where < 0.5 else int((where * 2 - 1) * len(data))
    data[place] ^= 1 << bit
    path.write_bytes(data)
    try:
        found = cache.get(KEY, 2, torch.bfloat16)
    except LtxpackError:
        return
    # The padding of the header is space of any kind.
    assert found is None or equal(found, wanted)


# The bound


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path)
    cache.put("a" * 64, contexts())
    size = (tmp_path / f"{'a' * 64}.safetensors").stat().st_size
    cache = PromptCache(tmp_path, limit=3 * size)
    for number, key in enumerate("bc"):
        cache.put(key * 64, contexts(seed=number))
    for age, key in enumerate("cba"):
        when = time.time() - 1000 * (age + 1)
        os.utime(tmp_path / f"{key * 64}.safetensors", (when, when))
    assert cache.get("a" * 64, 2, torch.bfloat16) is not None
    cache.put("d" * 64, contexts())
    assert {path.name[0] for path in tmp_path.iterdir()} == {"a", "c", "d"}


def test_what_is_larger_than_the_cache_is_not_kept_nor_read(tmp_path: Path) -> None:
    PromptCache(tmp_path, limit=1000).put(KEY, contexts())
    assert not list(tmp_path.iterdir())
    PromptCache(tmp_path).put(KEY, contexts())
    assert PromptCache(tmp_path, limit=0).get(KEY, 2, torch.bfloat16) is None
    assert equal(PromptCache(tmp_path, limit=10**15).get(KEY, 2, torch.bfloat16), contexts()), "more than memory"


def test_only_what_killed_processes_left_is_swept(tmp_path: Path) -> None:
    old, new = (tmp_path / f".{each * 64}.safetensors.{each}.tmp" for each in "12")
    others = [tmp_path / name for name in ("notes.txt", ".x.safetensors.1.tmp", ".y.tmp")]
    for path in (old, new, *others):
        path.write_bytes(b"x")
    for path in (old, *others):
        os.utime(path, (0, 0))
    PromptCache(tmp_path).put(KEY, contexts())
    left = {new.name, f"{KEY}.safetensors", *(path.name for path in others)}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_files_of_the_user_in_the_folder_are_never_removed(tmp_path: Path) -> None:
    """``Pipeline.from_overlay(..., cache=FOLDER)`` takes any folder, also one with models."""
    mine = [
        tmp_path / name for name in ("model.safetensors", f"{'A' * 64}.safetensors", f"{KEY}.safetensors.index.json")
    ]
    for path in mine:
        path.write_bytes(b"x" * 1_000_000)
        os.utime(path, (0, 0))
    PromptCache(tmp_path, limit=1_000_000).put(KEY, contexts())
    assert all(path.exists() for path in mine) and PromptCache(tmp_path).get(KEY, 2, torch.bfloat16) is not None


def test_several_at_once_see_whole_entries_or_none(tmp_path: Path) -> None:
    wanted = {f"{number:064}": contexts(seed=number) for number in range(6)}
    PromptCache(tmp_path).put("a" * 64, contexts())
    size = (tmp_path / f"{'a' * 64}.safetensors").stat().st_size
    cache = PromptCache(tmp_path, limit=3 * size)

    def work(turn: int) -> bool:
        key = f"{turn % 6:064}"
        found = cache.get(key, 2, torch.bfloat16)
        cache.put(key, wanted[key])
        return found is None or equal(found, wanted[key])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(120)))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 * size


# Where


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_root({"LTXPACK_CACHE": str(tmp_path), "XDG_CACHE_HOME": "/other"}) == tmp_path
    assert cache_root({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "ltxpack"
    monkeypatch.setenv("HOME", str(tmp_path))
    for environment in ({}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "relative"}, {"LTXPACK_CACHE": ""}):
        assert cache_root(environment) == tmp_path / ".cache" / "ltxpack"
    assert cache_root({"LTXPACK_CACHE": "~/kept"}) == tmp_path / "kept"
    for written, size in (("3 MB", 3_000_000), ("", 2 * 10**9), ("0", 0)):
        found = PromptCache.at(None, {"LTXPACK_CACHE": str(tmp_path), "LTXPACK_CACHE_SIZE": written})
        assert found == PromptCache(tmp_path / "contexts", size)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: path != tmp_path / "contexts")
        assert PromptCache.at(None, {"LTXPACK_CACHE": str(tmp_path)}).folder == tmp_path / "contexts"
        (tmp_path / "contexts").mkdir()  # of another user
        own = tmp_path / f"contexts-{os.geteuid()}"
        assert PromptCache.at(None, {"LTXPACK_CACHE": str(tmp_path)}).folder == own
    with pytest.raises(UsageError, match="LTXPACK_CACHE_SIZE"):
        PromptCache.at(None, {"LTXPACK_CACHE_SIZE": "much"})


# With the text encoder


def encoder(demo: Path, cache: PromptCache | None, dtype: torch.dtype = torch.float32) -> PromptEncoder:
    overlay = Overlay.open(demo / "overlay")
    return PromptEncoder(overlay, Residency(overlay, CPU, dtype), cache)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with every load of the text encoder or of the connectors."""
    seen: list[str] = []
    for name in ("load_text_encoder", "load_connectors"):
        load = getattr(text, name)
        monkeypatch.setattr(text, name, lambda *where, load=load, name=name: (seen.append(name), load(*where))[1])
    return seen


PAIR = ("a paper boat", "rain on a street")
LONG = "boat river street organ " * 400


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model reads 128 tokens of a prompt, for what does not depend on their number."""
    for reads in (text, prompt_cache):
        monkeypatch.setattr(reads, "TEXT_TOKENS", 128)


def reference(demo: Path, prompts: tuple[str, ...], dtype: torch.dtype) -> list[AV[Tensor]]:
    """The contexts straight from the text path, as the official pipeline computes them."""
    return _reference(demo, prompts, dtype, text.TEXT_TOKENS)


@functools.cache
@torch.inference_mode()
def _reference(demo: Path, prompts: tuple[str, ...], dtype: torch.dtype, tokens: int) -> list[AV[Tensor]]:
    root = demo / "overlay"
    tokenizer, gemma = (
        text.load_tokenizer(root / "tokenizer"),
        text.load_text_encoder(root / "text_encoder", CPU, dtype),
    )
    connectors = text.load_connectors(root / "connectors", CPU, dtype)
    return [text.contexts(hidden, connectors) for hidden in text.hidden_states(prompts, tokenizer, gemma)]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("dtype", DTYPES)
def test_alone_ahead_and_cached_are_the_same_bits(demo: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    batches = [PAIR, (LONG, "")]
    notes = Notes()
    cached = encoder(demo, PromptCache(tmp_path), dtype)
    plain = encoder(demo, None, dtype)
    plain.encode_ahead(batches, notes)
    for batch in batches:
        wanted = reference(demo, batch, dtype)
        assert equal(plain.contexts(batch, notes), wanted)
        assert equal(cached.contexts(batch, notes), wanted)
        assert equal(encoder(demo, PromptCache(tmp_path), dtype).contexts(batch, notes), wanted)
    assert len(list(tmp_path.iterdir())) == len(batches)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_neighbour_is_no_more_than_rounding(demo: Path, dtype: torch.dtype, bound: float) -> None:
    """On a CPU met so far it is nothing at all; no library promises that, so entries are of whole batches."""
    first, other = reference(demo, PAIR, dtype)
    assert distance(first.video, other.video) > 1e-3
    for prompts, place in ((PAIR[:1], 0), ((LONG, PAIR[0]), 1)):
        errors = reference(demo, prompts, dtype)[place].map(distance, first)
        assert max(errors.video, errors.audio) <= bound


@pytest.mark.usefixtures("short")
def test_many_prompts_are_one_load(demo: Path, loads: list[str]) -> None:
    batches = [PAIR, ("a dog", PAIR[1])]
    ahead = encoder(demo, None)
    ahead.encode_ahead([*batches, batches[0]], Notes())
    for batch in batches:
        ahead.contexts(batch, Notes())
    assert sorted(loads) == ["load_connectors", "load_text_encoder"]
    found = [ahead.contexts(batch, Notes()) for batch in batches]
    ahead.forget()
    ahead.contexts(batches[0], Notes())
    assert len(loads) == 4
    for batch, contexts in zip(batches, found, strict=True):
        assert equal(contexts, reference(demo, batch, torch.float32))


@pytest.mark.usefixtures("short")
def test_a_prompt_met_before_needs_no_text_encoder_unless_its_entry_is_damaged(
    demo: Path, loads: list[str], tmp_path: Path
) -> None:
    notes = Notes()
    wanted = encoder(demo, PromptCache(tmp_path)).contexts(PAIR, notes)
    assert equal(encoder(demo, PromptCache(tmp_path)).contexts((f" {PAIR[0]}\n", PAIR[1]), notes), wanted)
    assert loads == ["load_text_encoder", "load_connectors"] and notes.begun == ["text"]
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] + bytes(5))
    assert equal(encoder(demo, PromptCache(tmp_path)).contexts(PAIR, notes), wanted)
    assert len(loads) == 4
    assert any(str(path) in detail and "encoded again" in detail for detail in notes.details)
    assert path.read_bytes() == whole


@pytest.mark.usefixtures("short")
def test_a_cache_that_cannot_be_written_is_told_once_and_nothing_more(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    notes = Notes()
    stuck = encoder(demo, PromptCache(tmp_path / "file" / "contexts"))
    for batch in (PAIR, PAIR[::-1]):
        assert equal(stuck.contexts(batch, notes), reference(demo, batch, torch.float32))
    assert len(notes.warnings) == 1
    assert "LTXPACK_CACHE" in notes.warnings[0]


def test_a_tokenizer_that_changed_is_refused(demo: Path, tmp_path: Path) -> None:
    overlay = Path(shutil.copytree(demo / "overlay", tmp_path / "overlay", symlinks=True))
    path = overlay / "tokenizer" / "tokenizer.json"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + b" ")
    with pytest.raises(OverlayError, match=r"tokenizer\.json"):
        encoder(tmp_path, None).contexts(PAIR, Notes())
