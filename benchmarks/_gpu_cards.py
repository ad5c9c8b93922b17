"""The section about several cards: one evaluation of each stage in every way to share it, and what that was counted as.

A process for each further card runs this file and goes through the same evaluations: ``_gpu_cards.py PLACE RANK SIZE
KIND``. Without a card there are two ranks on the CPU.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from _gpu_bench import Bench
from _gpu_forward import guided
from _gpu_sizes import REAL, TINY
from torch import Tensor

from ltxpack.runtime.parallel.exchange import Exchange, meeting_place, store_in
from ltxpack.runtime.parallel.front import Front
from ltxpack.runtime.parallel.schemes import OF_ONE, SEQUENCE, Rates, Split, divides, split_of, stage_seconds
from ltxpack.runtime.sampling.recipes import HQ, RECIPES
from ltxpack.runtime.sampling.shape import AV
from ltxpack.runtime.settings import Settings
from ltxpack.runtime.weights.plan import StageWork, Work

DRY = 2
COLUMNS = ("stage", "shared out", "ms an evaluation", "times as fast as one card", "counted", "apart from one card")


class Made(NamedTuple):
    """An evaluation of a stage, counted from 1: how it was shared out, its milliseconds and its velocities."""

    stage: int
    split: Split
    milliseconds: float
    velocities: list[AV[Tensor]]


def cards(bench: Bench) -> None:
    """Every way to share out an evaluation over all cards of this machine, after the rates that a choice is made by."""
    size = torch.cuda.device_count() if bench.device.type == "cuda" else DRY
    note = "Random weights, eager. Counted: from the operations and bytes of each way, and the two rates."
    table = bench.table("Several cards", COLUMNS, note)
    if size < 2:
        table.rows.append(("-", "there is one card here", *("-" * 4)))
        return
    place = meeting_place()
    kind = f"{bench.device.type}-{bench.recipe.name}"
    command = [sys.executable, str(Path(__file__).resolve()), str(place)]
    others = [subprocess.Popen([*command, str(rank), str(size), kind]) for rank in range(1, size)]

    def check(failed: bool) -> None:
        if failed or any(other.poll() for other in others):
            raise RuntimeError("the process of another card has ended")

    try:
        exchange = Exchange(store_in(place, size), 0, size, bench.device, check)
        rates = rates_of(bench, exchange)
        told = f"{rates.flops / 1e12:.3g} TFLOP/s", f"{rates.link / 1e9:.3g} GB/s to each"
        table.rows.append(("-", "the rates", *told, "-", "-"))
        bench.note("cards.link", rates.link)
        _tell(bench, measured(bench, exchange), rates)
    finally:
        for other in others:
            other.kill()
            other.wait()
    exchange.leave()
    shutil.rmtree(place, ignore_errors=True)


def measured(bench: Bench, exchange: Exchange) -> Iterator[Made]:
    """All ways at both stages, in the same order on every rank; each after one evaluation that does not count."""
    work = work_of(bench)
    for number, stage in enumerate(work.stages, 1):
        passes = guided(bench, number, bench.inputs(number).streams)[: stage.passes]
        for split in ways(bench, work, stage, exchange.size):
            model = bench.dit if split == Split() else Front(bench.dit, exchange, split)
            model.passes(passes)
            bench.clock.wait()
            spent, made = bench.clock.once(partial(model.passes, passes))
            assert isinstance(made, list)
            yield Made(number, split, spent, made)


def rates_of(bench: Bench, exchange: Exchange) -> Rates:
    """What ``--parallel auto`` measures; next to nothing on a CPU."""
    return exchange.rates(*(() if bench.device.type == "cuda" else (64, 64)))


def ways(bench: Bench, work: Work, stage: StageWork, size: int) -> list[Split]:
    """One card first, then what each scheme makes of the stage."""
    usable = [scheme for scheme in OF_ONE if scheme != SEQUENCE or divides(bench.config, size)]
    return [*dict.fromkeys((Split(), *(split_of(scheme, bench.config, work, stage, size) for scheme in usable)))]


def work_of(bench: Bench) -> Work:
    """The stages of the recipe in the sizes of the bench."""
    sizes, recipe = bench.sizes, bench.recipe
    guidance = Settings.of({"recipe": recipe.name}).guidance
    return Work(
        sizes.shape,
        tuple(
            StageWork("base", stage.shape(sizes.shape), stage.evaluations(sizes.steps), stage.passes(guidance))
            for stage in recipe.stages
        ),
    )


def _tell(bench: Bench, found: Iterator[Made], rates: Rates) -> None:
    table, work = bench.tables[-1], work_of(bench)
    alone: dict[int, Made] = {}
    for made in found:
        first = alone.setdefault(made.stage, made)
        stage = work.stages[made.stage - 1]
        one, several = (
            stage_seconds(bench.config, work, stage, split, bench.dtype.itemsize, rates)
            for split in (first.split, made.split)
        )
        gain = bench.note(f"cards.stage {made.stage}.{made.split}", first.milliseconds / made.milliseconds)
        apart = bench.note(f"cards.apart.stage {made.stage}.{made.split}", _apart(made.velocities, first.velocities))
        row = (f"{made.milliseconds:.1f}", f"{gain:.2f}", f"{one / several:.2f}", f"{apart:.1e}")
        table.rows.append((str(made.stage), str(made.split), *row))
        bench.say(f"stage {made.stage}, {made.split}: {gain:.2f}")


def _apart(found: Sequence[AV[Tensor]], expected: Sequence[AV[Tensor]]) -> float:
    """Relative L2 of the worst velocities."""
    pairs = [pair for one, other in zip(found, expected, strict=True) for pair in zip(*_parts(one, other), strict=True)]
    return max(float((one.double() - other.double()).norm() / other.double().norm()) for one, other in pairs)


def _parts(*both: AV[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(each.video, each.audio) for each in both]


def main(place: str, rank: str, size: str, kind: str) -> int:
    """A rank other than 0, which tells nothing."""
    where, _, recipe = kind.partition("-")
    dry = where == "cpu"
    device = torch.device("cpu" if dry else f"cuda:{rank}")
    if dry:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)
    bench = Bench(
        sizes=TINY if dry else REAL,
        device=device,
        dtype=torch.float32 if dry else torch.bfloat16,
        compiler={},
        say=lambda line: None,
        recipe=RECIPES.get(recipe, HQ),
    )
    exchange = Exchange(store_in(Path(place), int(size)), int(rank), int(size), device, lambda failed: None)
    rates_of(bench, exchange)
    for _ in measured(bench, exchange):
        pass
    exchange.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
