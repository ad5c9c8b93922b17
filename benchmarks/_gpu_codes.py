"""The section about weights in codes: fp8 and int8 against bf16 in linears, a block and a run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from _gpu_bench import STAGES, Bench
from _gpu_forward import BRIEF, compiled
from _gpu_models import Codecs, installed, random_codecs
from _gpu_video import CODEC_PACKAGE, sampled
from torch import Tensor

from ltxpack.ltx23.codes import E4M3, I8, KEPT_BLOCKS, rotated_together
from ltxpack.runtime.model.layers import Linear
from ltxpack.runtime.model.model import DiT, Pass
from ltxpack.runtime.model.quantised import KINDS, fault, hadamard, put_quantised, use_codes
from ltxpack.runtime.sampling.conditioning import unpatchify
from ltxpack.runtime.sampling.recipes import DISTILLED, HQ
from ltxpack.runtime.sampling.shape import AV
from ltxpack.runtime.settings import STATIC, TOKEN

# Covers the inputs that random weights give, as a calibrated scale would.
INPUT_SCALE = 2.0**-4


@dataclass(frozen=True)
class Form:
    """Weights in ``codes`` (empty: bf16), and how their linears compute."""

    name: str
    codes: str = ""
    mode: str = TOKEN


FORMS = (Form("bf16"), Form("fp8, token", E4M3), Form("fp8, static", E4M3, STATIC), Form("int8, token", I8))
COMPARED = (*(form.name for form in FORMS), *(f"bf16 / {form.name}" for form in FORMS[1:]))


def codes(bench: Bench) -> None:
    """All tables; each with the time of bf16 over that of the form."""
    table = bench.table("Products of codes", ("form", "on this device"), "Else weights are decoded for each product.")
    for form in FORMS[1:]:
        table.rows.append((form.name, fault(form.codes, form.mode, bench.device, bench.dtype) or "right"))
    _linears(bench)
    with bench.attempt("a block in codes"):
        _block(bench)
    with bench.attempt("a run in codes"):
        _run(bench)


def _linears(bench: Bench) -> None:
    """The three shapes of the video's linears, compiled, their inputs made codes included."""
    table = bench.table("Linears alone, ms", ("linear", "stage", *COMPARED))
    dim = bench.config.streams.video.dim
    for inner, outer in ((dim, dim), (dim, 4 * dim), (4 * dim, dim)):
        plain = Linear(inner, outer, device=bench.device, dtype=bench.dtype)
        with torch.no_grad():
            plain.weight.normal_(std=inner**-0.5)
            plain.bias.zero_()
        works = {form.name: torch.compile(_coded_linear(plain, form, bench), **bench.compiler) for form in FORMS}
        for stage in STAGES:
            x = torch.randn(1, bench.sizes.lengths(stage).video, inner, device=bench.device, dtype=bench.dtype)
            torch._dynamo.maybe_mark_dynamic(x, 1)  # one compilation for both stages
            times = {}
            for name, work in works.items():
                with bench.attempt(f"{name}, {inner} x {outer}"), torch.inference_mode():
                    times[name] = bench.clock.median(partial(work, x), BRIEF, warm_ups=2)
            _row(bench, table.rows, f"codes.linear {inner} x {outer}", (f"{inner} x {outer}", str(stage)), times)
        torch.compiler.reset()


def _block(bench: Bench) -> None:
    """One block of the model, compiled, on what enters the first one."""
    table = bench.table("A whole block, ms", ("stage", *COMPARED), "All linears of it in codes.")
    spent: dict[int, dict[str, float]] = {stage: {} for stage in STAGES}
    for form in FORMS:
        torch.compiler.reset()
        dit = in_codes(bench, form, blocks=(0,))
        with bench.attempt(f"a block, {form.name}"), _of(bench, dit), torch.inference_mode():
            for stage in STAGES:
                bench.say(f"a block, {form.name}, stage {stage}")
                streams = bench.inputs(stage).streams
                state = Pass(streams).before(0, dit._embed(streams), dit.condition(streams))
                work = partial(dit.blocks()[0], [state])
                spent[stage][form.name] = bench.clock.median(work, BRIEF, warm_ups=2)
    for stage, times in spent.items():
        _row(bench, table.rows, "codes.block", (str(stage),), times)


