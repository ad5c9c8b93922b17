"""The offline stage against ``cp`` and against what users have today, on checkpoints of real width, cold and paired.

    python benchmarks/offline.py [--blocks 4] [--runs 5] [--flat 2 8] [--scratch FOLDER] [--results FOLDER] [--quick]
    python benchmarks/offline.py --exports [--blocks 4] [--runs 5] …      # exports alone, beside a bake

In one run, item after item, round after round: each ratio is taken within one round. Ours are the real commands in
processes of their own, hashing included. Every item ends with its bytes on the disk. ``--quick`` goes through all of
it at tiny widths, once, and keeps nothing: it shows that the benchmark works, not how fast anything is.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _checkpoint import REAL, TINY, Source, StreamWidths, config, lora_shapes, make_source, shapes_of
from _items import (
    FP8_EXPORT,
    LTXPACK,
    RIVALS,
    Places,
    bake_command,
    bake_items,
    copy_items,
    export_fp8_items,
    export_items,
    one_strength_items,
    verify_items,
)
from _marks import BAKE_PEAK, BAKE_TARGETS, GB, Findings, Flat, flat_table, mark_table
from _measure import Bench, Costs, Item, files_under
from _report import MATRIX_UNIT, RESULTS, Table, machine, write_results

from ltxpack.files.tensorfile import read_tensorfile

# The largest share of the scratch folder's free space that a run may take.
USABLE = 0.9
# Checkpoints that stand there at once, with results and LoRA: of the main measurements, and of those of memory.
COPIES, FLAT_COPIES = 4, 3
STARTS = 3


@dataclass(frozen=True)
class Settings:
    """What a run is asked for."""

    blocks: int
    runs: int
    flat: tuple[int, ...]
    widths: StreamWidths = REAL

    @property
    def largest(self) -> int:
        """Blocks of the checkpoint whose bake is measured in rounds too: the more, the less start-up counts."""
        return max(self.flat, default=0)

    @property
    def command(self) -> str:
        """What gives the same run again."""
        if self.widths != REAL:
            return "python benchmarks/offline.py --quick"
        flat = " ".join(map(str, self.flat))
        return f"python benchmarks/offline.py --blocks {self.blocks} --runs {self.runs} --flat {flat}"


Say = Callable[[str], None]


def run(settings: Settings, scratch: Path, say: Say) -> tuple[str, dict[str, Any]]:
    """Everything, in ``scratch``, which may be filled: the text, and the figures as JSON values."""
    facts = machine(scratch)
    bench, places = Bench(scratch, say), Places(scratch)
    groups, costs, start, arithmetic = _measured(settings, bench, places, say)
    say("bakes by size")
    flat = []
    for blocks in settings.flat:
        one, title, items, found, products = by_size(bench, places, settings, blocks)
        flat.append(one)
        if blocks == settings.largest:
            groups[title] = items
            costs |= found
            arithmetic[items[-1].key] = products
    say("accuracy")
    accuracy_tables, accuracy_rows = _accuracy(settings)
    findings = Findings(
        items={item.key: item for group in groups.values() for item in group},
        costs=costs,
        start=start,
        flat=flat,
        bake_limit=bake_limit(settings.widths, settings.blocks),
        sums=2 * 4 * largest_weight(settings.widths, settings.blocks),
        real=settings.widths == REAL,
        arithmetic=arithmetic,
        matrix_unit=MATRIX_UNIT in facts["bf16 unit"],
    )
    marks = findings.marks()
    tables = [findings.cost_table(title, [item.key for item in group]) for title, group in groups.items()]
    tables += [_start_table(start, arithmetic["ours 1"]), flat_table(flat), *accuracy_tables, mark_table(marks)]
    facts |= {
        "cold by": "; ".join(sorted(bench.how_cold)),
        "cp": f"`{places.cp}`, then `sync` of what it wrote",
        "command": f"`{settings.command}`",
    }
    document = {
        "machine": facts,
        "settings": asdict(settings),
        "payload": {key: item.payload for key, item in findings.items.items()},
        "costs": {key: {turn: asdict(cost) for turn, cost in runs.items()} for key, runs in costs.items()},
        "start_up": start,
        "arithmetic": arithmetic,
        "memory": [asdict(one) for one in flat],
        "accuracy": accuracy_rows,
        "marks": [asdict(mark) for mark in marks],
    }
    head = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return f"# The offline stage\n\n{head}\n\n" + "\n".join(table.markdown() for table in tables), document


def run_exports(settings: Settings, scratch: Path, say: Say) -> tuple[str, dict[str, Any]]:
    """Exports, and a bake of the same LoRA beside them: as :func:`run`, of these alone."""
    facts, bench, places = machine(scratch), Bench(scratch, say), Places(scratch)
    say(f"making a checkpoint of {settings.blocks} blocks")
    source = make_source(places.scratch / "main", settings.blocks, settings.widths)
    bench.once(_named("ours", copy_items(places, source)))
    places.keep_overlay()
    source.checkpoint.unlink()
    start = start_up(bench, places, source, 1, ("ours 1",))
    groups = {"Export": export_items(places), "Export with a LoRA, quantised": export_fp8_items(places, source.lora)}
    groups["Bake"] = one_strength_items(places, source.lora, "")
    products = bare_arithmetic(source.lora)
    costs: Costs = {}
    for items in groups.values():
        costs |= bench.in_turn(items, settings.runs)
    findings = Findings(
        items={item.key: item for group in groups.values() for item in group},
        costs=costs,
        start=start,
        flat=(),
        bake_limit=bake_limit(settings.widths, settings.blocks),
        sums=2 * 4 * largest_weight(settings.widths, settings.blocks),
        real=settings.widths == REAL,
        arithmetic={FP8_EXPORT: products, "ours 1": products},
        matrix_unit=MATRIX_UNIT in facts["bf16 unit"],
    )
    marks = findings.bake_marks()
    tables = [findings.cost_table(title, [item.key for item in group]) for title, group in groups.items()]
    facts |= {"cold by": "; ".join(sorted(bench.how_cold)), "command": f"`{settings.command} --exports`"}
    head = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    document = {
        "machine": facts,
        "settings": asdict(settings),
        "costs": {key: {turn: asdict(cost) for turn, cost in runs.items()} for key, runs in costs.items()},
        "arithmetic": findings.arithmetic,
        "marks": [asdict(mark) for mark in marks],
    }
    text = "\n".join(table.markdown() for table in (*tables, mark_table(marks)))
    return f"# Exports\n\n{head}\n\nBare products of one strength: {products:.1f} s.\n\n{text}", document


def _measured(
    settings: Settings, bench: Bench, places: Places, say: Say
) -> tuple[dict[str, list[Item]], Costs, dict[str, float], dict[str, float]]:
    """Items by their table's title, costs by item, start-up times, bare products by bake; leaves nothing behind."""
    say(f"making a checkpoint of {settings.blocks} blocks")
    source = make_source(places.scratch / "main", settings.blocks, settings.widths)
    title = f"Copy of {_size([source.checkpoint])}"
    groups = {title: copy_items(places, source)}
    costs = bench.in_turn(groups[title], settings.runs)
    places.keep_overlay()
    start = start_up(bench, places, source, min(STARTS, settings.runs))
    source.checkpoint.unlink()
    base = files_under(places.overlay / "transformer")
    loras = len(read_tensorfile(source.lora).tensors) // 2
    title = f"Bake of {loras} linears: {_size(base)} of base, {_size([source.lora])} of LoRA"
    later = {"Verify": verify_items(places), "Export": export_items(places)}
    later["Export with a LoRA, quantised"] = export_fp8_items(places, source.lora)
    later[title] = bake_items(places, source.lora)
    for items in later.values():
        costs |= bench.in_turn(items, settings.runs)
    groups |= later
    products = bare_arithmetic(source.lora)
    _clear(places, source)
    return groups, costs, start, {FP8_EXPORT: products, "ours 1": products, "ours 2": 2 * products}


