"""The section about several cards: is every exchange right, does a rank that dies end the wait of another, and one
evaluation of each stage in every way to share it, beside what that was counted as.

A process for each further card runs this file and goes through the same: ``_gpu_cards.py PLACE RANK SIZE KIND``. Two
more find out how a death ends, so that this process does not wait if it does not. Without a card there are two ranks on
the CPU.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from _gpu_bench import Bench, Growing
from _gpu_forward import guided
from _gpu_sizes import REAL, TINY
from torch import Tensor

from ltxpack.errors import DeviceError
from ltxpack.runtime.parallel.exchange import Exchange, meeting_place, store_in
from ltxpack.runtime.parallel.front import Front
from ltxpack.runtime.parallel.schemes import OF_ONE, SEQUENCE, WHOLE, Rates, Split, divides, split_of, stage_seconds
from ltxpack.runtime.sampling.recipes import HQ, RECIPES
from ltxpack.runtime.sampling.shape import AV
from ltxpack.runtime.settings import Settings
from ltxpack.runtime.weights.plan import StageWork, Work

DRY = 2
# Numbers in an exchange; of those on a card a few, many, and as many as fill several buffers of NCCL.
COUNTS, FEW = (1, 1001, 2**24 + 3), (1, 1001)
# A product that takes a card a while.
LATE = 4096
# In place of a recipe: two ranks, of which one is killed. Seconds to see the other end.
DEATH, LONGEST = "death", 30.0
# The file that says it, and the exit status of the one that saw it.
GONE, BEREAVED = "gone", 3
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
    deaths = bench.table("When a card's process is killed", ("", "seconds until another that waits for it ends"))
    deaths.rows.append(("killed in an exchange", _death(bench)))
    place = meeting_place()
    kind = f"{bench.device.type}-{bench.recipe.name}"
    command = [sys.executable, str(Path(__file__).resolve()), str(place)]
    others = [subprocess.Popen([*command, str(rank), str(size), kind]) for rank in range(1, size)]

    def check(failed: bool) -> None:
        if failed or any(other.poll() for other in others):
            raise RuntimeError("the process of another card has ended")

    try:
        exchange = Exchange(store_in(place, size), 0, size, bench.device, check)
        _tell_exchanges(bench, exchange)
        rates = rates_of(bench, exchange)
        told = f"{rates.flops / 1e12:.3g} TFLOP/s", f"{rates.link / 1e9:.3g} GB/s to each"
        table.rows.append(("-", "the rates", *told, "-", "-"))
        bench.note("cards.link", rates.link)
        _tell(bench, table, measured(bench, exchange), rates)
        exchange.leave()
    finally:
        for other in others:
            other.kill()
            other.wait()
        shutil.rmtree(place, ignore_errors=True)


def groups_of(size: int) -> list[Split]:
    """All ranks in one group; of more than two, pairs too."""
    return [Split(1, size), *([Split(size // 2, 2)] if size > 2 else [])]


def exchanges(bench: Bench, exchange: Exchange) -> Iterator[tuple[str, Tensor | None]]:
    """Every kind of exchange in every group of ranks: which numbers came wrong to this rank; None: it has no part.

    What is sent is made by a kernel that is still at work then, and is overwritten at once.
    """
    rank, size, card = exchange.rank, exchange.size, bench.device.type == "cuda"
    slow = torch.ones((LATE,) * 2 if card else (8, 8), device=bench.device, dtype=bench.dtype)

    def made(count: int, *values: int) -> Tensor:
        found = torch.tensor(values, device=bench.device, dtype=bench.dtype)[:, None].expand(-1, count)
        return (found + (slow @ slow)[:1, :1] * 0).contiguous()

    def wrong(got: Tensor, sent: Tensor, *wanted: int) -> Tensor:
        sent.fill_(-1)
        return got != torch.tensor(wanted, device=bench.device, dtype=bench.dtype)[:, None]

    for count in COUNTS if card else FEW:
        for owner in range(size):
            yield "broadcast", exchange.broadcast(made(count, rank), owner) != owner
        for split in groups_of(size):
            group, first = exchange.group(split), rank - rank % split.shards
            members, own, to_each = range(first, first + split.shards), None, None
            if rank < split.groups * split.shards:
                sent = made(count, *(rank * size + to for to in members))
                to_each = wrong(exchange.all_to_all(sent, group), sent, *(one * size + rank for one in members))
                sent = made(count, rank)
                own = wrong(exchange.all_gather(sent[0], group), sent, *members)
            yield f"all-to-all, {split}", to_each
            yield f"all-gather, {split}", own
        for other in range(1, size):
            if rank == other:
                exchange.send(sent := made(count, rank), 0)
                sent.fill_(-1)
            yield "send and receive", exchange.receive(made(count, 0), other) != other if rank == 0 else None


def _tell_exchanges(bench: Bench, exchange: Exchange) -> None:
    """On every rank; what came wrong on any of them is a failure of the benchmark."""
    found = Counter[str]()
    for kind, wrong in exchanges(bench, exchange):
        of_this = torch.zeros(1, device=bench.device) if wrong is None else wrong.sum().float().reshape(1)
        found[kind] += int(exchange.all_gather(of_this, None).sum())
    table = bench.table("Exchanges between cards", ("exchange", "numbers that came wrong"))
    for kind, count in found.items():
        table.rows.append((kind, str(int(bench.note(f"cards.wrong.{kind}", count)))))
        if count:
            bench.failures.append((kind, f"{count} numbers came wrong"))


def _death(bench: Bench) -> str:
    """Of two processes one is killed while the other waits for it: seconds until that has ended, in words."""
    place = meeting_place()
    command = [sys.executable, str(Path(__file__).resolve()), str(place)]
    waiting, killed = (
        subprocess.Popen([*command, str(rank), "2", f"{bench.device.type}-{DEATH}"]) for rank in range(2)
    )
    seconds = None
    try:
        end = time.monotonic() + LONGEST
        while not all((place / f"at work {rank}").exists() for rank in range(2)) and time.monotonic() < end:
            time.sleep(0.05)
        killed.kill()
        killed.wait()
        (place / GONE).touch()
        begin = time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            waiting.wait(LONGEST)
            seconds = time.monotonic() - begin
    finally:
        for process in (waiting, killed):
            process.kill()
            process.wait()
        shutil.rmtree(place, ignore_errors=True)
    if seconds is None or waiting.returncode != BEREAVED:
        bench.failures.append(("a card's process is killed", f"the other ended with {waiting.returncode}"))
        return "it did not end" if seconds is None else f"status {waiting.returncode}"
    return f"{bench.note('cards.death', seconds):.1f}"


def _bereaved(place: Path, rank: int, device: torch.device) -> int:
    """One of the two: waits, as rank 0 of a team does, for an exchange that the other does not make."""

    def check(failed: bool) -> None:
        end = time.monotonic() + (LONGEST if failed else 0.0)
        while not (place / GONE).exists() and time.monotonic() < end:
            time.sleep(0.02)
        if (place / GONE).exists():
            raise DeviceError("the other has ended")

    exchange = Exchange(store_in(place, 2), rank, 2, device, check)
    parts = torch.ones(2, 1001, device=device)
    exchange.all_to_all(parts, None)
    exchange.finish()
    (place / f"at work {rank}").touch()
    if rank:
        time.sleep(2 * LONGEST)
        return 1

    def watch() -> None:
        with suppress(DeviceError):
            check(True)
        exchange.abandon()

    threading.Thread(target=watch, daemon=True).start()
    with suppress(DeviceError):
        exchange.all_to_all(parts, None)
        exchange.finish()
        return 1
    exchange.leave()
    return BEREAVED


def measured(bench: Bench, exchange: Exchange) -> Iterator[Made]:
    """All ways at both stages, in the same order on every rank; each after one evaluation that does not count."""
    work = work_of(bench)
    for number, stage in enumerate(work.stages, 1):
        passes = guided(bench, number, bench.inputs(number).streams)[: stage.passes]
        for split in ways(bench, work, stage, exchange.size):
            model = bench.dit if split == WHOLE else Front(bench.dit, exchange, split)
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
    return [*dict.fromkeys((WHOLE, *(split_of(scheme, bench.config, work, stage, size) for scheme in usable)))]


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


def _tell(bench: Bench, table: Growing, found: Iterator[Made], rates: Rates) -> None:
    work = work_of(bench)
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
    if recipe == DEATH:
        return _bereaved(Path(place), int(rank), device)
    bench = Bench(
        sizes=TINY if dry else REAL,
        device=device,
        dtype=torch.float32 if dry else torch.bfloat16,
        compiler={},
        say=lambda line: None,
        recipe=RECIPES.get(recipe, HQ),
    )
    exchange = Exchange(store_in(Path(place), int(size)), int(rank), int(size), device, lambda failed: None)
    _tell_exchanges(bench, exchange)
    rates_of(bench, exchange)
    for _ in measured(bench, exchange):
        pass
    exchange.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
