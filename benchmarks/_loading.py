"""Loading a transformer from the disk to a device: ltxpack's way, what no way can beat, and what else could be taken.

Used by ``loading.py`` alone and by the section of ``gpu.py`` about residency.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _gpu_bench import Bench
from _gpu_models import installed
from _measure import make_cold, resident
from _report import spread

AUTO, CACHED, DIRECT = "auto", "cached", "direct"
# Through the system's page cache, or past it.
READ = {CACHED: "read of the files, through the page cache", DIRECT: "read of the files, past the page cache"}
OURS = {AUTO: "ours", CACHED: "ours, --reads cached"}
OURS_AGAIN = {AUTO: "ours", DIRECT: "ours, --reads direct"}
COPY = "copy to the device"
FLOORS = (*READ.values(), COPY)
READS = 6
PIECE = 32 * 2**20
HUGE_PAGE = 2 * 2**20

# Loads once, and gives the seconds until everything is there.
Way = Callable[[], float]


def loading(bench: Bench, overlay: Path, rounds: int, libraries: bool = True) -> None:
    """Every way in turn, ``rounds`` times, from a cold disk; the ratio of each to the floor of its round.

    The floor is the larger of the copy and the faster of the two reads.
    """
    shards = shards_of(overlay)
    seconds = _in_turn(bench, ways(bench, overlay, OURS, libraries), rounds, lambda: make_cold(shards))
    _tell(bench, "loading", "from a cold disk", shards, seconds)


def loading_again(bench: Bench, overlay: Path, rounds: int) -> None:
    """As :func:`loading`, with the files in the page cache, as a process finds them after another."""
    shards = shards_of(overlay)

    def warm() -> None:
        for path in shards:
            if resident(path) < 1:
                _read_floor([path], direct=False)

    seconds = _in_turn(bench, ways(bench, overlay, OURS_AGAIN, libraries=False), rounds, warm)
    there = min(resident(path) for path in shards)
    told = f"{100 * there:.0f} % of the files in the page cache"
    _tell(bench, "loading again", told, shards, seconds)


def _in_turn(bench: Bench, found: dict[str, Way], rounds: int, before: Callable[[], object]) -> dict[str, list[float]]:
    """The seconds of each way in each round, ``before`` done before each."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(rounds):
        for name, way in found.items():
            before()
            seconds[name].append(way())
            bench.release()
            bench.say(f"{turn + 1}/{rounds} {name}: {seconds[name][-1]:.2f} s")
    return seconds


def _tell(bench: Bench, key: str, how: str, shards: Sequence[Path], seconds: dict[str, list[float]]) -> None:
    size = sum(path.stat().st_size for path in shards)
    rounds = len(seconds[COPY])
    table = bench.table(
        f"Loading a transformer of {size / 1e9:.1f} GB, {how}",
        ("", "s", "GB/s", "to the floor"),
        f"Medians of {rounds} rounds, ratios within a round. The floor is the larger of the copy and the faster read. "
        "Ours compares every byte with the manifest (blake3); no other does.",
    )
    reads = (seconds[read] for read in READ.values())
    floors = [max(copy, min(read)) for copy, *read in zip(seconds[COPY], *reads, strict=True)]
    for name, found in seconds.items():
        middle = bench.note(f"{key}.{name}", spread(found).median)
        ratio = spread([one / floor for one, floor in zip(found, floors, strict=True)])
        bench.note(f"{key}.{name} to the floor", ratio.median)
        bench.found[f"{key}.{name}.seconds"] = found
        table.rows.append((name, f"{middle:.2f}", f"{size / middle / 1e9:.2f}", ratio.text()))


def ways(bench: Bench, overlay: Path, ours: Mapping[str, str] = OURS, libraries: bool = True) -> dict[str, Way]:
    """By name; the floors first. ``ours``: the ways to read, and their names. ``libraries``: also those installed."""
    shards = shards_of(overlay)
    size = sum(path.stat().st_size for path in shards)
    found: dict[str, Way] = {name: partial(_read_floor, shards, how == DIRECT) for how, name in READ.items()}
    found[COPY] = partial(_copy_floor, bench, size)
    found |= {name: partial(_ours, bench, overlay, how) for how, name in ours.items()}
    for package, (name, tensors) in LIBRARIES.items():
        if libraries and installed(package):
            found[name] = partial(_library, bench, shards, tensors)
    return found