def start_up(
    bench: Bench, places: Places, source: Source, times: int = STARTS, keys: Sequence[str] = ("ours", "ours 1")
) -> dict[str, float]:
    """Seconds that ours take before the first byte (imports, headers), least of a few; the same for any size."""
    places.clear()
    commands = {
        "ours": [*LTXPACK, "materialize", str(source.folder), str(places.work / "out"), "--plan", "--json"],
        "ours 1": [*bake_command(places.overlay, source.lora, 1), "--plan", "--json"],
    }
    return {key: min(bench.run(commands[key]).wall for _ in range(times)) for key in keys}


def bare_arithmetic(lora: Path) -> float:
    """Seconds of the matrix products of one strength, from memory to memory on all cores."""
    return float(subprocess.run([*RIVALS, "products", str(lora)], check=True, capture_output=True, text=True).stdout)


def by_size(
    bench: Bench, places: Places, settings: Settings, blocks: int
) -> tuple[Flat, str, list[Item], Costs, float]:
    """A copy and bakes with one strength of a checkpoint of ``blocks``; of the largest in rounds, beside its floor.

    Peak memory; the title of the table, its items and costs; seconds of the bare products.
    """
    source = make_source(places.scratch / "main", blocks, settings.widths)
    size = source.checkpoint.stat().st_size
    copied = bench.once(_named("ours", copy_items(places, source)))
    places.keep_overlay()
    source.checkpoint.unlink()
    base = files_under(places.overlay / "transformer")
    items = one_strength_items(places, source.lora, f" of {blocks} blocks")
    costs = bench.in_turn(items, settings.runs if blocks == settings.largest else 1)
    peak = max(cost.peak for cost in costs[items[-1].key].values())
    products = bare_arithmetic(source.lora) if blocks == settings.largest else 0.0  # asked for the largest alone
    title = f"Bake of {blocks} blocks: {_size(base)} of base, {_size([source.lora])} of LoRA"
    _clear(places, source)
    return Flat(blocks, size, copied.peak, peak, bake_limit(settings.widths, blocks)), title, items, costs, products


