"""The report of a bake, target by target: a JSON document, a few lines of text. The page is in coverage_page.py.

The same bake gives the same bytes: no times, no paths, figures rounded to the precision of their arithmetic.
"""

from __future__ import annotations

import json
import math
import operator
import re
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ltxpack.lora_bake.adapter import LoraUse, Shapes
from ltxpack.ltx23.lora_keys import linear_modules
from ltxpack.manifest import FP8, Bake

REPORT_FORMAT = 1
REPORT_NAME = "coverage.json"
PAGE_NAME = "coverage.html"
REPORT_NAMES = (REPORT_NAME, PAGE_NAME)

# The report warns of a bake that changes fewer than one in so many of its weights.
NEXT_TO_NOTHING = 1000

_BLOCK = re.compile(r"^[A-Za-z_]\w*\.(\d+)\.(.+)$")
_DIGITS = 3


class TargetStat(NamedTuple):
    """Measurements of a fused tensor or some rows of it: squared norms of it and of the change, elements, and how many
    differ.

    For a quantised one also the squared norms of the float32 sum, of the stored values less that sum, and of the error
    that the rounding to codes alone makes.
    """

    base_square: float = 0.0
    delta_square: float = 0.0
    elements: int = 0
    changed: int = 0
    sum_square: float = 0.0
    error_square: float = 0.0
    rounding_square: float = 0.0

    def plus(self, more: TargetStat) -> TargetStat:
        """The measurements of these rows and of ``more``."""
        return TargetStat(*map(operator.add, self, more))

    @property
    def change(self) -> float | None:
        """‖ΔW‖/‖W‖, rounded; None if W is zero and changes, so that there is no ratio."""
        if self.delta_square == 0:
            return 0.0
        return significant(math.sqrt(self.delta_square / self.base_square)) if self.base_square else None

    @property
    def error(self) -> float:
        """‖stored - sum‖/‖sum‖ of a quantised tensor, rounded; ``sum`` is the float32 sum."""
        return significant(math.sqrt(self.error_square / self.sum_square)) if self.sum_square else 0.0

    @property
    def rounding(self) -> float:
        """The share of the error's square that comes from the rounding to codes; the rest comes from the rule."""
        return min(1.0, significant(self.rounding_square / self.error_square)) if self.error_square else 0.0


UNMEASURED = TargetStat()


@dataclass(frozen=True)
class BakeReport:
    """The result of one bake. ``made`` is False if it existed already; ``document`` is coverage.json."""

    name: str
    path: str
    made: bool
    document: Mapping[str, Any]

    def lines(self, verbose: bool = True) -> tuple[str, ...]:
        """The short form for the terminal: one line a LoRA, and with ``verbose`` the largest changes."""
        if not self.made:
            return (f"{self.path}: is there already, made from the same inputs",)
        document, lines = self.document, [f"{self.path}: baked"]
        for lora in document["loras"]:
            ranks, scales = ", ".join(sorted(lora["ranks"], key=int)) or "none", lora["scales"]
            others = f" and {lora['other_tensors']} other tensors" if lora["other_tensors"] else ""
            methods = [name for name in lora["methods"] if name != "lora"]
            others += f", {', '.join(lora['methods'])}" if methods else ""
            span = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
            lines.append(
                f"  {lora['name']} at {told_strength(lora['strength'])}: {lora['matched']} of {lora['total']} linears"
                f"{others}, rank {ranks}, scale {span}"
            )
        if "stored_as" in document:
            lines.append(f"  {document['quantised']:,} linears in {document['stored_as']}{_told_errors(document)}")
        changed, targeted = document["changed_weights"], document["targeted_weights"]
        if targeted and changed < targeted / NEXT_TO_NOTHING and "stored_as" not in document:
            lines.append(
                f"  changes {'next to ' if changed else ''}nothing: {changed:,} of {targeted:,} targeted weights"
            )
        if verbose and document["targets"]:
            biggest = sorted(document["kinds"].items(), key=lambda item: (-item[1]["largest_change"], item[0]))[:3]
            lines.append(
                f"  {document['changed_weights']:,} of {document['targeted_weights']:,} targeted weights changed in "
                f"{document['changed_tensors']} tensors; rule {document['rule']}, kernel {document['kernel']}"
            )
            lines.append("  hardest: " + ", ".join(f"{kind} {value['largest_change']:.2e}" for kind, value in biggest))
        elif verbose:
            lines.append("  no weight changed: every strength is 0")
        return tuple(lines)

    def to_json(self) -> dict[str, Any]:
        """The report without the list of targets, which is in coverage.json."""
        summary = {key: value for key, value in self.document.items() if key != "targets"}
        return {**summary, "name": self.name, "path": self.path, "made": self.made}


def _told_errors(document: Mapping[str, Any]) -> str:
    """For quantised linears: the error of their weights, and the source of their input scales."""
    error = "" if document["median_error"] is None else f", error {document['median_error']:.2%} (median)"
    if document["stored_as"] != FP8:
        return error
    calibration = document["calibration"]
    return error + (f", inputs calibrated by {calibration}" if calibration else "; not calibrated: input scales are 1")


def told_strength(strength: float | str) -> str:
    """A LoRA's strength in a line of the report."""
    return strength if isinstance(strength, str) else f"{strength:g}"


def significant(value: float) -> float:
    """``value`` rounded to three significant digits, to which both kernels' norms agree."""
    return float(f"{value:.{_DIGITS - 1}e}")


