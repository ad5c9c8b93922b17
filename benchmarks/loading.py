"""How long a transformer takes from a cold disk to the device, against its floors and against loader libraries; and
how long from the page cache.

    python benchmarks/loading.py [--blocks 8] [--rounds 7] [--device auto|cuda|cpu] [--scratch FOLDER]
                                 [--no-libraries] [--quick] [--results FOLDER]

Without a card host memory stands in for the card's: memory that the process has used before, so that its pages are
there, as a card's are. The way is the card's, through the same buffers, and the copy out of them is the CPU's. Loader
libraries are compared where they are installed (``pip install --no-deps runai-model-streamer fastsafetensors
humanize``).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from _gpu_bench import Bench
from _gpu_residency import make_overlay
from _gpu_sizes import REAL, TINY
from _loading import FLOORS, loading, loading_again, shards_of, ways
from _report import RESULTS, Table, machine, write_results

# With these the C library keeps what is freed, pages and all, instead of giving it back to the system.
KEEP_PAGES = {
    "GLIBC_TUNABLES": f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={1 << 40}:glibc.malloc.top_pad={1 << 26}"
}
STATUS = Path("/proc/self/status")


def main() -> None:
    """Measure, print, and keep the results."""
    wanted = _arguments()
    if wanted.once:
        name, overlay = wanted.once
        print(_memory_of(name, Path(overlay)))
        return
    if wanted.device == "cpu" and os.environ.get("GLIBC_TUNABLES") != KEEP_PAGES["GLIBC_TUNABLES"]:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_PAGES})
    if wanted.device == "cpu":
        # One core copies, in the place of the card's copy engine.
        torch.set_num_threads(1)
    bench, libraries = _bench(wanted.device, wanted.blocks, wanted.quick), not wanted.no_libraries
    with tempfile.TemporaryDirectory(prefix="ltxpack-loading-", dir=wanted.scratch) as folder:
        facts = machine(Path(folder))
        facts["device"] = torch.cuda.get_device_name() if wanted.device == "cuda" else "host memory in a card's place"
        overlay = make_overlay(bench, Path(folder))
        memory = [_memory(bench, overlay, libraries)] if wanted.device == "cpu" else []
        if wanted.device == "cpu":
            # Ways ask for pieces of different sizes: with room to spare none needs pages that are not there yet.
            torch.zeros(sum(path.stat().st_size for path in shards_of(overlay)) * 5 // 4, dtype=torch.uint8)
        # The first time pages are made and libraries loaded.
        for way in ways(bench, overlay, libraries=libraries).values():
            way()
        loading(bench, overlay, wanted.rounds, libraries)
        loading_again(bench, overlay, wanted.rounds)
        tables = [*(growing.table() for growing in bench.tables), *memory]
    head = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    text = "\n".join([f"# Loading\n\n{head}\n", *(table.markdown() for table in tables)])
    results = wanted.results or (None if wanted.quick else RESULTS)
    if results is not None:
        write_results(
            results, f"loading-{bench.sizes.kept_blocks}-blocks", text, {"machine": facts, "found": bench.found}
        )
    print(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8, help="of real width, 0.8 GB each (8)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--scratch", type=Path, default=None, help="on the disk that is measured")
    parser.add_argument("--no-libraries", action="store_true", help="only the floors and ours")
    parser.add_argument("--quick", action="store_true", help="tiny widths; nothing is kept without --results")
    parser.add_argument("--results", type=Path, help="folder for the dated table (default: benchmarks/results)")
    parser.add_argument("--once", nargs=2, metavar=("WAY", "OVERLAY"), help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.device == "auto":
        wanted.device = "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def _bench(device: str, blocks: int, quick: bool) -> Bench:
    sizes = TINY if quick else replace(REAL, kept_blocks=blocks)
    return Bench(sizes, torch.device(device), torch.bfloat16, {}, lambda line: print(line, file=sys.stderr, flush=True))


def _memory(bench: Bench, overlay: Path, libraries: bool) -> Table:
    """What each way has in memory at its largest moment beside the weights themselves, in a process of its own."""
    size = sum(path.stat().st_size for path in shards_of(overlay))
    rows = []
    for name in (name for name in ways(bench, overlay, libraries=libraries) if name not in FLOORS):
        command = [sys.executable, __file__, "--once", name, str(overlay)]
        plain = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
        done = subprocess.run(command, env=plain, capture_output=True, text=True, check=True)
        beside = int(done.stdout) - size
        bench.found[f"loading.{name}.memory beside the weights"] = beside
        rows.append((name, f"{beside / 1e6:.0f} MB"))
    note = "Growth of the resident memory at its peak, less the weights; pages of mapped files count."
    return Table("Host memory beside the weights", ("", "at its peak"), tuple(rows), note)


def _memory_of(name: str, overlay: Path) -> int:
    """Bytes by which the process grows while it loads once."""
    bench = _bench("cpu", 0, quick=False)
    way: Any = ways(bench, overlay)[name]
    before = _status("VmRSS")
    way()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
