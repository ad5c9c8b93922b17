"""The contexts of prompts kept on disk by content, so that prompts met before need no text encoder.

Knows neither pipeline nor model: a key in, tensors out. One entry is what one batch of prompts became (officially the
prompt and its negative, encoded together): kept together, so that a cached result is the computed one to the bit
whatever kernels a device chooses for a batch. Entries appear by rename and are checked when read; several processes
may share a cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from ltxpack.errors import AbsentError, FormatError, UsageError
from ltxpack.files.publish import TEMPORARY_ENDING, atomic_write
from ltxpack.files.tensorfile import TensorFile, build_header, header_length, open_source, parse_header
from ltxpack.files.units import parse_size
from ltxpack.ltx23.classes import TEXT_TOKENS
from ltxpack.manifest import FileRecord
from ltxpack.runtime.sampling.av import AV

FORMAT = "1"
LIMIT = 2_000_000_000
FOLDER = "contexts"
PLACE_VARIABLE, LIMIT_VARIABLE = "LTXPACK_CACHE", "LTXPACK_CACHE_SIZE"
ENDING = ".safetensors"
DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}
MODALITIES = ("video", "audio")
# A temporary file this old was left by a process that was killed.
STALE_SECONDS = 3600

Contexts = list[AV[Tensor]]
"""Per prompt of a batch: video and audio context, ``[1, 1024, D]`` each."""


def batch_key(prompts: Sequence[str], records: Iterable[FileRecord], dtype: torch.dtype, backend: str) -> str:
    """What the contexts of ``prompts`` depend on, as 64 hex digits.

    The prompts as they are tokenised (stripped) and in their order, the files of tokenizer, text encoder and
    connectors by hash, the dtype, and ``backend``: the kind of device and the libraries that compute.
    """
    document = {
        "format": FORMAT,
        "prompts": [prompt.strip() for prompt in prompts],
        "files": sorted((record.path, record.blake3) for record in records),
        "dtype": DTYPES[dtype],
        "backend": backend,
    }
    return blake3(json.dumps(document, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class PromptCache:
    """Entries in ``folder``, together at most ``limit`` bytes; those not used for longest go first."""

    folder: Path
    limit: int = LIMIT

    @classmethod
    def at(cls, folder: Path | None = None, environment: Mapping[str, str] = os.environ) -> PromptCache:
        """In ``folder``, else in :func:`cache_root`; bounded by LTXPACK_CACHE_SIZE.

        Raises UsageError for a size that is none.
        """
        limit = environment.get(LIMIT_VARIABLE)
        place = folder.absolute() if folder is not None else cache_root(environment) / FOLDER
        if not limit:
            return cls(place)
        return cls(place, parse_size(limit, LIMIT_VARIABLE, least=0, next=f"export {LIMIT_VARIABLE}=2GB"))

    def get(self, key: str, count: int, dtype: torch.dtype) -> Contexts | None:
        """The contexts of ``count`` prompts on the CPU, or None if they are not here.

        Raises LtxpackError for an entry that is not what was written.
        """
        path = self._path(key)
        try:
            if path.stat().st_size > self.limit:
                return None
            with open_source(path) as file:
                data = bytearray(file.read(self.limit + 1))
        except (FileNotFoundError, AbsentError):
            # Not here, or removed by another process since it was looked at.
            return None
        contexts = _read(data, path, key, count, dtype)
        with contextlib.suppress(OSError):
            os.utime(path)
        return contexts

    def put(self, key: str, contexts: Contexts) -> None:
        """Keep ``contexts`` under ``key`` and remove what no longer fits. Raises OSError.

        Values that are not finite are not kept, nor what is larger than the cache.
        """
        tensors = {
            f"{number}.{modality}": getattr(context, modality).cpu().contiguous()
            for number, context in enumerate(contexts)
            for modality in MODALITIES
        }
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            return
        body = b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors.values())
        layout = [(name, DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
        metadata = {"format": FORMAT, "key": key, "blake3": _digest(layout, body)}
        data = build_header(layout, metadata) + body
        if len(data) > self.limit:
            return
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_write(self._path(key), data)
        self._prune()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{ENDING}"

    def _prune(self) -> None:
        """Down to ``limit`` bytes, oldest use first; another process may be at the same."""
        now = time.time()
        entries = []
        for path, stat in _files(self.folder):
            if path.suffix == ENDING and not path.name.startswith("."):
                entries.append((stat.st_mtime_ns, path, stat.st_size))
            elif path.name.startswith(".") and path.suffix == TEMPORARY_ENDING and now - stat.st_mtime > STALE_SECONDS:
                path.unlink(missing_ok=True)
        total = sum(size for _, _, size in entries)
        for _, path, size in sorted(entries):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size


def cache_root(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of everything ltxpack keeps between runs: LTXPACK_CACHE, else ``ltxpack`` in the XDG cache folder.

    Raises UsageError for a user without a home folder.
    """
    named = environment.get(PLACE_VARIABLE)
    if named:
        return Path(named).absolute()
    try:
        return user_cache(environment) / "ltxpack"
    except RuntimeError:
        raise UsageError("there is no home folder to keep a cache in", next=f"export {PLACE_VARIABLE}=FOLDER") from None