def shards_of(overlay: Path) -> list[Path]:
    """The files of the base transformer."""
    return sorted((overlay / "transformer").glob("*.safetensors"))


def _read_floor(files: Sequence[Path], direct: bool) -> float:
    """Seconds to read every byte into a few buffers of huge pages, several reads in flight."""
    buffers = [_buffer() for _ in range(READS)]

    def read(slot: int) -> None:
        for path in files:
            file, size = _open(path, direct), path.stat().st_size
            try:
                for start in range(slot * PIECE, size, READS * PIECE):
                    done = 0
                    while start + done < size and done < PIECE:
                        done += os.preadv(file, [buffers[slot][done:]], start + done)
            finally:
                os.close(file)

    begin = time.perf_counter()
    with ThreadPoolExecutor(READS) as pool:
        list(pool.map(read, range(READS)))
    return time.perf_counter() - begin


def _open(path: Path, direct: bool) -> int:
    """Past the page cache where the filesystem allows it, as ours does."""
    if direct:
        with contextlib.suppress(OSError):
            return os.open(path, os.O_RDONLY | os.O_DIRECT)
    return os.open(path, os.O_RDONLY)


def _buffer() -> memoryview:
    """PIECE bytes that begin on a huge page and are there."""
    memory = mmap.mmap(-1, PIECE + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8).zero_()
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + PIECE].numpy().data


def _copy_floor(bench: Bench, size: int) -> float:
    """Seconds to bring so many bytes from host memory, pinned where there is a card, to the device, in pieces."""
    pinned = bench.device.type == "cuda"
    source = torch.zeros(min(size, PIECE), dtype=torch.uint8, pin_memory=pinned)
    lengths = (min(PIECE, size - start) for start in range(0, size, PIECE))
    targets = [torch.empty(length, dtype=torch.uint8, device=bench.device) for length in lengths]
    bench.clock.wait()
    begin = time.perf_counter()
    for target in targets:
        target.copy_(source[: len(target)], non_blocking=True)
    bench.clock.wait()
    return time.perf_counter() - begin


def _ours(bench: Bench, folder: Path, reads: str) -> float:
    """As the runtime uses it: checked and hashed."""
    from ltxpack.runtime.model.weights import load_dit
    from ltxpack.runtime.overlay import Overlay
    from ltxpack.runtime.weights.keeper import Residency

    residency = Residency(Overlay.open(folder), bench.device, torch.bfloat16, reads=reads)
    begin = time.perf_counter()

    def ready(_: Any) -> float:
        bench.clock.wait()
        return time.perf_counter() - begin

    try:
        return residency.use("transformer", load_dit, ready)
    finally:
        residency.close()


# The tensors of a file by name, on the device, in memory of their own.
Tensors = Callable[[Sequence[Path], torch.device], dict[str, torch.Tensor]]


def _library(bench: Bench, files: Sequence[Path], tensors: Tensors) -> float:
    begin = time.perf_counter()
    held = tensors(files, bench.device)
    bench.clock.wait()
    spent = time.perf_counter() - begin
    del held
    return spent


def _safetensors(files: Sequence[Path], device: torch.device) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found = {name: tensor for path in files for name, tensor in load_file(path, device=str(device)).items()}
    # On the CPU it maps the file: the bytes are read when somebody looks at them.
    return {name: tensor.clone() for name, tensor in found.items()} if device.type == "cpu" else found


def _model_streamer(files: Sequence[Path], device: torch.device) -> dict[str, torch.Tensor]:
    streaming: Any = importlib.import_module("runai_model_streamer")
    with streaming.SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in files])
        return {name: tensor.to(device, copy=True) for name, tensor in streamer.get_tensors()}


def _fastsafetensors(files: Sequence[Path], device: torch.device) -> dict[str, torch.Tensor]:
    fast: Any = importlib.import_module("fastsafetensors")
    where = f"cuda:{torch.cuda.current_device()}" if device.type == "cuda" else "cpu"
    with fast.fastsafe_open([str(path) for path in files], nogds=True, device=where) as opened:
        names = opened.keys()
        return {name: opened.get_tensor(name) for name in names}


# Package -> the name in the table, and what loads with it.
LIBRARIES: dict[str, tuple[str, Tensors]] = {
    "safetensors": ("safetensors", _safetensors),
    "runai_model_streamer": ("Run:ai Model Streamer", _model_streamer),
    "fastsafetensors": ("fastsafetensors", _fastsafetensors),
}
