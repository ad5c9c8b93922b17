"""How fast the runtime is on a GPU, and whether it is right there: one call that ends in tables, within ten minutes.

    python benchmarks/gpu.py [--seconds 540] [--only NAME …] [--skip NAME …] [--results FOLDER]
                             [--compiler inductor|trace|none] [--recipe hq|distilled] [--dry-run]

Weights of full size are random and made on the device; only the section about residency reads an overlay from a disk,
a few GB that are made there and removed. Sections run in the order of the table below; each has its share of the time,
and what it had measured when that is over stands. ``--dry-run`` goes through all of it on the CPU at tiny widths: it
shows that the benchmark works, not how fast anything is.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# On a fresh machine the package is not installed: the checkout is enough.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from _gpu_bench import Bench
from _gpu_checks import checks
from _gpu_clock import OutOfTime, at_most
from _gpu_codes import codes
from _gpu_forward import attention, diffusers, forward, rates
from _gpu_models import installed
from _gpu_residency import residency
from _gpu_sizes import REAL, TINY
from _gpu_video import decode, diffusers_or_a_line, video
from _report import RESULTS, Table, machine, write_results

from ltxpack.runtime.sampling.recipes import HQ, RECIPES, Recipe

# Options of torch.compile. Compiling for a CPU takes a minute and shows little more than tracing does.
COMPILERS: dict[str, dict[str, Any]] = {
    "inductor": {"fullgraph": True},
    "trace": {"fullgraph": True, "backend": "eager"},
    "none": {"disable": True},
}
# What is kept back to write the results.
RESERVE = 5.0
# Less than this is not worth beginning a section with.
WORTHWHILE = 8.0
NO_TIME = "no time left"


def cards(bench: Bench) -> None:
    """The section about several cards, whose counts are the planner's."""
    if not installed("blake3"):
        bench.table("Several cards", ("skipped",)).rows.append(("not installed here: blake3",))
        return
    from _gpu_cards import cards as section

    section(bench)


@dataclass(frozen=True)
class Section:
    """A part of the benchmark and the most seconds it may take."""

    name: str
    seconds: float
    run: Callable[[Bench], None]


# What matters most comes first: should time run out, it is the last ones that are missing.
SECTIONS = (
    Section("rates", 20, rates),
    Section("attention", 30, attention),
    Section("forward", 140, forward),
    Section("diffusers", 120, diffusers_or_a_line("Forward, diffusers' transformer", diffusers)),
    Section("video", 100, video),
    Section("codes", 220, codes),
    Section("residency", 100, residency),
    Section("checks", 60, checks),
    Section("decode", 40, decode),
    Section("cards", 90, cards),
)


@dataclass(frozen=True)
class Settings:
    """What a run is asked for. ``began`` is when the process started, by ``time.monotonic``."""

    seconds: float
    sections: tuple[Section, ...]
    results: Path
    dry: bool
    compiler: str
    began: float
    recipe: Recipe = HQ

    @property
    def left(self) -> float:
        """Seconds until the results must be written."""
        return self.seconds - RESERVE - (time.monotonic() - self.began)


def run(settings: Settings, say: Callable[[str], None]) -> tuple[str, dict[str, Any], bool]:
    """Every section; the text, the document, and whether all went well. Results are kept after each."""
    bench = Bench(
        sizes=TINY if settings.dry else REAL,
        device=torch.device("cpu" if settings.dry else "cuda"),
        dtype=torch.float32 if settings.dry else torch.bfloat16,
        compiler=COMPILERS[settings.compiler],
        say=say,
        recipe=settings.recipe,
    )
    facts = machine_facts(bench.device, settings)
    outcome: list[tuple[str, float, str]] = []
    for section in settings.sections:
        begin = time.monotonic()
        told = _guarded(section, bench, settings)
        outcome.append((section.name, time.monotonic() - begin, told))
        say(f"{section.name}: {told}")
        text, document = report(bench, facts, outcome)
        write_results(settings.results, "gpu", text, document)
    ended = all(told in ("done", NO_TIME) for _, _, told in outcome)
    return text, document, ended and not bench.failures