def user_cache(environment: Mapping[str, str]) -> Path:
    """The XDG cache folder of the user. Raises RuntimeError for a user without a home folder."""
    xdg = Path(environment.get("XDG_CACHE_HOME", ""))
    # The XDG specification says that a relative path is to be ignored.
    return xdg if xdg.is_absolute() else Path.home() / ".cache"


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            yield path, path.stat()


def _digest(layout: Sequence[tuple[str, str, tuple[int, ...]]], body: bytes | bytearray | memoryview) -> str:
    described = json.dumps([[name, dtype, list(shape)] for name, dtype, shape in layout])
    return blake3(described.encode()).update(body).hexdigest()


def _read(data: bytearray, path: Path, key: str, count: int, dtype: torch.dtype) -> Contexts:
    """The entry in ``data``, held against everything that is known of it. Raises FormatError."""
    start = 8 + header_length(bytes(data[:8]), len(data), path)
    file = parse_header(bytes(data[:start]), len(data), path)
    _check(file, memoryview(data)[start:], key, count, dtype)
    tensors = {}
    for name, info in file.tensors.items():
        values = info.nbytes // dtype.itemsize
        tensors[name] = torch.frombuffer(data, dtype=dtype, count=values, offset=info.start).view(info.shape)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FormatError("holds values that are not finite", file=path, tensor=name)
    return [AV(*(tensors[f"{number}.{modality}"] for modality in MODALITIES)) for number in range(count)]


def _check(file: TensorFile, body: memoryview, key: str, count: int, dtype: torch.dtype) -> None:
    names = {f"{number}.{modality}" for number in range(count) for modality in MODALITIES}
    if set(file.tensors) != names:
        raise FormatError("holds other tensors", file=file.path, expected=sorted(names), found=sorted(file.tensors))
    for info in file.tensors.values():
        sound = info.dtype == DTYPES[dtype] and len(info.shape) == 3 and info.shape[:2] == (1, TEXT_TOKENS)
        if not sound or info.shape[2] < 1:
            raise FormatError(
                "is no context of a prompt",
                file=file.path,
                tensor=info.name,
                expected=f"{DTYPES[dtype]} [1, {TEXT_TOKENS}, D]",
                found=f"{info.dtype} {list(info.shape)}",
            )
    layout = [(info.name, info.dtype, info.shape) for info in file.tensors.values()]
    wanted = {"format": FORMAT, "key": key, "blake3": _digest(layout, body)}
    wrong = [name for name, value in wanted.items() if file.metadata.get(name) != value]
    if wrong:
        raise FormatError(f"its {' and '.join(wrong)} differ from its content", file=file.path)
