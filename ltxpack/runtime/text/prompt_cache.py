"""A cache of contexts on disk, so that a prompt needs the text encoder only once.

Knows neither pipeline nor model: a key in, tensors out. An entry holds the contexts of one batch of prompts, officially
the prompt and its negative: a device may choose other kernels for another batch, so only the whole batch is equal to
the bit. Entries appear by rename and are checked when read; several processes may share a cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from ltxpack.errors import AbsentError, FormatError, UsageError
from ltxpack.files import tensorfile
from ltxpack.files.publish import TEMPORARY_ENDING, atomic_write
from ltxpack.files.typed import at_home
from ltxpack.files.units import parse_size
from ltxpack.ltx23.classes import TEXT_TOKENS
from ltxpack.manifest import FileRecord
from ltxpack.runtime.sampling.shape import AV

FORMAT = "1"
# The version of ``gemma`` and ``encode``; it rises with every change that can change a bit of a context.
TEXT_VERSION = "2"
LIMIT = 2_000_000_000
FOLDER = "contexts"
PLACE_VARIABLE, LIMIT_VARIABLE = "LTXPACK_CACHE", "LTXPACK_CACHE_SIZE"
ENDING = ".safetensors"
DTYPES = {getattr(torch, tensorfile.DTYPE_NAMES[code]): code for code in tensorfile.FLOATS}
MODALITIES = ("video", "audio")
# The names of entries, and of temporary files that become entries: a user's own folder holds other files too.
ENTRY = re.compile(rf"[0-9a-f]{{64}}\{ENDING}")
LEFT = re.compile(rf"\.{ENTRY.pattern}\.[0-9a-f]+\{TEMPORARY_ENDING}")
# A temporary file of this age belongs to a killed process.
STALE_SECONDS = 3600

Contexts = list[AV[Tensor]]
"""Per prompt of a batch: video and audio context, ``[1, 1024, D]`` each."""


def batch_key(prompts: Sequence[str], records: Iterable[FileRecord], dtype: torch.dtype, backend: str) -> str:
    """A hash, in 64 hex digits, of all inputs of the contexts of ``prompts``.

    These are the prompts in order, as they are tokenised (stripped); the files of tokenizer, text encoder and
    connectors by hash; the dtype; the version of our text path; and the :func:`backend`.
    """
    document = {
        "format": FORMAT,
        "text": TEXT_VERSION,
        "prompts": [prompt.strip() for prompt in prompts],
        "files": sorted((record.path, record.blake3) for record in records),
        "dtype": DTYPES[dtype],
        "backend": backend,
    }
    return blake3(json.dumps(document, sort_keys=True).encode()).hexdigest()


def backend(device: torch.device) -> str:
    """The card, libraries and precision that compute on ``device``: others may round differently."""
    matmul: Any = torch.backends.cuda.matmul
    parts: dict[str, object] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        **{name: version(name) for name in ("transformers", "diffusers")},
        "bf16": matmul.allow_bf16_reduced_precision_reduction,
        # Before torch 2.9 only the first of them has the setting, under its older name.
        **{
            name: getattr(each, "fp32_precision", None) or getattr(each, "allow_tf32", None)
            for name, each in (("cuda", matmul), ("cpu", getattr(torch.backends.mkldnn, "matmul", None)))
        },
    }
    if device.type == "cuda":
        parts |= {"toolkit": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return " ".join(f"{name}={value}" for name, value in parts.items())


@dataclass(frozen=True)
class PromptCache:
    """Entries in ``folder``, together at most ``limit`` bytes; removes the least recently used entry first."""

    folder: Path
    limit: int = LIMIT

    @classmethod
    def at(cls, folder: Path | None = None, environment: Mapping[str, str] = os.environ) -> PromptCache:
        """The cache in ``folder``, else this user's in :func:`cache_root`; LTXPACK_CACHE_SIZE bounds it.

        Raises UsageError if the variable is not a size.
        """
        limit = environment.get(LIMIT_VARIABLE) or str(LIMIT)
        place = folder.absolute() if folder is not None else _of_this_user(cache_root(environment) / FOLDER)
        return cls(place, parse_size(limit, LIMIT_VARIABLE, least=0, next=f"export {LIMIT_VARIABLE}=2GB"))

    def get(self, key: str, count: int, dtype: torch.dtype) -> Contexts | None:
        """The contexts of ``count`` prompts on the CPU, or None if there is no such entry.

        Raises LtxpackError for an entry that changed since it was written.
        """
        path = self._path(key)
        try:
            with tensorfile.open_source(path) as file:
                size = os.fstat(file.fileno()).st_size
                data = bytearray(file.read(size)) if size <= self.limit else None
        except AbsentError:
            return None
        if data is None:
            return None
        contexts = _read(data, path, key, count, dtype)
        with contextlib.suppress(OSError):
            os.utime(path)
        return contexts

    def put(self, key: str, contexts: Contexts) -> None:
        """Keep ``contexts`` under ``key`` and remove the entries that no longer fit. Raises OSError.

        It does not keep contexts that are not finite, or larger than the cache.
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
        data = tensorfile.build_header(layout, metadata) + body
        if len(data) > self.limit:
            return
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_write(self._path(key), data)
        self._prune()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{ENDING}"

    def _prune(self) -> None:
        """Remove entries, oldest use first, down to ``limit`` bytes; another process may do the same meanwhile."""
        entries = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                if ENTRY.fullmatch(path.name):
                    entries.append((stat.st_mtime_ns, path, stat.st_size))
                elif LEFT.fullmatch(path.name) and time.time() - stat.st_mtime > STALE_SECONDS:
                    path.unlink()
        total = sum(size for _, _, size in entries)
        for _, path, size in sorted(entries):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size