def split_name(name: str) -> tuple[int | None, str]:
    """``(block, kind)`` of a tensor or module name: ``transformer_blocks.7.attn1.to_q.weight`` -> 7, ``attn1.to_q``.

    For names outside the blocks it is None and the module path; a bias is a kind of its own.
    """
    module = name.removesuffix(".weight")
    found = _BLOCK.match(module)
    return (int(found[1]), found[2]) if found else (None, module)


def build_report(
    name: str, loras: Sequence[LoraUse], stats: Mapping[str, TargetStat], shapes: Shapes, made: Bake
) -> dict[str, Any]:
    """coverage.json as a document. ``stats``: by tensor. ``made``: rule, kernel, device and form; it needs no files."""
    measured = dict(sorted(stats.items()))
    changes = [stat.change for stat in measured.values() if stat.change is not None]
    places = [split_name(f"{module}.weight") for module in linear_modules(shapes)]
    blocks = {block for block, _ in places if block is not None}
    quantised = {f"{linear}.weight" for linear in made.quantised}
    document = {
        "format": REPORT_FORMAT,
        "bake": name,
        "rule": made.rule,
        "kernel": made.kernel,
        "device": made.device,
        "loras": [_lora(lora, shapes) for lora in loras],
        "changed_tensors": sum(stat.changed > 0 for stat in measured.values()),
        "changed_weights": sum(stat.changed for stat in measured.values()),
        "targeted_weights": sum(stat.elements for stat in measured.values()),
        "median_change": _median(changes),
        "largest_change": max(changes, default=None),
        "blocks": max(blocks, default=-1) + 1,
        "block_kinds": sorted({kind for block, kind in places if block is not None}),
        "kinds": _kinds(measured, shapes, quantised),
        "targets": {key: _target(key, stat, loras, key in quantised) for key, stat in measured.items()},
    }
    if quantised:
        calibration = made.calibration and made.calibration.name
        document |= {"stored_as": made.format, "quantised": len(quantised), "calibration": calibration}
        document |= _errors(measured[key] for key in measured if key in quantised)
    return document


def dump(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()


def _lora(lora: LoraUse, shapes: Shapes) -> dict[str, Any]:
    record, targets = lora.baked, lora.adapter.targets
    linears = linear_modules(shapes)
    matched = {name for name in targets if name.removesuffix(".weight") in linears}
    ranks = Counter(target.rank for target in targets.values() if target.rank)
    alphas = {f"{target.alpha:g}" for target in targets.values() if target.rank and target.alpha is not None}
    totals = Counter(split_name(module)[1] for module in linears)
    counts = Counter(split_name(name)[1] for name in matched)
    return {
        "name": record.name,
        "file": record.file,
        "blake3": record.blake3,
        "strength": record.stated,
        "namings": list(lora.adapter.styles),
        "matched": len(matched),
        "total": len(linears),
        "other_tensors": len(targets) - len(matched),
        "left_out": list(lora.adapter.skipped),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "alphas": sorted(alphas, key=float),
        "scales": sorted({significant(_scale(lora, name)) for name in targets})
        if record.scale is None
        else [record.scale],
        "dora": len(lora.adapter.dora),
        "full_differences": sum("diff" in target.methods for target in targets.values()),
        "methods": dict(sorted(Counter(method for target in targets.values() for method in target.methods).items())),
        "kinds": {kind: {"matched": counts[kind], "total": total} for kind, total in sorted(totals.items())},
    }


def _median(changes: Sequence[float]) -> float | None:
    return significant(statistics.median(changes)) if changes else None


def _errors(stats: Iterable[TargetStat]) -> dict[str, float | None]:
    errors = [stat.error for stat in stats]
    return {"median_error": _median(errors), "largest_error": max(errors, default=None)}


def _kinds(measured: Mapping[str, TargetStat], shapes: Shapes, quantised: Collection[str]) -> dict[str, dict[str, Any]]:
    totals = Counter(split_name(name)[1] for name in shapes)
    groups: dict[str, list[str]] = {}
    for name in measured:
        groups.setdefault(split_name(name)[1], []).append(name)
    kinds: dict[str, dict[str, Any]] = {}
    for kind, names in sorted(groups.items()):
        stats = [measured[name] for name in names]
        found = [stat.change for stat in stats if stat.change is not None]
        changes = found or [0.0]
        kinds[kind] = {
            "targets": len(stats),
            "total": totals[kind],
            "changed_weights": sum(stat.changed for stat in stats),
            "mean_change": significant(math.fsum(changes) / len(changes)),
            "median_change": _median(found),
            "largest_change": max(changes),
        }
        if coded := [measured[name] for name in names if name in quantised]:
            kinds[kind] |= _errors(coded)
    return kinds


def _target(name: str, stat: TargetStat, loras: Sequence[LoraUse], quantised: bool) -> dict[str, Any]:
    terms = [
        {"lora": i, "rank": target.rank, "scale": _scale(lora, name)}
        for i, lora in enumerate(loras)
        if (target := lora.adapter.targets.get(name)) is not None
    ]
    figures = {"change": stat.change, "changed": stat.changed, "elements": stat.elements, "terms": terms}
    return figures | ({"error": stat.error, "rounding": stat.rounding} if quantised else {})


def _scale(lora: LoraUse, name: str) -> float:
    """The factor of B·A in the target ``name`` (spec 02, section 2)."""
    return lora.baked.applied.at(split_name(name)[0]) * lora.adapter.targets[name].factor
