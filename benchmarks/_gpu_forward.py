"""The sections about single forwards: what the card can do, attention alone, our DiT, diffusers' with its weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from _flops import guided_flops
from _gpu_bench import GIGA, STAGES, Bench, Growing, gigabytes
from _gpu_models import contexts, diffusers_dit
from torch import Tensor, nn

from ltxpack.runtime.model import kernels
from ltxpack.runtime.model.block import PLAIN
from ltxpack.runtime.model.model import Pass
from ltxpack.runtime.sampling.shape import AV

# Seconds that one median may take.
BRIEF, LONG = 1.0, 4.0
FORWARD_COLUMNS = ("forward", "stage", "ms", "TFLOP/s", "of the matrix rate", "peak GB")
# Our kernels -> diffusers' names of the same ones.
DIFFUSERS_KERNELS = {
    "cudnn": "_native_cudnn",
    "flash": "_native_flash",
    "efficient": "_native_efficient",
    "math": "_native_math",
    "flash3": "_flash_3",
}


def rates(bench: Bench) -> None:
    """The two ceilings: matrix products of bf16 random numbers, and a copy within the device."""
    sizes, clock = bench.sizes, bench.clock
    table = bench.table("Rates of the device", ("what", "ms", "rate"), "Shares below are of the first rate.")
    dim = bench.config.streams.video.dim
    feed_forwards = [(sizes.lengths(stage).video, dim, 4 * dim) for stage in STAGES]
    shapes = [(sizes.matrix, sizes.matrix, sizes.matrix), *feed_forwards]
    for rows, inner, columns in shapes:
        a = torch.randn(rows, inner, device=bench.device, dtype=bench.dtype)
        b = torch.randn(inner, columns, device=bench.device, dtype=bench.dtype)
        spent = clock.median(partial(torch.matmul, a, b), BRIEF, warm_ups=3)
        rate = 2 * rows * inner * columns / spent / 1e9
        if "rates.matrix" not in bench.found:
            bench.note("rates.matrix", rate)
        table.rows.append((f"matrix product {rows} x {inner} x {columns}", f"{spent:.3f}", f"{rate:.0f} TFLOP/s"))
    source = torch.randint(0, 255, (sizes.copied,), device=bench.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    spent = clock.median(lambda: target.copy_(source), BRIEF, warm_ups=3)
    rate = bench.note("rates.copy", 2 * sizes.copied / spent / 1e9)
    table.rows.append((f"copy of {sizes.copied / GIGA:.2g} GB, read and written", f"{spent:.3f}", f"{rate:.2f} TB/s"))


def attention(bench: Bench) -> None:
    """Every kernel on the video's self-attention at both lengths."""
    table = bench.table(
        "Self-attention of the video, one block", ("kernel", "stage", "ms", "TFLOP/s", "of the matrix rate")
    )
    kind, *_ = bench.kinds
    for name in kernels.KERNELS:
        why = kernels.fault(kind, name)
        # It keeps every score: 68 GB at stage 2.
        if why is None and name == "math" and bench.device.type == "cuda":
            why = "keeps every score in memory"
        if why is not None:
            table.rows.append((name, "-", "-", why, "-"))
            continue
        for stage in STAGES:
            tokens = bench.sizes.lengths(stage).video
            operands = kind.random(tokens, tokens)
            with torch.inference_mode():
                spent = bench.clock.median(partial(kernels.KERNELS[name], *operands), BRIEF)
            rate = 4 * tokens**2 * kind.heads * kind.width / spent / 1e9
            bench.note(f"attention.{name}.stage {stage}", spent)
            table.rows.append((name, str(stage), f"{spent:.2f}", f"{rate:.0f}", bench.share(rate)))


def forward(bench: Bench) -> None:
    """Our DiT: eager with each kernel, and compiled; one pass, and the three of a guided step together."""
    dit = bench.dit
    chosen = bench.choice.name
    table = bench.table("Forward, ours", FORWARD_COLUMNS, f"Attention by {chosen} where not said otherwise.")
    _both_stages(bench, table, f"eager, {chosen}", "ours.eager")
    compiling = bench.table("Compiling", ("what", "stage", "seconds of the first call"))
    with bench.attempt("compiled blocks"), compiled(bench):
        for stage in STAGES:
            _first_calls(bench, stage, compiling)
        _both_stages(bench, table, "compiled", "ours.compiled")
        _guided(bench, table, "guided step, compiled", "ours.guided")
    _guided(bench, table, "guided step, eager", "ours.guided eager")
    for name in kernels.MEASURED:
        if name != chosen and not any(kernels.fault(kind, name) for kind in bench.kinds):
            dit.use_attention(name)
            with bench.attempt(f"eager, {name}"):
                _both_stages(bench, table, f"eager, {name}", f"ours.eager {name}")
    dit.use_attention(bench.choice.kernels)


def _first_calls(bench: Bench, stage: int, table: Growing) -> None:
    """One pass, then the three of a guided step, which need one graph more."""
    passes = guided(bench, stage, bench.inputs(stage).streams)
    for what, some in (("one pass", passes[:1]), ("guided step", passes)):
        begin = time.perf_counter()
        bench.dit.passes(some)
        bench.clock.wait()
        seconds = bench.note(f"compile.{what}.stage {stage}", time.perf_counter() - begin)
        table.rows.append((what, str(stage), f"{seconds:.1f}"))


