"""The sections about weights: loading them against its floors, and whole videos in each residency mode.

These two read a real overlay from the disk: blocks of full width, as many as ``Sizes.kept_blocks`` says, everything
else tiny. It is made by the real commands; the second transformer is a bake at strength 0, all links, so that it takes
no room.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _gpu_bench import Bench, Growing, gigabytes
from _gpu_models import installed
from _loading import loading

from ltxpack.reporter import SilentReporter

NEEDED = (
    *("blake3", "jsonschema", "safetensors", "diffusers", "transformers", "av", "PIL"),
    # What jsonschema needs in turn.
    *("jsonschema_specifications", "referencing", "rpds"),
)
ROUNDS = 2
PINNED = 2**30
LAUNCH_EVERY = 0.0005
# What is compared with the plan: the phases in which a transformer is on the card.
STAGES = ("stage 1", "stage 2")


def residency(bench: Bench) -> None:
    """Loading and the modes, on an overlay that is made here and removed."""
    missing = [package for package in NEEDED if not installed(package)]
    if missing:
        bench.table("Residency", ("skipped",)).rows.append((f"not installed here: {', '.join(missing)}",))
        return
    # Else it would count as part of every peak below.
    bench.drop_dit()
    with tempfile.TemporaryDirectory(prefix="ltxpack-gpu-") as folder:
        overlay = make_overlay(bench, Path(folder))
        loading(bench, overlay, ROUNDS)
        bench.release()
        with bench.attempt("pinning"):
            pinning(bench)
        modes(bench, overlay)


def pinning(bench: Bench) -> None:
    """What it costs to pin host memory and how long a launch waits meanwhile, in the runtime's stretches and whole."""
    from ltxpack.runtime.weights.placed import STRETCH

    table = bench.table(
        "Pinning host memory",
        ("at once", "pinned, GB/s", "given back, GB/s", "longest launch meanwhile, ms"),
        f"{gigabytes(PINNED)} GB in memory of huge pages, on a thread; without a card nothing is pinned.",
    )
    for size in (STRETCH, PINNED):
        name = f"{size >> 20} MiB"
        found = dict(zip(("pin", "unpin", "longest launch"), _pinned(bench, size), strict=True))
        for what, seconds in found.items():
            bench.note(f"pinning.{name}.{what}", seconds)
        rates = [f"{PINNED / found[what] / 1e9:.1f}" for what in ("pin", "unpin")]
        table.rows.append((name, *rates, f"{found['longest launch'] * 1e3:.1f}"))


