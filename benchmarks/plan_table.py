"""Writes the table of docs/plans.md, each row made by the planner; ``--check`` fails if the table is another.

    python benchmarks/plan_table.py [--check]

From the sizes of the published LTX-2.3 alone: no overlay, no GPU, no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from ltxpack.files.units import gigabytes
from ltxpack.ltx23.published import published_configs, published_tensors
from ltxpack.runtime.overlay import official_transformers
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling.recipes import HQ
from ltxpack.runtime.weights.machine import this_machine
from ltxpack.runtime.weights.plan import STREAM, Plan, best_plan
from ltxpack.runtime.weights.report import streamed_blocks
from ltxpack.runtime.weights.sizes import TEXT_ENCODER, ModelSizes, model_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "plans.md"
BEGIN, END = "<!-- plan-table: benchmarks/plan_table.py writes what follows -->", "<!-- plan-table ends -->"
GB = 10**9
# Memory of the card and of the host, in GB; read rate of the disk in bytes a second.
MACHINES = ((24, 32), (24, 64), (24, 128), (32, 64), (48, 64), (48, 128), (80, 128), (96, 128), (141, 128))
DISK_RATE = 3 * GB
OFFICIAL = official_transformers(HQ)
WORK = Request.of("").work(OFFICIAL)
HEAD = (
    "| card | host | mode | blocks streamed | text encoder | peak on the card | peak on the host "
    "| first video reads | each further one |",
    "|---|---|---|---|---|---|---|---|---|",
)


def published_model() -> ModelSizes:
    """The published release with the official pair of bakes, in bfloat16."""
    configs = published_configs()
    return model_of(published_tensors(configs), configs, OFFICIAL, "bfloat16")


def rows(model: ModelSizes) -> Iterator[str]:
    """One row of the table a machine."""
    for card, host in MACHINES:
        plan = best_plan(model, WORK, this_machine(card * GB, host * GB))
        yield f"| {card} GB | {host} GB | {_cells(plan)} |"


def _cells(plan: Plan | None) -> str:
    if plan is None:
        return "does not fit | | | | | |"
    streamed, total = streamed_blocks(plan), plan.blocks[plan.work.stages[0].part]
    blocks = "{} and {} of {}".format(*streamed, total) if plan.mode == STREAM else "none"
    layered = bool(plan.placements[TEXT_ENCODER].source)
    reads = (f"{gigabytes(count)}, {count / DISK_RATE:.0f} s" for count in (plan.first_read, plan.next_read))
    return " | ".join(
        (plan.mode, blocks, "by layers" if layered else "whole", gigabytes(plan.card), gigabytes(plan.host), *reads)
    )


def with_table(text: str, lines: list[str]) -> str:
    """``text`` with what stands between the markers replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, "", *lines, "", END + after])


def main() -> int:
    """Write the table, or with ``--check`` only compare. Exit status 1 if it differs."""
    text = PAGE.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        print(f"{PAGE.name} has no place for the table ({BEGIN})", file=sys.stderr)
        return 1
    wanted = with_table(text, [*HEAD, *rows(published_model())])
    if "--check" in sys.argv[1:]:
        print("the table is as planned" if wanted == text else "the table differs; run benchmarks/plan_table.py")
        return int(wanted != text)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