def _guarded(section: Section, bench: Bench, settings: Settings) -> str:
    """How the section ended, in a word or a line."""
    if settings.left < WORTHWHILE:
        return NO_TIME
    try:
        with at_most(min(section.seconds, settings.left)):
            section.run(bench)
    except OutOfTime:
        return "stopped: its time was over"
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return f"failed: {type(error).__name__}: {first[:200]}"
    finally:
        bench.release()
    return "done"


def report(
    bench: Bench, facts: dict[str, str], outcome: Sequence[tuple[str, float, str]]
) -> tuple[str, dict[str, Any]]:
    """The tables as markdown, and everything as JSON values."""
    title = "# The runtime on a GPU" + (" (dry run: no measurement)" if bench.sizes is TINY else "")
    lines = [title, "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    tables = [growing.table() for growing in bench.tables]
    if bench.failures:
        tables.append(Table("What failed", ("what", "why"), tuple(bench.failures)))
    rows = tuple((name, f"{spent:.0f}", told) for name, spent, told in outcome)
    tables.append(Table("Sections", ("section", "s", "outcome"), rows))
    text = "\n".join([*lines, *(table.markdown() for table in tables)])
    document = {
        "machine": facts,
        "found": bench.found,
        "failures": bench.failures,
        "sections": [{"name": name, "seconds": spent, "outcome": told} for name, spent, told in outcome],
        "tables": [
            {"title": table.title, "columns": table.columns, "rows": table.rows, "note": table.note} for table in tables
        ],
    }
    return text, document


def machine_facts(device: torch.device, settings: Settings) -> dict[str, str]:
    """The machine and the card; no name and no path of it."""
    facts = machine(settings.results.absolute().parent)
    facts.pop("filesystem", None)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        facts["card"] = f"{card.name}, {card.multi_processor_count} multiprocessors"
        facts["memory of the card"] = f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB free"
        cudnn: Callable[[], Any] = torch.backends.cudnn.version
        facts["CUDA"] = f"{torch.version.cuda}, cuDNN {cudnn()}"
    else:
        facts["card"] = f"none, {platform.machine()}"
    facts["sections"] = " ".join(section.name for section in settings.sections)
    return facts


def settings_from(arguments: Sequence[str] | None, began: float) -> Settings:
    """The command line. Exits with status 2 for wrong use, or without a CUDA device."""
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=540.0, help="all of it, results written (540)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these sections")
    parser.add_argument("--skip", nargs="+", choices=names, default=[], help="not these sections")
    parser.add_argument("--results", type=Path, default=None, help="where the dated tables are kept")
    parser.add_argument("--dry-run", action="store_true", help="tiny widths on the CPU")
    parser.add_argument("--compiler", choices=COMPILERS, default=None, help="inductor; in a dry run trace")
    parser.add_argument("--recipe", choices=("hq", "distilled"), default="hq", help="of the whole video")
    given = parser.parse_args(arguments)
    if given.dry_run and given.results is None:
        parser.error("a dry run is no result: say where to keep it with --results FOLDER")
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --dry-run goes through it on the CPU")
    chosen = tuple(one for one in SECTIONS if one.name in given.only and one.name not in given.skip)
    compiler = given.compiler or ("trace" if given.dry_run else "inductor")
    return Settings(
        given.seconds, chosen, given.results or RESULTS, given.dry_run, compiler, began, RECIPES[given.recipe]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and print the tables last; 1 if a section failed or something is wrong on this device."""
    settings = settings_from(arguments, time.monotonic())
    text, _, well = run(
        settings, lambda line: print(f"[{time.monotonic() - settings.began:6.1f}] {line}", file=sys.stderr)
    )
    print(text)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