def _clear(places: Places, source: Source) -> None:
    places.clear()
    shutil.rmtree(places.overlay)
    shutil.rmtree(source.folder.parent)


def bake_limit(widths: StreamWidths, blocks: int) -> float:
    """Bytes that a bake may take: 350 MB and three times the largest weight that a LoRA changes, with its factors."""
    shapes = shapes_of(config(blocks, widths))
    targets: dict[str, int] = {}
    for key, shape in lora_shapes(shapes).items():
        module = key.rpartition(".lora_")[0]
        weight = shapes[f"model.{module}.weight"]
        targets.setdefault(module, 2 * math.prod(weight))
        targets[module] += 2 * math.prod(shape)
    return BAKE_PEAK + BAKE_TARGETS * max(targets.values())


def largest_weight(widths: StreamWidths, blocks: int) -> int:
    """Elements of the largest weight of a block: the sums of two such stand in memory while codes are made."""
    return max(math.prod(shape) for name, shape in shapes_of(config(blocks, widths)).items() if "_blocks." in name)


def needed_bytes(settings: Settings) -> int:
    """The most that a run has on the disk at once."""

    def size(blocks: int) -> int:
        shapes = shapes_of(config(blocks, settings.widths))
        return sum(2 * math.prod(shape) for part in (shapes, lora_shapes(shapes)) for shape in part.values())

    return max([COPIES * size(settings.blocks), *(FLAT_COPIES * size(blocks) for blocks in settings.flat)])


def _named(key: str, items: Sequence[Item]) -> Item:
    return next(item for item in items if item.key == key)


def _accuracy(settings: Settings) -> tuple[list[Table], list[dict[str, Any]]]:
    import accuracy

    rows = accuracy.measure(accuracy.REAL if settings.widths == REAL else accuracy.QUICK)
    return accuracy.tables(rows), [asdict(row) for row in rows]


def _start_table(start: dict[str, float], arithmetic: float) -> Table:
    names = {"ours": "ltxpack materialize --plan", "ours 1": "ltxpack bake-lora --plan"}
    rows = tuple((names[key], f"{seconds:.2f}") for key, seconds in start.items())
    products = ("the bare products of one strength, on all cores", f"{arithmetic:.2f}")
    return Table("Start-up (imports, headers) and arithmetic, in every time above", ("", "wall, s"), (*rows, products))


def _size(files: Sequence[Path]) -> str:
    return f"{sum(path.stat().st_size for path in files) / GB:.2f} GB"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4, help="transformer blocks of the checkpoint (default 4)")
    parser.add_argument("--runs", type=int, default=5, help="rounds (default 5)")
    parser.add_argument(
        "--flat",
        type=int,
        nargs="*",
        default=[2, 8],
        help="blocks to compare memory at; the bake of the most is timed too (default 2 8)",
    )
    parser.add_argument("--scratch", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--results", type=Path, help="folder for the dated table (default: benchmarks/results)")
    parser.add_argument("--exports", action="store_true", help="measure exports alone, beside a bake")
    parser.add_argument("--quick", action="store_true", help="tiny widths, one round; nothing kept without --results")
    return parser.parse_args()


def main() -> None:
    """Run in a folder that is removed at the end, keep the table, print it last."""
    wanted = arguments()
    settings = Settings(wanted.blocks, wanted.runs, tuple(sorted(set(wanted.flat))))
    if wanted.quick:
        settings = Settings(2, 1, (1, 2), TINY)
    with tempfile.TemporaryDirectory(prefix="ltxpack-offline-", dir=wanted.scratch) as folder:
        scratch = Path(folder)
        needed, free = needed_bytes(settings), shutil.disk_usage(scratch).free
        if needed > USABLE * free:
            raise SystemExit(f"needs {needed / GB:.0f} GB, of which {free / GB:.0f} GB are free: see --scratch")
        measure = run_exports if wanted.exports else run
        text, document = measure(settings, scratch, lambda line: print(line, file=sys.stderr, flush=True))
    results = wanted.results or (None if wanted.quick else RESULTS)
    if results is not None:
        write_results(results, "exports" if wanted.exports else "offline", text, document)
    print(text)


if __name__ == "__main__":
    main()
