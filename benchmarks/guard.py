"""What can be counted and must not grow unnoticed, against guard.json; the test suite runs it (tests/test_guard.py).

    python benchmarks/guard.py [--only GROUP …]             # compares: exit status 1 where a number differs
    python benchmarks/guard.py --record [--only GROUP …]    # records anew; CHANGELOG.md says why

Needs neither a card nor the published files, and times nothing. Each number is compared within the tolerance of its
kind, in both directions: what has shrunk is recorded too, so that it cannot grow back.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path

# As pytest has them: the package, and the tests' hub.
ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / part) for part in ("", "tests", "tests/materialize")]

RECORD = Path(__file__).with_suffix(".json")
COMMAND = "python benchmarks/guard.py --record"
# The kind of a number, which ends its name -> by which share it may differ; others may not at all.
TOLERANCES = {
    "FLOP": 1e-4,
    "bytes moved by kernels": 1e-2,
    "card memory": 1e-3,
    "host memory": 1e-3,
    "reads": 1e-3,
    "bytes read": 1e-4,
    "bytes written": 1e-4,
    "bytes linked": 1e-4,
    # Says whether a graph has to be scheduled again.
    "trace": math.inf,
}
Numbers = dict[str, int]
# Group -> the module with the function of the same name, which gives what it counts, from what was recorded.
GROUPS = {
    "forwards": "_guard_forward",
    "phases": "_guard_phases",
    "cards": "_guard_cards",
    "videos": "_guard_files",
    "offline": "_guard_files",
    "hub": "_guard_files",
}
# What is launched and fused depends on torch.
OF_TORCH = ("forwards", "phases")


def counted(group: str, before: Numbers) -> Numbers:
    """The numbers of a group as they are now; ``before``: as they were recorded."""
    count: Callable[[Numbers], Iterator[tuple[str, int]]] = getattr(import_module(GROUPS[group]), group)
    return dict(count(before))


def recorded(group: str) -> Numbers:
    """The numbers of a group as they were recorded."""
    numbers: Numbers = json.loads(RECORD.read_text(encoding="utf-8")).get(group, {})
    return numbers


def of_another_torch(group: str) -> str | None:
    """Why a group cannot be compared, or None."""
    was, now = json.loads(RECORD.read_text(encoding="utf-8")).get("torch", {}).get(group), _torch()
    return f"{group}: recorded with torch {was}, this is torch {now}" if group in OF_TORCH and was != now else None


def faults(was: Numbers, now: Numbers) -> list[str]:
    """One line for every number that differs by more than it may, that is not recorded, or no longer counted."""
    told = []
    for name in (*was, *(name for name in now if name not in was)):
        if name not in was:
            told.append(f"{name}: {now[name]:,} is not recorded")
        elif name not in now:
            told.append(f"{name}: {was[name]:,} is recorded, and nothing is counted under this name")
        elif abs(now[name] - was[name]) > (allowed := TOLERANCES.get(name.rpartition(": ")[2], 0)) * was[name]:
            share = f" ({now[name] / was[name] - 1:+.2%}, {allowed:.2%} is allowed)" if was[name] else ""
            told.append(f"{name}: {was[name]:,} is recorded, {now[name]:,} is counted{share}")
    return told


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, or record. 1 if something differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write what is counted into guard.json")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    wanted = parser.parse_args(arguments)
    if wanted.record:
        _record({group: counted(group, {}) for group in wanted.only})
        return 0
    differ = []
    for group in wanted.only:
        told = of_another_torch(group)
        if told is None:
            was = recorded(group)
            numbers = counted(group, was)
            differ += faults(was, numbers)
            told = f"{group}: {len(numbers)} numbers"
        print(told)
    print(report(differ), end="")
    return int(bool(differ))


def report(differ: Sequence[str]) -> str:
    """The faults and what to do about them; empty without any."""
    if not differ:
        return ""
    return "\n".join([*differ, f"next: if this is meant, {COMMAND}, and say in CHANGELOG.md why", ""])


def _record(found: Mapping[str, Numbers]) -> None:
    before = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    before["torch"] = {**before.get("torch", {}), **{group: _torch() for group in OF_TORCH if group in found}}
    ordered = {name: ({**before, **found}).get(name) for name in ("torch", *GROUPS)}
    document = {name: value for name, value in ordered.items() if value is not None}
    RECORD.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _torch() -> str:
    import torch

    return torch.__version__.partition("+")[0]


if __name__ == "__main__":
    sys.exit(main())
