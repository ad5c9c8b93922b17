"""One bake as frozen values, made before a byte moves: its LoRAs, which shards it rewrites, the size of every file."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from ltxpack.lora_bake import coverage, coverage_page
from ltxpack.lora_bake.adapter import Adapter
from ltxpack.lora_bake.base import BaseShard, BaseTransformer
from ltxpack.lora_bake.coverage import AppliedLora, TargetStat
from ltxpack.manifest import Bake, BakedLora, FileRecord
from ltxpack.repack.items import Item, LinkFile, WriteBytes, WriteShard
from ltxpack.repack.tensors import stored_tensor

BAKES = "bakes"
# Raised when the same inputs would give other bytes than before.
ARITHMETIC_VERSION = 1
UNKNOWN_HASH = "0" * 64


@dataclass(frozen=True)
class Arithmetic:
    """How the sums are made: all of it goes into the manifest, and a resumed bake keeps it."""

    rule: str
    kernel: str
    device: str

    def to_json(self) -> dict[str, str]:
        """As JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Rewrite:
    """A shard that is written anew: the base's tensors in the base's order, those touched fused."""

    item: WriteShard
    shard: BaseShard


@dataclass(frozen=True)
class Job:
    """A bake to be made; ``loras`` in order of application."""

    name: str
    loras: tuple[AppliedLora, ...]
    rule: str
    base: BaseTransformer
    overlay: Path

    @property
    def folder(self) -> str:
        """Where it goes in the overlay."""
        return f"{BAKES}/{self.name}"

    @property
    def baked(self) -> tuple[BakedLora, ...]:
        """Its LoRAs as the manifest lists them."""
        return tuple(lora.baked for lora in self.loras)

    @functools.cached_property
    def active(self) -> tuple[AppliedLora, ...]:
        """The LoRAs that take part. A strength of 0 adds nothing; the official rule only skips when all are 0."""
        if self.rule == "official" and any(lora.baked.strength for lora in self.loras):
            return self.loras
        return tuple(lora for lora in self.loras if lora.baked.strength)

    @functools.cached_property
    def touched(self) -> frozenset[str]:
        """The tensors that are fused."""
        return frozenset(name for lora in self.active for name in lora.adapter.targets)

    @functools.cached_property
    def rewrites(self) -> tuple[Rewrite, ...]:
        """The shards to be written: those that hold a touched tensor."""
        return tuple(
            Rewrite(self._rewritten(shard), shard)
            for shard in self.base.shards
            if not self.touched.isdisjoint(shard.file.tensors)
        )

    @functools.cached_property
    def links(self) -> tuple[LinkFile, ...]:
        """The other shards: links to the base's."""
        rewritten = {rewrite.shard.name for rewrite in self.rewrites}
        return tuple(
            LinkFile(
                f"{self.folder}/{shard.name}", f"../../{shard.record.path}", shard.record.size, shard.record.blake3
            )
            for shard in self.base.shards
            if shard.name not in rewritten
        )

    @functools.cached_property
    def small(self) -> tuple[WriteBytes, ...]:
        """config.json and the index, as in the base."""
        return tuple(WriteBytes(f"{self.folder}/{name}", data) for name, data in sorted(self.base.small.items()))

    @property
    def items(self) -> tuple[Item, ...]:
        """Every file of the bake but the reports, in the order they are written."""
        return (*self.small, *self.links, *(rewrite.item for rewrite in self.rewrites))

    def reports(self, arithmetic: Arithmetic, stats: list[TargetStat]) -> tuple[WriteBytes, WriteBytes]:
        """coverage.json and coverage.html."""
        document = self.document(arithmetic, stats)
        return (
            WriteBytes(f"{self.folder}/{coverage.REPORT_NAME}", coverage.dump(document)),
            WriteBytes(f"{self.folder}/{coverage.PAGE_NAME}", coverage_page.render(document)),
        )

    def document(self, arithmetic: Arithmetic, stats: list[TargetStat]) -> dict[str, Any]:
        """coverage.json as a document."""
        return coverage.build_report(self.name, self.loras, stats, self.base.shapes, arithmetic.to_json())

    def report_bounds(self, arithmetic: Arithmetic) -> dict[str, int]:
        """The reports' paths -> at most so many bytes, whatever will be measured."""
        # No figure is longer than a change of 1.11e-100 and a count of all elements.
        counts = {name: math.prod(self.base.shapes[name]) for name in sorted(self.touched)}
        longest = [TargetStat(name, 1.0, 1.2321e-200, count, count) for name, count in counts.items()]
        document = self.document(arithmetic, longest)
        return {
            f"{self.folder}/{coverage.REPORT_NAME}": len(coverage.dump(document)),
            f"{self.folder}/{coverage.PAGE_NAME}": coverage_page.page_bound(document),
        }

    def plan(self, arithmetic: Arithmetic) -> list[dict[str, Any]]:
        """Every file with its size and what is done for it; of the reports the bound."""
        files = [(item.path, item.size, "link" if isinstance(item, LinkFile) else "write") for item in self.items]
        files += [(path, size, "write") for path, size in self.report_bounds(arithmetic).items()]
        return [{"path": path, "bytes": size, "action": action} for path, size, action in sorted(files)]

    def fingerprint(self) -> str:
        """Tells this bake's inputs from others'."""
        inputs = {
            "version": ARITHMETIC_VERSION,
            "rule": self.rule,
            "name": self.name,
            "loras": [[lora.blake3, lora.strength, lora.scale] for lora in self.baked],
            "base": [dataclasses.astuple(shard.record) for shard in self.base.shards],
            "small": {item.path: blake3(item.data).hexdigest() for item in self.small},
        }
        return blake3(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def record(self, arithmetic: Arithmetic, files: Mapping[str, FileRecord], changed: list[str]) -> Bake:
        """How the manifest lists the finished bake."""
        reports = [f"{self.folder}/{name}" for name in coverage.REPORT_NAMES]
        paths = [*(item.path for item in self.items), *reports]
        return Bake(
            loras=self.baked,
            rule=arithmetic.rule,
            kernel=arithmetic.kernel,
            device=arithmetic.device,
            files=tuple(files[path] for path in sorted(paths)),
            changed=tuple(sorted(changed)),
        )

    def _rewritten(self, shard: BaseShard) -> WriteShard:
        source = self.overlay / shard.record.path
        entries = tuple(stored_tensor(info.name, info, source) for info in shard.file.tensors.values())
        return WriteShard(f"{self.folder}/{shard.name}", entries, self._provenance(shard))

    def _provenance(self, shard: BaseShard) -> dict[str, str]:
        loras = [{"name": lora.name, "blake3": lora.blake3, "strength": lora.strength} for lora in self.baked]
        return {
            "format": "pt",
            "ltxpack_base_blake3": shard.record.blake3,
            "ltxpack_loras": json.dumps(loras, sort_keys=True),
            "ltxpack_rule": self.rule,
        }


def baked_lora(adapter: Adapter, name: str, digest: str, strength: float, rule: str) -> BakedLora:
    """How the manifest lists a LoRA of a bake."""
    factor = 1.0 if rule == "official" else adapter.factor
    return BakedLora(
        name=name,
        file=adapter.path.name,
        size=adapter.size,
        blake3=digest,
        strength=strength,
        scale=None if factor is None else strength * factor,
    )