def _pinned(bench: Bench, size: int) -> tuple[float, float, float]:
    """Seconds to pin PINNED bytes in calls of ``size`` and to give them back, and of the longest launch meanwhile."""
    from ltxpack.runtime.weights.copies import Copies, HostMemory

    copies, counter = Copies(bench.device), torch.zeros(1, device=bench.device)
    memories = [HostMemory(size, copies) for _ in range(PINNED // size)]
    for each in memories:
        each.bytes.zero_()
    del each
    seconds, longest = _beside(lambda: [memory.pin() for memory in memories], lambda: counter.add_(1))
    bench.clock.wait()
    begin = time.perf_counter()
    memories.clear()
    return seconds, time.perf_counter() - begin, longest


def _beside(work: Callable[[], object], launch: Callable[[], object]) -> tuple[float, float]:
    """Seconds that ``work`` takes on a thread, and the longest ``launch`` on this one meanwhile."""
    begin, longest = time.perf_counter(), 0.0
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        while not done.done():
            before = time.perf_counter()
            launch()
            longest = max(longest, time.perf_counter() - before)
            time.sleep(LAUNCH_EVERY)
        done.result()
    return time.perf_counter() - begin, longest


def make_overlay(bench: Bench, scratch: Path) -> Path:
    """An overlay with a base and a bake, of one transformer's bytes, in ``scratch``."""
    import _checkpoint

    sizes = bench.sizes
    bench.say(f"an overlay of {sizes.kept_blocks} blocks")
    widths = getattr(_checkpoint, sizes.kept_widths)
    source = _checkpoint.make_source(scratch / "made", sizes.kept_blocks, widths, rank=1)
    overlay = scratch / "out"
    _ltxpack("materialize", source.folder, overlay)
    source.checkpoint.unlink()
    _ltxpack("bake-lora", overlay, "--lora", source.lora, "--strength", "0", "--device", "cpu")
    return overlay


def _ltxpack(*arguments: object) -> None:
    """The real command, from this checkout. Raises RuntimeError with what it said."""
    command = [sys.executable, "-m", "ltxpack", *map(str, arguments)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ltxpack {arguments[0]}: {done.stderr.strip()[-300:]}")


class Switches:
    """When each stage could begin to compute after its phase began, and the most that was allocated in it."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.waited: dict[str, float] = {}
        self.peaks: dict[str, int | None] = {}
        self._phase, self._began = "", 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the pipeline's phases and its sampler."""
        from ltxpack.runtime.sampling.sample import SAMPLERS
        from ltxpack.runtime.session import Timings

        outer, switches = Timings.phase, self

        @contextmanager
        def phase(timings: Any, name: str) -> Iterator[None]:
            switches.bench.clock.wait()
            switches.bench.clock.forget_peak()
            switches._phase, switches._began = name, time.perf_counter()
            with outer(timings, name):
                yield
            switches.peaks[name] = switches.bench.clock.peak()

        def watched(sampler: Any) -> Any:
            def sample(*arguments: Any, **more: Any) -> Any:
                switches.bench.clock.wait()
                switches.waited[switches._phase] = time.perf_counter() - switches._began
                return sampler(*arguments, **more)

            return sample

        with ExitStack() as stack:
            stack.enter_context(patch.object(Timings, "phase", phase))
            stack.enter_context(patch.dict(SAMPLERS, {name: watched(sampler) for name, sampler in SAMPLERS.items()}))
            yield


def modes(bench: Bench, overlay: Path) -> None:
    """Two videos in each residency mode: seconds, what was allocated against the plan, the wait between the stages."""
    shape = bench.sizes.shape
    memory = bench.table(
        f"Residency, {bench.sizes.kept_blocks} blocks of full width: {shape.width} x {shape.height}",
        ("mode", "phase", "planned GB", "measured GB", "measured to planned"),
        "The second video of a process. Planned: weights and activations, as `ltxpack plan` counts them.",
    )
    times = bench.table(
        "Stage switch",
        ("mode", "first video, s", "second video, s", "wait before stage 1, ms", "wait before stage 2, ms"),
        "From the end of the phase before to the first evaluation; text encoder and codecs are tiny, steps are few.",
    )
    for mode in bench.sizes.modes:
        with bench.attempt(f"residency {mode}"):
            bench.say(f"two videos, {mode}")
            _mode(bench, overlay, mode, memory, times)
        bench.release()


def _mode(bench: Bench, overlay: Path, mode: str, memory: Growing, times: Growing) -> None:
    from ltxpack.runtime.pipeline import Pipeline
    from ltxpack.runtime.request import Request

    shape = bench.sizes.shape
    switches, seconds = Switches(bench), []
    make = Pipeline.from_overlay(
        overlay,
        stage1="base",
        stage2=_bake(overlay),
        device=str(bench.device),
        dtype=str(bench.dtype).removeprefix("torch."),
        residency=mode,
        cache=False,
        reporter=SilentReporter(),
    )
    with make, switches.watching():
        requests = [
            Request.of(
                f"A boat, number {n}.", seed=n, height=shape.height, width=shape.width, num_frames=shape.frames, steps=2
            )
            for n in (1, 2)
        ]
        make.encode_ahead(requests)
        for request in requests:
            begin = time.perf_counter()
            make.make(request)
            bench.clock.wait()
            seconds.append(time.perf_counter() - begin)
        plan = make.session.residency.plan
    assert plan is not None
    planned = {phase.name: phase.card for phase in plan.phases}
    for phase in STAGES:
        measured = switches.peaks[phase]
        bench.found[f"residency.{mode}.{phase}"] = {"planned": planned[phase], "measured": measured}
        share = "-" if measured is None else f"{measured / planned[phase]:.3f}"
        memory.rows.append((mode, phase, gigabytes(planned[phase]), gigabytes(measured), share))
    waits = [bench.note(f"residency.{mode}.wait.{phase}", switches.waited[phase]) for phase in STAGES]
    bench.found[f"residency.{mode}.seconds"] = seconds
    times.rows.append((mode, *(f"{one:.2f}" for one in seconds), *(f"{one * 1e3:.1f}" for one in waits)))


def _bake(overlay: Path) -> str:
    from ltxpack.manifest import read_manifest

    [name] = read_manifest(overlay).bakes
    return name
