"""What ISSUE 3 asks of the offline stage, and the tables that say what was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from _items import FP8_EXPORT
from _measure import Costs, Item
from _report import Table, spread

GB, MB = 1e9, 1e6
COPY_RATIO, COPY_PEAK, COPY_CPU, COPY_GROWTH = 1.0, 100 * MB, 0.5, 8 * MB
BAKE_RATIO, BAKE_PEAK, BAKE_TARGETS = 1.0, 350 * MB, 3
# Without a matrix unit the products themselves may take longer than the disk: held against the larger of the two.
ARITHMETIC_RATIO = 1.1
JUDGED = {True: "yes", False: "**no**", None: "not judged here"}


@dataclass(frozen=True)
class Mark:
    """A limit, and what was found; ``met`` None where it is not stated for such a machine or such widths."""

    what: str
    limit: str
    found: str
    met: bool | None


@dataclass(frozen=True)
class Flat:
    """Peak memory of one checkpoint's copy and bake, in bytes; ``limit`` is that of the bake."""

    blocks: int
    size: int
    copy: int
    bake: int
    limit: float


@dataclass(frozen=True)
class Findings:
    """Everything measured. ``start``: seconds before the first byte, by item; ``real``: at the widths of LTX-2.3.

    ``sums``: bytes of float32 sums that are there while codes are made. ``arithmetic``: seconds of the bare matrix
    products, by bake; ``matrix_unit``: this processor has one.
    """

    items: Mapping[str, Item]
    costs: Costs
    start: Mapping[str, float]
    flat: Sequence[Flat]
    bake_limit: float
    sums: float
    real: bool
    arithmetic: Mapping[str, float]
    matrix_unit: bool

    def marks(self) -> list[Mark]:
        """Every limit that this benchmark can see, held against its finding."""
        return [*self._copy(), *self.bake_marks()]

    def bake_marks(self) -> list[Mark]:
        """Those of bakes, and of exports with a LoRA."""
        return [mark for key in self.arithmetic for mark in self._bake(key)]

    def ratios(self, key: str, less: float = 0.0, at_least: float = 0.0) -> list[float]:
        """Wall, ``less`` taken off, over that of the floor (``at_least`` so much) in the same round, pair by pair."""
        floor = self.items[key].floor
        assert floor is not None
        floors = self.costs[floor]
        return [max(0.0, cost.wall - less) / max(at_least, floors[turn].wall) for turn, cost in self.costs[key].items()]

    def cpu(self, key: str) -> float:
        """CPU seconds per GB of payload, the median."""
        return spread([run.cpu for run in self.costs[key].values()]).median / (self.items[key].payload / GB)

    def peak(self, key: str) -> float:
        """The most resident bytes of any run."""
        return max(run.peak for run in self.costs[key].values())

    def _copy(self) -> Iterator[Mark]:
        ratio = spread(self.ratios("ours"))
        yield Mark("copy: wall to cp", "≤ 1.0 ×", f"{ratio.text()} ×", self._timed(ratio.median, COPY_RATIO))
        cpu = self.cpu("ours")
        yield Mark("copy: CPU per GB", "≤ 0.5 s", f"{cpu:.2f} s", self._timed(cpu, COPY_CPU))
        peak = self.peak("ours")
        yield Mark("copy: peak memory", "≤ 100 MB", f"{peak / MB:.0f} MB", peak <= COPY_PEAK)
        if len(self.flat) > 1:
            first, last = self.flat[0], self.flat[-1]
            what = f"copy: growth of memory from {first.blocks} to {last.blocks} blocks"
            growth = last.copy - first.copy
            yield Mark(what, "≤ 8 MB", f"{growth / MB:.1f} MB", growth <= COPY_GROWTH)

    def _bake(self, key: str) -> Iterator[Mark]:
        """The first limit holds on a processor with a matrix unit, the last on any other."""
        name, less, bare = self.items[key].label.rpartition(", ")[2], self.start["ours 1"], self.arithmetic[key]
        ways = (
            ("wall to the floor", 0.0, 0.0, BAKE_RATIO, self.matrix_unit),
            (f"the same less {less:.1f} s of start-up", less, 0.0, BAKE_RATIO, False),
            (f"wall to the larger of the floor and {bare:.1f} s", 0.0, bare, ARITHMETIC_RATIO, not self.matrix_unit),
        )
        for what, off, at_least, limit, judged in ways:
            ratio = spread(self.ratios(key, off, at_least))
            met = self._timed(ratio.median, limit) if judged else None
            yield Mark(f"bake, {name}: {what}", f"≤ {limit} ×", f"{ratio.text()} ×", met)
        peak, limit = self.peak(key), self.bake_limit + (self.sums if key == FP8_EXPORT else 0.0)
        yield Mark(f"bake, {name}: peak memory", f"≤ {limit / MB:.0f} MB", f"{peak / MB:.0f} MB", peak <= limit)

    def _timed(self, found: float, limit: float) -> bool | None:
        return found <= limit if self.real else None

    def cost_table(self, title: str, keys: Sequence[str], note: str = "") -> Table:
        """A line per item: wall, ratio to its floor within each round, speed, CPU, memory."""
        rows = []
        for key in keys:
            item, wall = self.items[key], spread([run.wall for run in self.costs[key].values()])
            ratio = spread(self.ratios(key)).text() if item.floor else "floor"
            speed = item.payload / GB / wall.median
            cells = (wall.text(), ratio, f"{speed:.2f}", f"{self.cpu(key):.2f}", f"{self.peak(key) / MB:.0f}")
            rows.append((item.label, *cells))
        columns = ("", "wall, s", "× the floor", "GB/s", "CPU s per GB", "peak MB")
        return Table(title, columns, tuple(rows), note)


def mark_table(marks: Sequence[Mark]) -> Table:
    """The limits and whether they are met."""
    rows = tuple((mark.what, mark.limit, mark.found, JUDGED[mark.met]) for mark in marks)
    note = (
        "Times are judged by the median of the ratios within a round, memory by the largest of all runs. A bake may "
        "take 350 MB and three times the largest weight with its LoRA, with codes two float32 sums of it more. Its "
        "time is held against the disk where the "
        "processor has a matrix unit (AMX), elsewhere against the larger of that and the bare products of all "
        "targets on all cores."
    )
    return Table("Marks", ("", "limit", "found", "met"), rows, note)


def flat_table(flat: Sequence[Flat]) -> Table:
    """Memory by size."""
    rows = tuple(
        (f"{one.blocks}", f"{one.size / GB:.2f}", *(f"{value / MB:.0f}" for value in (one.copy, one.bake, one.limit)))
        for one in flat
    )
    columns = ("blocks", "checkpoint, GB", "copy, peak MB", "bake, peak MB", "limit of the bake, MB")
    return Table("Memory by size", columns, rows)
