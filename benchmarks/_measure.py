"""Runs commands cold and in turn, and says what each cost: wall and CPU seconds, peak memory of its process tree.

Knows nothing of checkpoints. Cold: everything written is on the disk first, then the files a command reads are put
out of the page cache, and that they are gone is looked at.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

LAUNCHER = Path(__file__).with_name("_launch.py")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
# A share of a file that may stay in the page cache (its mapped first page, say) for it to count as cold.
STILL_COLD = 0.01
LOG_TAIL = 2000

BY_ADVICE = "posix_fadvise(DONTNEED) after fsync"
BY_DROPPING = "posix_fadvise(DONTNEED) after fsync, then drop_caches"
NOT_COLD = "posix_fadvise(DONTNEED) after fsync; part of the files stayed in the page cache"


@dataclass(frozen=True)
class Cost:
    """What one run of a command took. ``peak``: resident bytes of the largest process of its tree."""

    wall: float
    cpu: float
    peak: int


@dataclass(frozen=True)
class Item:
    """One thing to be measured.

    ``payload``: bytes it writes (or, if it writes none, reads). ``floor``: the key of the item it is held against in
    the same round. ``before`` puts things as they were before the first run. ``every``: 2 for every second round.
    """

    key: str
    label: str
    command: tuple[str, ...]
    cold: tuple[Path, ...]
    payload: int
    before: Callable[[], None]
    floor: str | None = None
    every: int = 1


# What was measured: by the key of an item, then by the round.
Costs = dict[str, dict[int, Cost]]


class Bench:
    """Measures in ``scratch``. ``how_cold`` gathers the ways by which files were made cold."""

    def __init__(self, scratch: Path, say: Callable[[str], None]) -> None:
        self.scratch = scratch
        self.how_cold: set[str] = set()
        self._say = say

    def in_turn(self, items: Sequence[Item], runs: int) -> Costs:
        """Every item once per round (or as often as it wants), ``runs`` rounds."""
        costs: Costs = {item.key: {} for item in items}
        for turn in range(runs):
            for item in (item for item in items if turn % item.every == 0):
                cost = costs[item.key][turn] = self.once(item)
                self._say(f"{turn + 1}/{runs} {item.label}: {cost.wall:.2f} s, {cost.peak / 1e6:.0f} MB")
        return costs

    def once(self, item: Item) -> Cost:
        """One cold run. Raises RuntimeError with what the command said if it fails."""
        item.before()
        subprocess.run(["sync", "-f", str(self.scratch)], check=True)
        if item.cold:
            self.how_cold.add(make_cold(item.cold))
        return self.run(item.command)

    def run(self, command: Sequence[str]) -> Cost:
        """Run ``command`` as it is. Raises RuntimeError with the end of what it said if it fails."""
        result, log = self.scratch / "cost.json", self.scratch / "output.log"
        launch = [sys.executable, "-I", "-S", str(LAUNCHER), str(result), str(log), *command]
        subprocess.run(launch, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        found = json.loads(result.read_text())
        if found["status"] != 0:
            said = log.read_text(errors="replace")[-LOG_TAIL:]
            raise RuntimeError(f"{' '.join(command)} ended with {found['status']}:\n{said}")
        return Cost(found["wall"], found["cpu"], found["peak"])


def make_cold(files: Sequence[Path]) -> str:
    """Put ``files`` out of the page cache; how that was done."""
    for path in files:
        _advise_out(path)
    if _all_cold(files):
        return BY_ADVICE
    with contextlib.suppress(OSError):  # only root may
        DROP_CACHES.write_text("1\n")
    return BY_DROPPING if _all_cold(files) else NOT_COLD


def _all_cold(files: Sequence[Path]) -> bool:
    return all(resident(path) <= STILL_COLD for path in files)


def resident(path: Path) -> float:
    """The share of a file's pages that is in the page cache; 0 where the system does not tell."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0 or not hasattr(mmap, "MAP_PRIVATE"):
            return 0.0
        mapped = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    pages = -(-size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    held = ctypes.c_char.from_buffer(mapped)
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        if mincore(ctypes.c_void_p(ctypes.addressof(held)), ctypes.c_size_t(size), found) != 0:
            return 0.0
        return sum(page & 1 for page in bytes(found)) / pages
    finally:
        del held
        mapped.close()


def files_under(folder: Path) -> tuple[Path, ...]:
    """Every regular file of ``folder``, links not followed."""
    return tuple(path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())


def sync_all(folder: Path) -> None:
    """Every file of ``folder``, and the folder itself, on the disk."""
    for path in (*files_under(folder), folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _advise_out(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a read-only filesystem
            os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
