"""The document of coverage.json by place: what stands where on the page, and what a column comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ltxpack.lora_bake.heatmap import layout
from ltxpack.lora_bake.report import split_name


class View:
    """``cells``: (block, kind) -> name of the target there. ``ends``: kind -> name of a target outside the blocks.

    ``groups`` and ``outside`` hold every kind in model order, touched or not.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self.targets: Mapping[str, Mapping[str, Any]] = document["targets"]
        self.loras: Sequence[Mapping[str, Any]] = document["loras"]
        self.cells: dict[tuple[int, str], str] = {}
        self.ends: dict[str, str] = {}
        self._of_kind: dict[str, list[Mapping[str, Any]]] = {}
        for name, target in self.targets.items():
            block, kind = split_name(name)
            self._of_kind.setdefault(kind, []).append(target)
            if block is None:
                self.ends[kind] = name
            else:
                self.cells[block, kind] = name
        inside = {kind for _, kind in self.cells} | set(document["block_kinds"])
        outside = {kind for lora in self.loras for kind in lora["kinds"]} - inside | set(self.ends)
        self.groups = layout.groups(inside)
        self.outside = layout.outside(outside)
        self.untouched = len(inside) * document["blocks"] + len(outside) - len(self.targets)

    @property
    def linears(self) -> tuple[int, int]:
        """How many linears are touched by any LoRA, and how many the model has."""
        kinds = {kind for lora in self.loras for kind in lora["kinds"]}
        reached = sum(len(targets) for kind, targets in self._of_kind.items() if kind in kinds)
        return reached, max((lora["total"] for lora in self.loras), default=reached)

    def total(self, kind: str) -> int | None:
        """How many modules of ``kind`` the model has, if it is known."""
        known: list[int] = [lora["kinds"][kind]["total"] for lora in self.loras if kind in lora["kinds"]]
        known += [self.document["kinds"][kind]["total"]] if kind in self.document["kinds"] else []
        return known[0] if known else None

    def matched(self, lora: int, kind: str) -> int:
        """How many modules of ``kind`` a LoRA has."""
        kinds = self.loras[lora]["kinds"]
        return int(kinds[kind]["matched"]) if kind in kinds else len(self.ranks(lora, kind))

    def ranks(self, lora: int, kind: str) -> list[int]:
        """The rank at every target of ``kind`` that a LoRA has; 0 for a full difference alone."""
        targets = self._of_kind.get(kind, ())
        return [term["rank"] for target in targets for term in target["terms"] if term["lora"] == lora]