def _run(bench: Bench) -> None:
    """Both stages of two recipes, with 44 of 48 blocks in codes, from the same noise; and the frames of each.

    The guided recipe makes a third of its steps, which is enough to tell how long one takes and how far it leads.
    """
    fewer = replace(bench.sizes, steps=max(2, bench.sizes.steps // 3))
    columns = ("recipe", "form", "stage 1, s", "stage 2, s", "video", "audio", "frames", "PSNR of frames, dB")
    note = f"Relative L2 from bf16's. Random weights: what is lost is not that of the model. hq: {fewer.steps} steps."
    table = bench.table("Runs in codes", columns, note)
    codecs = random_codecs(bench.sizes, bench.device, bench.dtype) if installed(CODEC_PACKAGE) else None
    first: dict[str, tuple[AV[Tensor], Tensor | None]] = {}
    for form in (FORMS[0], FORMS[1], FORMS[3]):
        torch.compiler.reset()
        dit = in_codes(bench, form, _coded_blocks(bench.config.num_layers))
        for recipe in (DISTILLED, HQ):
            asked = replace(bench, recipe=recipe, sizes=fewer if recipe is HQ else bench.sizes)
            asked.__dict__["dit"] = bench.dit
            with bench.attempt(f"a run of {recipe.name}, {form.name}"), _of(asked, dit):
                for number in range(2):
                    sampled(asked, number, whole=False)
                latents, seconds = _both_stages(asked)
                frames = None if codecs is None else _frames(codecs, latents.video)
                told = _apart(bench, f"codes.{recipe.name}.{form.name}", (latents, frames), first, recipe.name)
                for number, one in enumerate(seconds, start=1):
                    bench.note(f"codes.{recipe.name}.{form.name}.stage {number}", one)
                table.rows.append((recipe.name, form.name, *(f"{one:.2f}" for one in seconds), *told))
        del dit  # the card has no room for all of them
        bench.release()


def _coded_blocks(count: int) -> list[int]:
    """The blocks of ``count`` that a quantised bake stores in codes."""
    kept = KEPT_BLOCKS.get(count, (0, count - 1) if count > 2 else (0,))
    return [number for number in range(count) if number not in kept]


def _apart(
    bench: Bench,
    key: str,
    made: tuple[AV[Tensor], Tensor | None],
    first: dict[str, tuple[AV[Tensor], Tensor | None]],
    recipe: str,
) -> tuple[str, ...]:
    """How far latents and frames are from the ``first`` of the recipe, which are bf16's; in words, and noted."""
    (latents, frames), (expected, pictures) = made, first.setdefault(recipe, made)
    apart = latents.map(_distance, expected)
    found = {"video": apart.video, "audio": apart.audio}
    if frames is not None and pictures is not None:
        found["frames"] = _distance(frames, pictures)
    for what, value in found.items():
        bench.note(f"{key}.{what}", value)
    if latents is expected:
        return ("-", "-", "-", "-")
    psnr = "-"
    if frames is not None and pictures is not None:
        square = (frames.double() - pictures.double()).square().mean().item()
        psnr = f"{-10 * math.log10(max(square, 1e-12)):.1f}"
    return (*(f"{found[what]:.1e}" if what in found else "-" for what in ("video", "audio", "frames")), psnr)


def _frames(parts: Codecs, latents: Tensor) -> Tensor:
    """Every eighth frame in [0, 1], on the CPU."""
    from ltxpack.runtime.codecs import video

    frames = torch.cat([some.float().cpu() for some in video.decode_video(parts.vae, latents)])
    return frames[::8]


def _both_stages(bench: Bench) -> tuple[AV[Tensor], list[float]]:
    """The last latents, and the seconds of each stage; between the stages pixels are doubled."""
    seconds, start = [], None
    for number, stage in enumerate(bench.recipe.stages):
        bench.clock.wait()
        begin = time.perf_counter()
        latents = unpatchify(sampled(bench, number, start), stage.shape(bench.sizes.shape))
        bench.clock.wait()
        seconds.append(time.perf_counter() - begin)
        doubled = latents.video.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
        start = AV(doubled, latents.audio)
    return latents, seconds


def in_codes(bench: Bench, form: Form, blocks: Sequence[int]) -> DiT:
    """A model with the tensors of the bench's, the linears of ``blocks`` in codes."""
    with torch.device("meta"):
        dit = DiT(bench.config)
    state = bench.dit.state_dict()
    roots = tuple(f"transformer_blocks.{number}." for number in blocks)
    names = [name for name, module in dit.named_modules() if isinstance(module, Linear) and name.startswith(roots)]
    for name in names if form.codes else ():
        parts = encoded(form.codes, state[f"{name}.weight"])
        state.update({f"{name}.{part}": value for part, value in parts.items()})
    put_quantised(dit, dict.fromkeys(names if form.codes else (), form.codes))
    dit.load_state_dict(state, strict=True, assign=True)
    dit.use_attention(bench.choice.kernels)
    for line in use_codes(dit, form.mode, bench.device, bench.dtype):
        bench.say(line)
    return dit.requires_grad_(False).eval()


@torch.inference_mode()
def encoded(codes: str, weight: Tensor) -> dict[str, Tensor]:
    """A weight in codes with its scales, by the end of their names (spec 09, sections 4 and 7)."""
    kind, values = KINDS[codes], weight.float()
    if codes == E4M3:
        scale = values.abs().amax() / kind.largest
        codes_of = (values / scale).clamp_(-kind.largest, kind.largest).to(kind.codes)
        return {"weight": codes_of, "weight_scale": scale, "input_scale": torch.full_like(scale, INPUT_SCALE)}
    size = rotated_together(values.shape[1])
    rotated = (values.view(len(values), -1, size) @ hadamard(size, values.device)).flatten(1)
    scales = rotated.abs().amax(1, keepdim=True) / kind.largest
    return {"weight": (rotated / scales).round_().to(kind.codes), "weight_scale": scales}


def _coded_linear(plain: Linear, form: Form, bench: Bench) -> Linear:
    if not form.codes:
        return plain
    holder = torch.nn.ModuleDict({"linear": Linear(plain.in_features, plain.out_features, device="meta")})
    put_quantised(holder, {"linear": form.codes})
    parts = encoded(form.codes, plain.weight)
    state = {f"linear.{part}": value for part, value in parts.items()} | {"linear.bias": plain.bias}
    holder.load_state_dict(state, strict=True, assign=True)
    use_codes(holder, form.mode, bench.device, bench.dtype)
    found = holder["linear"]
    assert isinstance(found, Linear)
    return found


@contextmanager
def _of(bench: Bench, dit: DiT) -> Iterator[None]:
    """In the block the bench's model is ``dit``, with compiled blocks."""
    whole = bench.dit
    bench.__dict__["dit"] = dit
    try:
        with compiled(bench):
            yield
    finally:
        bench.__dict__["dit"] = whole


def _row(bench: Bench, rows: list[tuple[str, ...]], key: str, what: tuple[str, ...], times: dict[str, float]) -> None:
    stage = what[-1]
    for name, spent in times.items():
        bench.note(f"{key}.{name}.stage {stage}", spent)
    told = [f"{times[form.name]:.2f}" if form.name in times else "-" for form in FORMS]
    for form in FORMS[1:]:
        both = "bf16" in times and form.name in times
        told.append(f"{times['bf16'] / times[form.name]:.2f}" if both else "-")
    rows.append((*what, *told))


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