def diffusers(bench: Bench) -> None:
    """diffusers' transformer on the same tensors: as it comes, compiled by block, and with our kernel if it has it."""
    table = bench.table("Forward, diffusers' transformer", FORWARD_COLUMNS)
    agreement = bench.table(
        "Agreement of the two, same weights and inputs",
        ("velocity", "stage", "relative L2"),
        "diffusers turns queries and keys in float32, ours in bfloat16 as the official model does.",
    )
    theirs: Any = diffusers_dit(bench.sizes.transformer, bench.dit)
    for stage in STAGES:
        _agree(bench, theirs, stage, agreement)
    _theirs(bench, theirs, table, "eager", "diffusers.eager")
    with bench.attempt("diffusers, compiled"):
        _compile_theirs(bench, theirs, table, "compiled", "diffusers.compiled")
    kernel = DIFFUSERS_KERNELS.get(bench.choice.kernels[kernels.VIDEO])
    if kernel is not None and hasattr(theirs, "set_attention_backend"):
        with bench.attempt(f"diffusers, compiled, {kernel}"):
            theirs.set_attention_backend(kernel)
            _compile_theirs(bench, theirs, table, f"compiled, {kernel}", "diffusers.compiled with our kernel")
    _ratios(bench)


@contextmanager
def compiled(bench: Bench) -> Iterator[None]:
    """Our model's blocks compiled, in the block."""
    dit = bench.dit
    dit.compile_blocks(**bench.compiler)
    try:
        yield
    finally:
        for block in dit.blocks():
            block.functions = PLAIN


def guided(bench: Bench, stage: int, streams: Any) -> list[Pass]:
    """cond, uncond and isolated."""
    other = streams.map(
        lambda stream, context: replace(stream, context=context), contexts(bench.dit, bench.sizes.text, seed=2 + stage)
    )
    return [Pass(streams), Pass(other), Pass(streams, isolated=True)]


def _both_stages(bench: Bench, table: Growing, what: str, key: str) -> None:
    for stage in STAGES:
        streams = bench.inputs(stage).streams
        _row(bench, table, what, key, stage, bench.flops(stage), partial(bench.dit, streams))


def _guided(bench: Bench, table: Growing, what: str, key: str) -> None:
    """At stage 1, where guidance is used. FLOP of what is done, that is without what the passes share."""
    passes = guided(bench, 1, bench.inputs(1).streams)
    flops = guided_flops(bench.config, bench.sizes.lengths(1))
    _row(bench, table, what, key, 1, flops, partial(bench.dit.passes, passes))


def _row(bench: Bench, table: Growing, what: str, key: str, stage: int, flops: int, work: Callable[[], object]) -> None:
    """Measure and tell one line."""
    bench.say(f"{what}, stage {stage}")
    work()
    bench.clock.wait()
    bench.clock.forget_peak()
    spent = bench.note(f"{key}.stage {stage}", bench.clock.median(work, LONG, warm_ups=0))
    rate = flops / spent / 1e9
    peak = bench.clock.peak()
    table.rows.append((what, str(stage), f"{spent:.1f}", f"{rate:.0f}", bench.share(rate), gigabytes(peak)))


def _theirs(
    bench: Bench, theirs: nn.Module, table: Growing, what: str, key: str, stages: Sequence[int] = STAGES
) -> None:
    for stage in stages:
        arguments = bench.inputs(stage).for_diffusers()
        with torch.inference_mode():
            _row(bench, table, what, key, stage, bench.flops(stage), partial(theirs, **arguments))
        del arguments
        bench.release()


def _compile_theirs(bench: Bench, theirs: nn.Module, table: Growing, what: str, key: str) -> None:
    """A length at a time and compiled for it alone, which is the best it can be given; graphs may break."""
    options = {name: value for name, value in bench.compiler.items() if name != "fullgraph"}
    for stage in STAGES:
        torch.compiler.reset()
        # nn.Module.compile, as diffusers' compile_repeated_blocks does it for every block.
        for block in theirs.get_submodule("transformer_blocks").children():
            block.compile(**options)
        _theirs(bench, theirs, table, what, key, (stage,))
    for block in theirs.get_submodule("transformer_blocks").children():
        block._compiled_call_impl = None


def _agree(bench: Bench, theirs: nn.Module, stage: int, table: Growing) -> None:
    inputs = bench.inputs(stage)
    with torch.inference_mode():
        ours = bench.dit(inputs.streams)
        found: AV[Tensor] = AV(*theirs(**inputs.for_diffusers()))
    for name in ("video", "audio"):
        a, b = getattr(ours, name).double(), getattr(found, name).double()
        error = bench.note(f"agreement.{name}.stage {stage}", ((a - b).norm() / b.norm()).item())
        finite = bool(a.isfinite().all())
        table.rows.append((name, str(stage), f"{error:.1e}" if finite else "not finite"))


def _ratios(bench: Bench) -> None:
    """How much longer diffusers takes."""
    table = bench.table("Times of diffusers over ours", ("compared", "stage 1", "stage 2"))
    pairs = (
        ("eager", "diffusers.eager", "ours.eager"),
        ("compiled", "diffusers.compiled", "ours.compiled"),
        ("compiled, same attention", "diffusers.compiled with our kernel", "ours.compiled"),
    )
    for what, theirs, ours in pairs:
        found = [(bench.found.get(f"{theirs}.stage {s}"), bench.found.get(f"{ours}.stage {s}")) for s in STAGES]
        if any(a and b for a, b in found):
            table.rows.append((what, *(f"{a / b:.2f}" if a and b else "-" for a, b in found)))
