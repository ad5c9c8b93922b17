"""This checkout's commands against those of another checkout, in one run: the offline half, and loading a transformer.

    python benchmarks/against.py CHECKOUT [--blocks 2] [--rounds 5] [--scratch FOLDER] [--results FOLDER]

Every command runs cold in a process of its own, both checkouts in turn, the order changing with every round; each ratio
is taken within one round. Both run in this environment, each on an overlay that it has made itself.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from _checkpoint import REAL, Source, make_source
from _items import STRENGTHS
from _measure import Bench, Cost, Item, files_under
from _report import RESULTS, Table, machine, spread, write_results

HERE = Path(__file__).resolve().parent.parent
LOAD = """
import sys; sys.path.insert(0, {benchmarks!r})
from pathlib import Path
from loading import _bench, ways
print(ways(_bench("cpu", 0, quick=False), Path({overlay!r}))["ours"]())
"""


class Side:
    """One checkout: its name in the table, the overlay it makes, and its commands."""

    def __init__(self, name: str, checkout: Path, source: Source, scratch: Path) -> None:
        self.name, self.checkout, self.source = name, checkout, source
        self.overlay, self.work = scratch / name / "overlay", scratch / name / "work"
        # -P: the folder in which the benchmark is called is not searched before.
        self._python = ("env", f"PYTHONPATH={checkout}", sys.executable, "-P")

    def items(self) -> Iterator[Item]:
        """What is measured; the first one leaves the overlay behind that the others use."""
        made = (*files_under(self.overlay / "transformer"), self.source.lora)
        yield self._item("materialize", (self.source.checkpoint,), "materialize", self.source.folder, self.work)
        yield self._item("verify", tuple(files_under(self.overlay)), "verify", self.overlay)
        bake = ("bake-lora", self.overlay, "--lora", self.source.lora, "--device", "cpu")
        for count in (1, 2):
            flags = [part for strength in STRENGTHS[:count] for part in ("--strength", strength)]
            yield self._item(f"bake-lora, strengths: {count}", made, *bake, *flags)
        script = LOAD.format(benchmarks=str(self.checkout / "benchmarks"), overlay=str(self.overlay))
        yield Item("load", "loading", (*self._python, "-c", script), made[:-1], 0, self.clear)

    def materialize(self, bench: Bench) -> None:
        """Make the overlay."""
        bench.once(self._item("materialize", (), "materialize", self.source.folder, self.overlay))

    def clear(self) -> None:
        """Remove what the item before has made; the manifest of the overlay names no bake afterwards."""
        shutil.rmtree(self.work, ignore_errors=True)
        manifest = self.overlay / "ltxpack.json"
        if manifest.exists():
            clean = self.overlay.with_suffix(".json")
            if not clean.exists():
                shutil.copy(manifest, clean)
            shutil.rmtree(self.overlay / "bakes", ignore_errors=True)
            shutil.copy(clean, manifest)

    def _item(self, key: str, cold: tuple[Path, ...], *arguments: object) -> Item:
        return Item(key, key, (*self._python, "-m", "ltxpack", *map(str, arguments)), cold, 0, self.clear)


def measured(bench: Bench, sides: tuple[Side, Side], rounds: int) -> dict[str, list[tuple[Cost, Cost]]]:
    """By item: the costs of both sides in each round. The wall of ``load`` is what the loading itself says."""
    found: dict[str, list[tuple[Cost, Cost]]] = {}
    ours, theirs = ({item.key: item for item in side.items()} for side in sides)
    for turn in range(rounds):
        for key in ours:
            pair = [ours[key], theirs[key]]
            costs = [_cost(bench, item) for item in (pair if turn % 2 == 0 else pair[::-1])]
            one, other = costs if turn % 2 == 0 else costs[::-1]
            found.setdefault(key, []).append((one, other))
            print(
                f"{turn + 1}/{rounds} {key}: {one.wall:.2f} s against {other.wall:.2f} s", file=sys.stderr, flush=True
            )
        for side in sides:
            side.clear()
    return found


def _cost(bench: Bench, item: Item) -> Cost:
    cost = bench.once(item)
    if item.key != "load":
        return cost
    return Cost(float((bench.scratch / "output.log").read_text().split()[-1]), cost.cpu, cost.peak)


def table(found: dict[str, list[tuple[Cost, Cost]]], names: tuple[str, str]) -> Table:
    """Medians, and the ratios within a round."""
    rows = []
    for key, pairs in found.items():
        walls, cpus = ([spread(values).median for values in zip(*each, strict=True)] for each in (
            [(one.wall, other.wall) for one, other in pairs], [(one.cpu, other.cpu) for one, other in pairs]
        ))  # fmt: skip
        ratio = spread([one.wall / other.wall for one, other in pairs]).text()
        peaks = [max(cost.peak for cost in side) / 1e6 for side in zip(*pairs, strict=True)]
        cells = [f"{walls[0]:.2f} s", f"{walls[1]:.2f} s", ratio, f"{cpus[0] / cpus[1]:.2f}"]
        rows.append((key, *cells, f"{peaks[0]:.0f} MB", f"{peaks[1]:.0f} MB"))
    head = ("", names[0], names[1], "wall, ratio", "CPU, ratio", "peak", f"peak, {names[1]}")
    return Table("Both checkouts", head, tuple(rows), "Medians; ratios within a round, least and largest behind.")


def main() -> None:
    """Make a checkpoint of real width, measure, print the table and keep it with its date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of another commit")
    parser.add_argument("--blocks", type=int, default=2, help="transformer blocks of the checkpoint (2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=wanted.scratch, prefix="ltxpack-against-") as folder:
        scratch = Path(folder)
        bench = Bench(scratch, lambda line: None)
        source = make_source(scratch / "main", wanted.blocks, REAL)
        ids = [_commit(checkout) for checkout in (HERE, wanted.checkout.resolve())]
        sides = Side(ids[0], HERE, source, scratch), Side(ids[1], wanted.checkout.resolve(), source, scratch)
        for side in sides:
            side.materialize(bench)
        found = measured(bench, sides, wanted.rounds)
        facts = machine(scratch) | {
            "commits": f"{ids[0]} against {ids[1]}",
            "command": f"`python benchmarks/against.py CHECKOUT --blocks {wanted.blocks} --rounds {wanted.rounds}`",
        }
    head = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    text = f"# Against another checkout\n\n{head}\n\n{table(found, (ids[0], ids[1])).markdown()}"
    costs = {key: [[asdict(cost) for cost in pair] for pair in pairs] for key, pairs in found.items()}
    write_results(wanted.results, "against", text, {"machine": facts, "costs": costs})
    print(text)


def _commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