def cache_root(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of ltxpack's files between runs: LTXPACK_CACHE, else ``ltxpack`` in the XDG cache folder.

    Raises UsageError for a user without a home folder.
    """
    named = environment.get(PLACE_VARIABLE)
    if named:
        # No shell expands the ~ in a file of variables.
        return at_home(named).absolute()
    try:
        return user_cache(environment) / "ltxpack"
    except RuntimeError:
        raise UsageError("there is no home folder to keep a cache in", next=f"export {PLACE_VARIABLE}=FOLDER") from None


def _of_this_user(folder: Path) -> Path:
    """``folder``, or one beside it if another user has it: several may share LTXPACK_CACHE, but not their prompts."""
    closed = os.path.exists(folder) and not os.access(folder, os.R_OK | os.X_OK)  # noqa: PTH110 (a Path raises)
    return folder.with_name(f"{folder.name}-{os.geteuid()}") if closed else folder


def user_cache(environment: Mapping[str, str]) -> Path:
    """The XDG cache folder of the user. Raises RuntimeError for a user without a home folder."""
    xdg = Path(environment.get("XDG_CACHE_HOME", ""))
    # The XDG specification ignores a relative path.
    return xdg if xdg.is_absolute() else Path.home() / ".cache"


def _digest(layout: Sequence[tuple[str, str, tuple[int, ...]]], body: bytes | bytearray | memoryview) -> str:
    described = json.dumps([[name, dtype, list(shape)] for name, dtype, shape in layout])
    return blake3(described.encode()).update(body).hexdigest()


def _read(data: bytearray, path: Path, key: str, count: int, dtype: torch.dtype) -> Contexts:
    """The entry in ``data``, after all checks. Raises FormatError."""
    start = 8 + tensorfile.header_length(bytes(data[:8]), len(data), path)
    file = tensorfile.parse_header(bytes(data[:start]), len(data), path)
    _check(file, memoryview(data)[start:], key, count, dtype)
    tensors = {}
    for name, info in file.tensors.items():
        values = info.nbytes // dtype.itemsize
        tensors[name] = torch.frombuffer(data, dtype=dtype, count=values, offset=info.start).view(info.shape)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FormatError("holds values that are not finite", file=path, tensor=name)
    return [AV(*(tensors[f"{number}.{modality}"] for modality in MODALITIES)) for number in range(count)]


def _check(file: tensorfile.TensorFile, body: memoryview, key: str, count: int, dtype: torch.dtype) -> None:
    names = {f"{number}.{modality}" for number in range(count) for modality in MODALITIES}
    if set(file.tensors) != names:
        raise FormatError("holds other tensors", file=file.path, expected=sorted(names), found=sorted(file.tensors))
    for info in file.tensors.values():
        sound = info.dtype == DTYPES[dtype] and len(info.shape) == 3 and info.shape[:2] == (1, TEXT_TOKENS)
        if not sound or info.shape[2] < 1:
            expected, found = f"{DTYPES[dtype]} [1, {TEXT_TOKENS}, D]", f"{info.dtype} {list(info.shape)}"
            raise FormatError(
                "is no context of a prompt", file=file.path, tensor=info.name, expected=expected, found=found
            )
    layout = [(info.name, info.dtype, info.shape) for info in file.tensors.values()]
    wanted = {"format": FORMAT, "key": key, "blake3": _digest(layout, body)}
    wrong = [name for name, value in wanted.items() if file.metadata.get(name) != value]
    if wrong:
        raise FormatError(f"its {' and '.join(wrong)} differ from its content", file=file.path)
