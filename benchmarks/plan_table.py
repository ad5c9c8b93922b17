"""Writes the tables of docs/plans.md and docs/fleet.md, each row made by the planner; ``--check`` fails if one differs.

    python benchmarks/plan_table.py [--check]

From the sizes of the published LTX-2.3 alone: no overlay, no GPU, no torch.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ltxpack.files.units import gigabytes, human_bytes
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.overlay import official_transformers
from ltxpack.runtime.parallel.planned import PlannedScheme, cells, plan_schemes
from ltxpack.runtime.parallel.schemes import video_flops
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling.recipes import DISTILLED, HQ, Recipe
from ltxpack.runtime.settings import AUTO, STREAM
from ltxpack.runtime.weights.machine import this_machine
from ltxpack.runtime.weights.plan import Plan, Work, best_plan
from ltxpack.runtime.weights.report import streamed_blocks
from ltxpack.runtime.weights.sizes import TEXT_ENCODER, TRANSFORMER, ModelSizes, model_sizes, read_configs

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- plan-table {}: benchmarks/plan_table.py writes what follows -->", "<!-- plan-table {} ends -->"
GB = 10**9
# Memory of the card and of the host, in GB; read rate of the disk in bytes a second.
MACHINES = ((24, 32), (24, 64), (24, 128), (32, 64), (48, 64), (48, 128), (80, 128), (96, 128), (141, 128))
DISK_RATE = 3 * GB
PLANNED = (HQ, DISTILLED)
# A number of cards, the memory of each, and that of the host of them all, in GB; bytes a second between cards.
SEVERAL = ((2, 24, 64), (2, 48, 128), (4, 24, 128), (8, 80, 512))
LINK_RATE = 25 * GB
# Of MACHINES, those whose costs docs/fleet.md has.
FLEET = ((24, 64), (32, 64), (48, 128), (80, 128), (141, 128))
HEAD = (
    "| card | host | mode | blocks streamed | text encoder | peak on the card | peak on the host "
    "| first video reads | each further one |",
    "|---|---|---|---|---|---|---|---|---|",
)
DEVICES_HEAD = (
    "| cards, host | scheme | for | gain, at most | mode of a card | peak on a card | peak on the host, a card "
    "| comes to a card, a video |",
    "|---|---|---|---|---|---|---|---|",
)

FLEET_HEAD = (
    "| card, host | recipe | operations of a video | mode | peak on the card | peak on the host "
    "| each further video reads |",
    "|---|---|---|---|---|---|---|",
)


def rows(recipe: Recipe) -> Iterator[str]:
    """One row of the table a machine: the published release with the official bakes, in bfloat16."""
    model, _, work = _published(recipe)
    for card, host in MACHINES:
        plan = best_plan(model, work, this_machine(card * GB, host * GB))
        yield f"| {card} GB | {host} GB | {_cells(plan)} |"


def device_rows() -> Iterator[str]:
    """One row a machine with several cards and a scheme, for the default video."""
    model, config, work = _published(HQ)
    for count, card, host in SEVERAL:
        planned = plan_schemes(model, config, work, this_machine(card * GB, host * GB), count, AUTO)
        name = f"{count} × {card} GB, {host} GB"
        for one in planned.schemes:
            yield f"| {name} | {one.scheme} | {one.made_for} | {_device_cells(one)} |"


def fleet_rows() -> Iterator[str]:
    """One row a machine and recipe: what a video costs in operations, memory and bytes from disk."""
    for recipe in PLANNED:
        model, config, work = _published(recipe)
        operations = video_flops(config, work)
        for card, host in FLEET:
            plan = best_plan(model, work, this_machine(card * GB, host * GB))
            assert plan is not None
            peaks = f"{plan.mode} | {gigabytes(plan.card)} | {gigabytes(plan.host)} | {gigabytes(plan.next_read)}"
            yield f"| {card} GB, {host} GB | {recipe.name} | {operations / 1e15:.1f} · 10¹⁵ | {peaks} |"


def _published(recipe: Recipe) -> tuple[ModelSizes, DiTConfig, Work]:
    stages, config = official_transformers(recipe), DiTConfig.from_dict(read_configs(None)[TRANSFORMER])
    return model_sizes(None, stages, "bfloat16"), config, Request.of("", recipe=recipe.name).work(stages)


def _device_cells(one: PlannedScheme) -> str:
    if one.counted is None or not one.plans:
        return f"{one.problem} | | | | "
    received = one.counted.received
    moved = f"{human_bytes(received)}, {received / LINK_RATE:.1f} s" if received else "nothing"
    return " | ".join((f"{one.counted.gain:.2f} × = {one.why}", *cells(one.plans), moved))


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


# Page -> its tables by name: the head, and the rows.
Made = tuple[tuple[str, ...], Callable[[], Iterator[str]]]
PAGES: dict[str, dict[str, Made]] = {
    "plans.md": {
        **{recipe.name: (HEAD, functools.partial(rows, recipe)) for recipe in PLANNED},
        "devices": (DEVICES_HEAD, device_rows),
    },
    "fleet.md": {"fleet": (FLEET_HEAD, fleet_rows)},
}


def with_tables(page: str, text: str) -> str:
    """``text`` with the tables of ``page`` between their markers. Exits with status 1 if these are not there."""
    for name, (head, made) in PAGES[page].items():
        begin, end = BEGIN.format(name), END.format(name)
        if text.count(begin) != 1 or text.count(end) != 1:
            sys.exit(f"{page} has no place for the table ({begin})")
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = "\n".join([before + begin, "", *head, *made(), "", end + after])
    return text


def main() -> int:
    """Write the tables, or with ``--check`` only compare. Exit status 1 if one differs."""
    there = {page: (DOCS / page).read_text(encoding="utf-8") for page in PAGES}
    wanted = {page: with_tables(page, text) for page, text in there.items()}
    if "--check" in sys.argv[1:]:
        print("the tables are as planned" if wanted == there else "a table differs; run benchmarks/plan_table.py")
        return int(wanted != there)
    for page, text in wanted.items():
        (DOCS / page).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
