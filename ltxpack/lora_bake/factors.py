"""Reads an adapter's tensors, factor by factor, as they are fused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self

import torch

from ltxpack.files.tensorfile import open_source
from ltxpack.lora_bake.adapter import Adapter, Part
from ltxpack.lora_bake.fuse import Term, Workspace
from ltxpack.lora_bake.reading import fill

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """torch on the calling thread alone: its own threads wait for each other in loops, on busy cores for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class FactorReader:
    """The factors of one adapter, read when asked for. Close it, or use it as a context."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._file = open_source(adapter.path)

    def term(self, weight: str, work: Workspace | None = None) -> Term | None:
        """What this adapter adds to ``weight``, as stored in the file; None if nothing. Raises FormatError.

        With ``work`` the tensors lie there and are valid until it is used again.
        """
        target = self.adapter.targets.get(weight)
        if target is None:
            return None
        work = work or Workspace()
        magnitude = self._load(target.magnitude, "magnitude", work)
        return Term(
            factor=target.factor,
            down=self._load(target.down, "down", work),
            up=self._load(target.up, "up", work),
            magnitude=None if magnitude is None else magnitude.reshape(-1, 1),
            diff=self._load(target.diff, "diff", work),
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self, part: Part | None, use: str, work: Workspace) -> torch.Tensor | None:
        if part is None:
            return None
        memory = work.empty(use, (part.nbytes,), torch.uint8)
        fill(self._file.fileno(), memory.numpy().data, part.start, self.adapter.path)
        return memory.view(DTYPES[part.dtype]).reshape(part.shape)
