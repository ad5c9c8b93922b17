"""What a measurement is told with: spreads, markdown tables, the machine it ran on, and where results are kept."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("torch", "safetensors", "diffusers", "peft", "numpy", "blake3")
MATRIX_UNIT = "amx_bf16"
BF16_FLAGS = (MATRIX_UNIT, "avx512_bf16")


@dataclass(frozen=True)
class Spread:
    """Median, least and largest of several runs."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 2) -> str:
        """``1.23 (1.20-1.31)``; the median alone where there was one run."""
        if self.low == self.high:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading; ``note`` stands below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """The table as markdown, first column left, the others right."""
        lines = [f"### {self.title}", "", _line(self.columns), _line(("---", *["---:"] * (len(self.columns) - 1)))]
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else []), ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def machine(scratch: Path) -> dict[str, str]:
    """The facts that decide how fast it goes. Nothing in it names the machine or a path."""
    info = _cpuinfo()
    units = [flag for flag in BF16_FLAGS if flag in info.get("flags", "").split()]
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "date": datetime.date.today().isoformat(),
        "CPU": f"{info.get('model name', platform.machine())}, {usable_cores()} cores",
        "bf16 unit": ", ".join(units) or "none",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB",
        "filesystem": filesystem(scratch),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "load average at the start": f"{os.getloadavg()[0]:.1f}",
    }


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def filesystem(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The type of the filesystem that ``folder`` lies on; "unknown" where the system does not say."""
    place, best, kind = folder.resolve(), -1, "unknown"
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return kind
    for line in lines:
        _, mounted, found, *_ = line.split()
        if place.is_relative_to(mounted) and len(mounted) >= best:
            best, kind = len(mounted), found
    return kind


def write_results(folder: Path, stem: str, text: str, document: dict[str, Any]) -> Path:
    """``<stem>-<date>.md`` and ``.json`` in ``folder``; returns the former."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-{datetime.date.today().isoformat()}.md"
    path.write_text(text, encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
