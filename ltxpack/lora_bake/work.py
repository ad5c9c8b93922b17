"""One bake under way: its staging folder, what is done of it, and what was measured so far.

The measurements stand beside the journal (``measured.json``) until the reports are written, with the arithmetic that
was chosen: a bake that is stopped goes on with the same one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ltxpack.errors import FormatError, SourceError
from ltxpack.files.publish import atomic_write, write_failure
from ltxpack.files.tensorfile import read_json
from ltxpack.lora_bake.base import BaseShard
from ltxpack.lora_bake.coverage import PAGE_NAME, REPORT_NAME, TargetStat
from ltxpack.lora_bake.fuse import KERNELS
from ltxpack.lora_bake.job import Arithmetic, Job
from ltxpack.lora_bake.stream import Output
from ltxpack.manifest import Bake, FileRecord
from ltxpack.repack.items import Item
from ltxpack.repack.lock import OverlayLock
from ltxpack.repack.staging import Staging
from ltxpack.repack.write import write_bytes, write_item
from ltxpack.reporter import Reporter

MEASURED_NAME = "measured.json"


class BakeWork:
    """A job with its staging. A context manager; on leaving, what is complete stays for the next run."""

    def __init__(self, job: Job, chosen: Arithmetic, overlay: Path, reporter: Reporter, lock: OverlayLock) -> None:
        """``chosen`` is used unless an earlier run of the same job began with another arithmetic."""
        self.job = job
        self.arithmetic = chosen
        self.staging = Staging(overlay, job.fingerprint(), reporter, folder=job.folder, lock=lock, force=True)
        self._reporter = reporter
        self._path = self.staging.place.work / MEASURED_NAME
        self._stats: dict[str, list[TargetStat]] = {}
        self._document: dict[str, Any] | None = None
        self._rewrites = {rewrite.item.path: rewrite for rewrite in job.rewrites}

    def __enter__(self) -> Self:
        self.staging.__enter__()
        self._take_over()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.staging.__exit__(kind, error, trace)

    def missing_items(self) -> list[Item]:
        """What must still be written, but for the reports."""
        return [item for item in self.job.items if not self._has(item.path)]

    def write_small(self) -> None:
        """config, index and links."""
        items: tuple[Item, ...] = (*self.job.small, *self.job.links)
        for item in items:
            self._put(item)

    def output(self, shard: BaseShard) -> Output | None:
        """How ``shard`` is to be written for this bake; None if it is a link, or done."""
        rewrite = self._rewrites.get(f"{self.job.folder}/{shard.name}")
        if rewrite is None or self._has(rewrite.item.path):
            return None
        return Output(rewrite.item, self.staging.root, self.job.touched, strengths_of(self.job))

    def record(self, record: FileRecord, output: Output) -> None:
        """A shard is complete: first what was measured, then the journal."""
        self._stats[record.path] = list(output.stats.values())
        self._write_measured()
        self.staging.record(record)

    def finish(self) -> tuple[Bake, dict[str, Any]]:
        """Write the reports; the manifest's entry and the report's document."""
        if self._document is None:
            stats = [stat for measured in self._stats.values() for stat in measured]
            for item in self.job.reports(self.arithmetic, stats):
                if not self._has(item.path):
                    self.staging.record(write_bytes(item, self.staging.root))
            self._document = self.job.document(self.arithmetic, stats)
        changed = [name for name, target in self._document["targets"].items() if target["changed"]]
        return self.job.record(self.arithmetic, self.staging.done, changed), self._document

    def clear(self) -> None:
        """The measurements are in the reports now; nothing of them may be left in the staging folder."""
        for path in (self._path, *self._path.parent.glob(f".{MEASURED_NAME}.*")):
            path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Give up what was written: the same inputs would fail again."""
        shutil.rmtree(self.staging.place.work, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.staging.place.work.parent.rmdir()

    def _has(self, path: str) -> bool:
        """Whether ``path`` is done; a rewritten shard only if what was measured is known too."""
        if path not in self.staging.done:
            return False
        return self._document is not None or path in self._stats or path not in self._rewrites

    def _put(self, item: Item) -> None:
        if not self._has(item.path):
            self.staging.record(write_item(item, self.staging.root, copy=False, reporter=self._reporter))

    def _take_over(self) -> None:
        """Go on with what an earlier run of this very job measured; anything odd counts as nothing."""
        reports = [self.staging.root / self.job.folder / name for name in (REPORT_NAME, PAGE_NAME)]
        if all(path.relative_to(self.staging.root).as_posix() in self.staging.done for path in reports):
            document = read_json(reports[0])
            arithmetic = Arithmetic(document["rule"], document["kernel"], document["device"])
            if self._rewrites.keys() <= self.staging.done.keys():
                self.arithmetic, self._document = arithmetic, document
                return
        try:
            left = read_json(self._path)
            arithmetic = Arithmetic(**left["arithmetic"])
            stats = {path: [_stat(values) for values in measured] for path, measured in left["shards"].items()}
            if left["fingerprint"] != self.staging.fingerprint or not usable(arithmetic, self.job.rule):
                return
        except (SourceError, FormatError, LookupError, TypeError, AttributeError, ValueError):
            return
        self.arithmetic = arithmetic
        for path, measured in stats.items():
            names = {stat.name for stat in measured}
            if path in self.staging.done and path in self._rewrites and names == self._fused_in(path):
                self._stats[path] = measured

    def _fused_in(self, path: str) -> frozenset[str]:
        tensors = self._rewrites[path].shard.file.tensors
        return self.job.touched & {name for name, info in tensors.items() if info.nbytes}

    def _write_measured(self) -> None:
        document = {
            "fingerprint": self.staging.fingerprint,
            "arithmetic": self.arithmetic.to_json(),
            "shards": {path: [dataclasses.astuple(stat) for stat in stats] for path, stats in self._stats.items()},
        }
        try:
            atomic_write(self._path, json.dumps(document).encode())
        except OSError as error:
            raise write_failure(error, self._path) from None


def strengths_of(job: Job) -> tuple[float, ...]:
    """The strength of each LoRA, 0 for those that take no part."""
    active = {id(lora) for lora in job.active}
    return tuple(lora.baked.strength if id(lora) in active else 0.0 for lora in job.loras)


def _stat(values: Any) -> TargetStat:
    name, base, delta, elements, changed = values
    return TargetStat(str(name), float(base), float(delta), int(elements), int(changed))


def usable(arithmetic: Arithmetic, rule: str) -> bool:
    """Whether an unfinished bake's arithmetic is known and can be gone on with here."""
    import torch

    device = arithmetic.device
    return (
        arithmetic.rule == rule
        and arithmetic.kernel in KERNELS
        and (device == "cpu" or (device == "cuda" and torch.cuda.is_available()))
    )
