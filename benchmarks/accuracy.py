"""How far each way of fusing a LoRA is from the correctly rounded result, on the widths of LTX-2.3.

    python benchmarks/accuracy.py [--quick] [--results FOLDER]

The reference is W + scale·(B@A) in float64, rounded once to bf16 (nearest, ties to even). Counted is the share of
elements that a kernel stores otherwise. ``‖ΔW‖/‖W‖`` matters: the smaller the change, the less its own rounding shows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from _report import RESULTS, Table, machine, write_results
from torch import Tensor

from ltxpack.lora_bake.fuse import Term, cpu_has_bf16_unit, fuse_rows, row_chunks

STRENGTH = 0.7
RATIOS = (0.02, 0.2)
# (what, rows, columns, rank): rank min(384, in, out) as in the distilled LoRA (spec 02, section 6).
REAL = (
    ("video attention 4096x4096", 4096, 4096, 384),
    ("video feed-forward 16384x4096", 16384, 4096, 384),
    ("audio attention 2048x2048", 2048, 2048, 384),
    ("audio to video 2048x4096", 2048, 4096, 384),
    ("gate 32x4096", 32, 4096, 32),
)
QUICK = (("attention 128x128", 128, 128, 32), ("gate 4x128", 4, 128, 4))
# float64 rows at a time.
ROWS = 2048
REPEATS = 3
# bf16 keeps 8 of float64's 53 significant bits.
DROPPED_BITS = 45


@dataclass(frozen=True)
class Row:
    """One way of fusing one target. ``off``: share of elements not correctly rounded; ``seconds``: of all its rows."""

    target: str
    ratio: float
    way: str
    off: float
    seconds: float


@dataclass(frozen=True)
class Case:
    """One weight and the LoRAs on it, in bf16; ``exact`` are the bits of the correctly rounded result."""

    weight: Tensor
    terms: tuple[Term, ...]
    exact: Tensor


def measure(shapes: tuple[tuple[str, int, int, int], ...] = REAL) -> list[Row]:
    """Every kernel that this machine would choose between, on every target; then what is not chosen, and why not."""
    rows = []
    for target, out, columns, rank in shapes:
        for ratio in RATIOS:
            case = make_case(out, columns, rank, ratio, loras=1)
            for way, fuse in chosen_ways():
                rows.append(_timed(target, ratio, way, case, fuse))
    target, out, columns, rank = shapes[0]
    stacked = make_case(out, columns, rank, RATIOS[-1], loras=2)
    rows.append(_timed(target, RATIOS[-1], "two LoRAs, fp32", stacked, lambda case: _kernel(case, "fp32")))
    rows.append(_timed(target, RATIOS[-1], "two LoRAs, official", stacked, lambda case: _kernel(case, "official")))
    if cpu_has_bf16_unit():
        rows.append(_timed(target, RATIOS[-1], "two LoRAs, bf16 addmm in a chain", stacked, _chain))
    full = make_case(out, columns, rank, RATIOS[-1], loras=1, dtype=torch.float32)
    rows.append(_timed(target, RATIOS[-1], "fp32 factors, fp32", full, lambda case: _kernel(case, "fp32")))
    if cpu_has_bf16_unit():
        rows.append(_timed(target, RATIOS[-1], "fp32 factors, rounded for bf16 addmm", full, _chain))
    return rows


def chosen_ways() -> Iterator[tuple[str, Callable[[Case], Tensor]]]:
    """Name and function of what one LoRA with bf16 factors can be fused by."""
    yield "fp32 (rule fp32)", lambda case: _kernel(case, "fp32")
    if cpu_has_bf16_unit():
        yield "addmm (rule fp32)", lambda case: _kernel(case, "addmm")
    yield "official", lambda case: _kernel(case, "official")
    yield "merge: bf16(W + bf16(ΔW))", _plain_merge


def make_case(out: int, columns: int, rank: int, ratio: float, loras: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """A random weight and LoRAs whose whole change is ``ratio`` of its norm at STRENGTH."""
    generator = torch.Generator().manual_seed(out + columns + loras)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = (normal(out, columns) * 0.02).bfloat16()
    size = 0.02 * ratio / STRENGTH / (loras * rank) ** 0.5
    terms = tuple(
        Term(1.0, (normal(rank, columns) * size**0.5).to(dtype), (normal(out, rank) * size**0.5).to(dtype))
        for _ in range(loras)
    )
    parts = []
    for first in range(0, out, ROWS):
        total = weight[first : first + ROWS].double()
        for term in terms:
            assert term.up is not None and term.down is not None
            total += STRENGTH * (term.up[first : first + ROWS].double() @ term.down.double())
        parts.append(round_to_bf16(total))
    return Case(weight, terms, torch.cat(parts))


def round_to_bf16(values: Tensor) -> Tensor:
    """float64 to bf16 in one rounding (``Tensor.bfloat16`` goes through float32, which is two)."""
    bits = values.numpy().view(np.uint64)
    half = np.uint64((1 << (DROPPED_BITS - 1)) - 1)
    odd = (bits >> np.uint64(DROPPED_BITS)) & np.uint64(1)
    rounded = (bits + half + odd) >> np.uint64(DROPPED_BITS) << np.uint64(DROPPED_BITS)
    # What is left has 8 significant bits, so this cast is exact for all but denormals.
    return torch.from_numpy(rounded.view(np.float64)).bfloat16()


def _kernel(case: Case, kernel: str) -> Tensor:
    """As a bake does it: row chunk by row chunk."""
    shape = (case.weight.shape[0], case.weight.shape[1])
    strengths = [[STRENGTH] * len(case.terms)]
    parts = []
    for first, last in row_chunks(shape, kernel):
        terms = [term.rows(first, last) for term in case.terms]
        parts.append(fuse_rows(case.weight[first:last], terms, strengths, kernel)[0].weight.clone())
    return torch.cat(parts)


def _chain(case: Case) -> Tensor:
    """One bf16 addmm per LoRA."""
    total = case.weight
    for term in case.terms:
        assert term.up is not None and term.down is not None
        total = torch.addmm(total, term.up.bfloat16(), term.down.bfloat16(), alpha=STRENGTH)
    return total


def _plain_merge(case: Case) -> Tensor:
    """What PEFT and most merge scripts do: the change and the sum each rounded to bf16."""
    [term] = case.terms
    assert term.up is not None and term.down is not None
    return case.weight + (STRENGTH * (term.up.float() @ term.down.float())).bfloat16()


def _timed(target: str, ratio: float, way: str, case: Case, fuse: Callable[[Case], Tensor]) -> Row:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        found = fuse(case)
        times.append(time.perf_counter() - began)
    off = (found.view(torch.int16) != case.exact.view(torch.int16)).double().mean().item()
    return Row(target, ratio, way, off, min(times))


def tables(rows: list[Row]) -> list[Table]:
    """One LoRA with bf16 factors: a line per target and change, a column per way. Then the rest, a line each."""
    ways = [way for way, _ in chosen_ways()]
    lines = list(dict.fromkeys((row.target, row.ratio) for row in rows if row.way in ways))
    found = {(row.target, row.ratio, row.way): _cell(row) for row in rows}
    note = (
        "Share of elements whose bf16 is not the correctly rounded float64 result, and the time for the whole target "
        f"(best of {REPEATS}, {torch.get_num_threads()} threads, measuring for the report included in the kernels)."
    )
    first = tuple((target, f"{ratio:g}", *(found[target, ratio, way] for way in ways)) for target, ratio in lines)
    rest = tuple((row.way, _cell(row)) for row in rows if row.way not in ways)
    return [
        Table("Accuracy: one LoRA with bf16 factors", ("target", "‖ΔW‖/‖W‖", *ways), first, note),
        Table(f"Accuracy: what addmm is not chosen for ({lines[0][0]}, {RATIOS[-1]:g})", ("way", "off"), rest),
    ]


def _cell(row: Row) -> str:
    return f"{100 * row.off:.4f} %, {1000 * row.seconds:.1f} ms"


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny widths; nothing is kept without --results")
    parser.add_argument("--results", type=Path, help="folder for the dated table (default: benchmarks/results)")
    wanted = parser.parse_args()
    rows = measure(QUICK if wanted.quick else REAL)
    text = "\n".join(table.markdown() for table in tables(rows))
    folder = wanted.results or (None if wanted.quick else RESULTS)
    if folder is not None:
        facts = machine(folder.parent)
        head = "\n".join(f"- {name}: {value}" for name, value in facts.items())
        document = {"machine": facts, "rows": [asdict(row) for row in rows]}
        write_results(folder, "accuracy", f"# Accuracy of a bake\n\n{head}\n\n{text}", document)
    print(text)


if __name__ == "__main__":
    main()
