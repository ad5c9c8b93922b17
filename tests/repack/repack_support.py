"""Small sources and plans, an overlay made from them, and a machine that dies at the n-th change of the disk."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from ltxpack.files.direct import DirectWriter
from ltxpack.files.tensorfile import DTYPE_BITS, build_header, read_tensorfile, tensor_nbytes
from ltxpack.manifest import Bake, BakedLora, Component, FileRecord, Lora, Manifest, Source, read_manifest
from ltxpack.repack.items import CopyFile, Item, LinkFile, WriteBytes, assign_shards, fingerprint, stored_tensor
from ltxpack.repack.lock import OverlayLock
from ltxpack.repack.staging import Staging, publish_bakes, recover
from ltxpack.repack.write import execute
from ltxpack.reporter import SilentReporter

SILENT = SilentReporter()


def make_source(path: Path, tensors: list[tuple[str, str, tuple[int, ...]]], seed: int = 0, pad: int = 0) -> Path:
    """A safetensors file of random bytes; ``pad`` spaces more than needed in its header, to spoil alignment."""
    header = build_header(tensors, {"format": "pt"})
    header = (len(header) - 8 + pad).to_bytes(8, "little") + header[8:] + b" " * pad
    source = random.Random(seed)
    data = bytearray()
    for _, dtype, shape in tensors:
        part = bytearray(source.randbytes(tensor_nbytes(dtype, shape)))
        if "F" in dtype:  # the high bit of the exponent stays clear, so that every float is small and finite
            width = DTYPE_BITS[dtype] // 8
            part[width - 1 :: width] = part[width - 1 :: width].translate(bytes(byte & 0xBF for byte in range(256)))
        data += part
    path.write_bytes(header + data)
    return path


def plan(source: Path) -> list[Item]:
    """Two shards with their index, a config and a LoRA that is only copied."""
    file = read_tensorfile(source / "model.safetensors")
    entries = [stored_tensor(name, info, file.path, "BF16") for name, info in file.tensors.items()]
    lora = source / "lora.safetensors"
    return [
        WriteBytes("transformer/config.json", b"{}\n"),
        *assign_shards(entries, 200, "transformer"),
        CopyFile("loras/lora.safetensors", lora, lora.stat().st_size),
    ]


def manifest_of(records: tuple[FileRecord, ...]) -> Manifest:
    """The manifest of what ``plan`` makes."""
    inside = tuple(record for record in records if record.path.startswith("transformer/"))
    loras = tuple(Lora(Path(record.path).stem, record) for record in records if record.path.startswith("loras/"))
    component = Component("diffusers", "LTX2VideoTransformer3DModel", inside)
    return Manifest("2.3.0", 33, None, Source(None, None, ()), {"transformer": component}, loras, ())


def materialize(
    source: Path, overlay: Path, reporter: SilentReporter | None = None, *, force: bool = False, copy: bool = False
) -> Manifest:
    """What the command does with this room: execute the plan in a staging folder and publish it."""
    items = plan(source)
    reporter = reporter or SILENT
    with OverlayLock(overlay, reporter) as lock:
        recover(overlay, reporter)
        with Staging(lock, fingerprint(items), reporter, force=force) as staging:
            records = execute(items, staging, copy=copy, reporter=reporter)
            manifest = manifest_of(records)
            staging.publish(manifest)
    return manifest


def bake_items(name: str, base: Manifest, content: bytes) -> list[Item]:
    last = next(record for record in base.components["transformer"].files if "-00002-of" in record.path)
    folder = f"bakes/{name}"
    return [
        WriteBytes(f"{folder}/config.json", content),
        LinkFile(f"{folder}/{Path(last.path).name}", last.size, last.blake3, f"../../{last.path}"),
    ]


def bake(overlay: Path, names: tuple[str, ...], content: bytes, force: bool = False) -> None:
    """What bake-lora does with this room."""
    lora = BakedLora("lora", "lora.safetensors", 1, "0" * 64, 1.0, 1.0)
    with OverlayLock(overlay) as lock:
        recover(overlay, SILENT)
        manifest = read_manifest(overlay)
        digest = blake3(content).hexdigest()
        if all(name in manifest.bakes and manifest.bakes[name].files[0].blake3 == digest for name in names):
            return  # the same is there already
        plans = {name: bake_items(name, manifest, content) for name in names}
        with contextlib.ExitStack() as stack:
            stagings = [
                stack.enter_context(Staging(lock, fingerprint(items), SILENT, folder=f"bakes/{name}", force=force))
                for name, items in plans.items()
            ]
            for staging, (name, items) in zip(stagings, plans.items(), strict=True):
                records = execute(items, staging, copy=False, reporter=SILENT)
                manifest = manifest.with_bake(name, Bake((lora,), "fp32", "x", "cpu", records, ("a",)))
            publish_bakes(stagings, manifest)


class Dead(BaseException):
    """The machine is off."""


CHANGES = ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "link", "symlink", "ftruncate", "open")


@contextlib.contextmanager
def dying_at(change: int) -> Iterator[Callable[[], int]]:
    """Inside, the ``change``-th change of the disk and every later one does not happen: Dead is raised.

    Yields a function that says how many changes there were. Locks are given up, as the system does for the dead.
    """
    count = 0
    locks: list[int] = []
    patch = pytest.MonkeyPatch()

    def counted(function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if function is not real_open or args[1] & os.O_CREAT:
                count += 1
                if count >= change:
                    raise Dead
            result = function(*args, **kwargs)
            if function is real_open and (str(args[0]).endswith(".lock") or args[1] & os.O_DIRECTORY):
                locks.append(result)
            return result

        return wrapper

    real_open = os.open
    for name in CHANGES:
        patch.setattr(os, name, counted(getattr(os, name)))
    patch.setattr(DirectWriter, "append", counted(DirectWriter.append))
    try:
        yield lambda: count
    finally:
        patch.undo()
        for fd in locks:
            with contextlib.suppress(OSError):
                os.close(fd)
