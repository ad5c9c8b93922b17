"""What a video of full size takes of cards of several sizes, against the plan: two videos of the 22B model on each.

    python benchmarks/nullcard.py python benchmarks/memory.py [--cards 24 32 48 80 141] [--compile] [--results FOLDER]

Needs no card: on the one that computes nothing (nullcard.py) torch's allocator gives out and refuses memory as it would
on a real one, and only what cuDNN takes beside it is missing. The overlay is of the published sizes, its weights are
holes in files, read and checked like any. Of each card 0.5 GB are hidden, as what libraries take.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _full_size import make_full_size
from _report import RESULTS, Table, machine, write_results

CARDS = (24, 32, 48, 80, 141)
GIGA = 10**9
HIDDEN = GIGA // 2
HEIGHT, WIDTH, FRAMES, STEPS = 1088, 1920, 121, 2
# In the plan encoding a prompt has two phases, in a run one.
WITHIN = {"text": ("text", "connectors")}
PHASES = ("text", "stage 1", "upsample", "stage 2", "video")


def main() -> int:
    """Run on each card in a process of its own; print, and keep the results. 1 if a video was not made."""
    wanted = _arguments()
    if wanted.once:
        print(json.dumps(two_videos(wanted.once, compiled=wanted.compile)))
        return 0
    with tempfile.TemporaryDirectory(prefix="ltxpack-memory-", dir=wanted.scratch) as folder:
        print("an overlay of full size", file=sys.stderr)
        overlay = make_full_size(Path(folder) / "out")
        facts = machine(Path(folder))
        found = {card: _on_card(card, overlay, wanted.compile) for card in wanted.cards}
    how = "compiled" if wanted.compile else "eager"
    note = (
        f"Second of two videos of {WIDTH} x {HEIGHT}, {FRAMES} frames, {STEPS} steps, {how}; GB allocated, and their "
        "ratio to what was planned. Reserved: the most torch had of the card, which ends where the card does. "
        "The card computes nothing: what cuDNN takes beside torch is not in it."
    )
    columns = ("card", "mode", *PHASES, "most to planned", "reserved")
    table = Table("Memory of the card, against the plan", columns, tuple(_row(*pair) for pair in found.items()), note)
    head = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    text = f"# Memory at full size\n\n{head}\n\n{table.markdown()}"
    write_results(wanted.results, f"memory-{how}", text, {"machine": facts, "found": found})
    print(text)
    return int(any("failed" in one for one in found.values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cards", type=int, nargs="+", default=CARDS, help="GB of each card")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--scratch", type=Path, help="a filesystem that keeps holes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--once", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _on_card(card: int, overlay: Path, compiled: bool) -> dict[str, Any]:
    print(f"{card} GB", file=sys.stderr)
    command = [sys.executable, __file__, "--once", str(overlay), *(["--compile"] if compiled else [])]
    size = {"NULLCARD_BYTES": str(card * GIGA), "NULLCARD_HIDDEN": str(HIDDEN)}
    done = subprocess.run(command, env={**os.environ, **size}, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-3:]}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def two_videos(overlay: Path, *, compiled: bool) -> dict[str, Any]:
    """The mode, and of each phase the bytes planned, allocated and reserved in the second video."""
    from ltxpack.runtime.pipeline import Pipeline
    from ltxpack.runtime.request import Request

    peaks: dict[str, tuple[int, int]] = {}
    with (
        Pipeline.from_overlay(overlay, device="cuda", cache=False, compile=compiled) as make,
        _watching(peaks),
    ):
        for seed in (1, 2):
            make.make(Request.of("A boat.", seed=seed, height=HEIGHT, width=WIDTH, num_frames=FRAMES, steps=STEPS))
        plan = make.session.residency.plan
    assert plan is not None
    planned = {phase.name: phase.card for phase in plan.phases}
    return {
        "mode": plan.mode,
        "phases": {
            name: {
                "planned": max(planned[part] for part in WITHIN.get(name, (name,))),
                "allocated": peaks[name][0],
                "reserved": peaks[name][1],
            }
            for name in PHASES
        },
    }


@contextmanager
def _watching(peaks: dict[str, tuple[int, int]]) -> Iterator[None]:
    """Have every phase enter the most it had allocated and reserved."""
    import torch

    from ltxpack.runtime.session import Timings

    outer = Timings.phase

    @contextmanager
    def phase(timings: Any, name: str) -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with outer(timings, name):
            yield
        peaks[name] = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())

    with patch.object(Timings, "phase", phase):
        yield


def _row(card: int, found: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in found:
        return (f"{card} GB", "failed", *["-"] * (len(PHASES) + 1), " ".join(found["failed"])[:200])
    phases = found["phases"].values()
    cells = [f"{one['allocated'] / GIGA:.1f} ({one['allocated'] / one['planned']:.3f})" for one in phases]
    most = max(one["allocated"] for one in phases) / max(one["planned"] for one in phases)
    reserved = max(one["reserved"] for one in phases)
    return (f"{card} GB", found["mode"], *cells, f"{most:.3f}", f"{reserved / GIGA:.1f}")


if __name__ == "__main__":
    sys.exit(main())
