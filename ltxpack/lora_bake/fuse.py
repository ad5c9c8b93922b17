"""The arithmetic of a bake: one weight and the LoRAs that change it -> the new weight. Pure; opens no file.

Two rules (spec 02, section 4). ``fp32``: W32 + sum of scale·(B@A) in fp32, rounded once to the stored dtype.
``official``: the official bf16 arithmetic, bit for bit, three roundings and all. Five kernels carry them out:

=============  ===================================================================================================
fp32           the fp32 rule in fp32 matmuls
fp32-bf16      the fp32 rule for LoRAs with bf16 factors on a CPU with a bf16 matrix unit (AMX, AVX512-BF16): the unit
               multiplies the factors and sums in fp32, in less than half the time of fp32 matmuls
addmm          the fp32 rule for one LoRA with bf16 factors: one bf16 ``addmm``, which on a bf16 matrix unit (AMX,
               AVX512-BF16, a CUDA card) sums in fp32 and rounds once; elsewhere it is slow, and in a chain not exact.
               A CPU's unit takes factors below 2^-126 for zeros there
official       the official rule in bf16 matmuls
official-fp32  the official rule where bf16 matmuls take hours: the products of the same bf16 factors are made in
               fp32, then rounded as the rule says. Sums of long ranks have another order, as on another card: one
               element in some 10,000 at a rank of 384 is the neighbouring bf16 number
=============  ===================================================================================================
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ltxpack.lora_bake.coverage import UNMEASURED, TargetStat

KERNELS = ("fp32", "fp32-bf16", "addmm", "official", "official-fp32")
# Kernels that fuse a weight in one piece.
WHOLE = frozenset({"official", "official-fp32"})
# The most products, in FLOP, that a processor without a bf16 unit makes in bf16: half a minute at 0.5 GFLOP/s.
SLOW_FLOP = 15e9
# Elements that are multiplied at once, with the least and most rows: enough to pay for packing A again, and few enough
# to leave work for several threads. They are constants, because the bits must not depend on the machine.
CHUNK_ELEMENTS = {"fp32": 1 << 21, "fp32-bf16": 1 << 21, "addmm": 1 << 22}
CHUNK_ROWS = {"fp32": (256, 1024), "fp32-bf16": (256, 1024), "addmm": (1, None)}
# Elements of rows that are added, measured and rounded at once, which fit a core's cache.
PART_ELEMENTS = 1 << 20
# Elements of the parts in which a weight is measured, which fit a core's cache; of the runs that one thread sums for a
# norm; and the rows of the bands for products of factors with themselves.
_PART, _RUN, _BAND = 1 << 18, 1 << 10, 64
_CPU_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})
# Whether this torch can be told how a CPU makes fp32 matmuls: since 2.9.
_FP32_PRECISION = hasattr(torch.backends.mkldnn, "matmul")


class Workspace:
    """Memory that is reused: the pages of fresh memory cost more than the sums in them."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def empty(self, use: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """An uninitialised tensor, valid until the next call for the same ``use``."""
        count = math.prod(shape)
        kept = self._kept.get(use)
        if kept is None or kept.numel() < count or kept.dtype != dtype or kept.device != torch.device(device):
            kept = self._kept[use] = torch.empty(count, dtype=dtype, device=device)
        return kept[:count].view(*shape)


@dataclass(frozen=True)
class Term:
    """The changes of one LoRA to one weight W, at the strength s, in this order:

    W += s·(factor·(up@down or delta) + diff); W = turn(W), see :class:`Turn`; W += s·(new - W); and with
    ``magnitude`` each row, or each column if it is ``over_inputs``, gets it as its norm (DoRA). With ``over_base`` the
    changed row is multiplied by ``magnitude`` and divided by its norm before the change instead.

    down [rank, in], up [out, rank], magnitude [out], [out, 1] or [1, in], delta, diff and new like the weight; as
    stored in the adapter. ``square`` is |B·A|² of the whole weight, if known; the ``first`` rows count it.
    ``needs_whole``: a row of the result depends on other rows of the weight.
    """

    factor: float = 1.0
    down: Tensor | None = None
    up: Tensor | None = None
    magnitude: Tensor | None = None
    diff: Tensor | None = None
    square: float | None = None
    first: bool = True
    delta: Tensor | None = None
    new: Tensor | None = None
    turn: Turn | None = None
    over_inputs: bool = False
    over_base: bool = False
    needs_whole: bool = False

    @property
    def sums_only(self) -> bool:
        """Whether the term only adds factor·(up@down or delta)."""
        return all(other is None for other in (self.magnitude, self.diff, self.new, self.turn))

    def rows(self, first: int, last: int) -> Term:
        """The term for the weight's rows ``first`` to ``last``."""
        names = ("up", "diff", "delta", "new", *(() if self.over_inputs else ("magnitude",)))
        cut = {name: tensor[first:last] for name in names if (tensor := getattr(self, name)) is not None}
        return replace(self, turn=self.turn and self.turn.rows(first, last), first=first == 0, **cut)

    def prepared(self, kernel: str, work: Workspace, measure: bool = True) -> Term:
        """The term after the work, in ``work``, that each row chunk of a weight would otherwise repeat."""
        if self.up is None or self.down is None or kernel in WHOLE:
            return self
        if kernel == "addmm" and _is_plain([self]):
            return replace(self, square=_product_square(self.up, self.down)) if measure else self
        down = work.empty("down in fp32", self.down.shape, torch.float32, self.down.device)
        return replace(self, down=down.copy_(self.down))


@dataclass(frozen=True)
class Fused:
    """New rows, whether all are finite, their measurements if wanted, and the largest |x| of a float32 sum."""

    weight: Tensor
    finite: bool
    stat: TargetStat = UNMEASURED
    largest: float = 0.0


def choose_kernel(
    rule: str, lora_count: int, plain_bf16: bool, device: str, flop: float = 0.0, codes: bool = False
) -> str:
    """The kernel for a bake (spec 02, section 4). ``plain_bf16``: every factor of every LoRA is bf16, no DoRA.

    ``flop``: FLOP of all products of one strength. ``codes``: whether sums become codes, which need them in float32.
    """
    unit = device == "cpu" and cpu_has_bf16_unit()
    fast = unit or device == "cuda"
    if rule == "official":
        return "official" if fast or flop <= SLOW_FLOP else "official-fp32"
    if plain_bf16 and fast and lora_count == 1 and not codes:
        return "addmm"
    return "fp32-bf16" if plain_bf16 and has_kernel("fp32-bf16", device, rule, codes) else "fp32"


def has_kernel(kernel: str, device: str, rule: str, codes: bool) -> bool:
    """Whether ``kernel`` carries out ``rule``, also for sums that become ``codes``, on this machine with this torch.

    Another machine may have recorded it.
    """
    if kernel == "fp32-bf16" and not (device == "cpu" and _FP32_PRECISION and cpu_has_bf16_unit()):
        return False
    return kernel in KERNELS and (kernel in WHOLE) == (rule == "official") and not (codes and kernel == "addmm")


def cpu_has_bf16_unit(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware and torch uses it."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        with cpuinfo.open(encoding="utf-8", errors="replace") as lines:
            flags = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return False
    return not _CPU_FLAGS.isdisjoint(flags.split())


@contextlib.contextmanager
def precision_of(kernel: str) -> Iterator[None]:
    """While it is open, large fp32 matmuls of the whole process on a CPU are those of ``kernel``.

    Those of :func:`.quantise.rotate` are too small for that.
    """
    if kernel != "fp32-bf16":
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def products_per_second(kernel: str, device: str) -> float:
    """FLOP/s of ``kernel``'s products, measured now on all cores in a few hundredths of a second."""
    dtype = torch.float32 if "fp32" in kernel else torch.bfloat16
    rows, rank, columns = 64, 128, 512
    while True:
        up, down = (torch.ones(shape, dtype=dtype, device=device) for shape in ((rows, rank), (rank, columns)))
        with precision_of(kernel):
            spent = min(_seconds(up, down) for _ in range(3))
        if spent > 0.003 or rows >= 1 << 12:
            return 2 * rows * rank * columns / spent
        rows, columns = 2 * rows, 2 * columns


def _seconds(up: Tensor, down: Tensor) -> float:
    begin = time.perf_counter()
    (up @ down)[0, 0].item()
    return time.perf_counter() - begin


def row_chunks(shape: tuple[int, ...], kernel: str, loras: int = 1) -> Iterator[tuple[int, int]]:
    """The row ranges for fusing a weight: one under the official rule, whose bits depend on the matmul's shape."""
    if kernel in WHOLE:
        return _ranges(shape, math.prod(shape))
    # The products of all LoRAs are in memory at once.
    return _ranges(shape, CHUNK_ELEMENTS[kernel] // max(1, loras), *CHUNK_ROWS[kernel])


def row_parts(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The row ranges for work element by element."""
    return _ranges(shape, PART_ELEMENTS)


def _ranges(
    shape: tuple[int, ...], elements: int, least: int = 1, most: int | None = None
) -> Iterator[tuple[int, int]]:
    """Ranges of as many rows as ``elements`` fill, but no fewer than ``least`` and no more than ``most``."""
    rows = shape[0] if shape else 1
    step = max(least, min(most or rows, elements // max(1, math.prod(shape[1:]))))
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


def fuse_rows(
    weight: Tensor,
    terms: Sequence[Term],
    strengths: Sequence[Sequence[float]],
    kernel: str,
    work: Workspace | None = None,
    results: Workspace | None = None,
    into: Sequence[Tensor | None] = (),
    measure: bool = True,
) -> list[Fused]:
    """New rows for several bakes of the same LoRAs: ``strengths[bake][lora]`` in order of application.

    ``weight`` [rows, in] (or [rows]) in the stored dtype, ``terms`` already cut to the same rows. Each result equals
    that of the bake alone. Sums use ``work``; the new rows may be in ``results``, valid until it is used again.
    ``into``: for each bake None, or float32 memory for its sum, which then is not rounded to the stored dtype.
    Without ``measure`` only the official kernels make measurements. fp32-bf16 is fp32 unless
    :func:`precision_of` is open.
    """
    work, results = work or Workspace(), results or Workspace()
    into = into or [None] * len(strengths)
    if kernel in WHOLE:
        return _fuse_official(weight, terms, strengths, kernel, results, into)
    if kernel == "addmm" and _is_plain(terms) and weight.dtype == torch.bfloat16:
        assert not any(memory is not None for memory in into), "addmm rounds its sums"
        return _fuse_addmm(weight, terms[0], [row[0] for row in strengths], results, measure)
    return _fuse_fp32(weight, terms, strengths, work, results, into, measure)


def fuse_official(
    weight: Tensor,
    terms: Sequence[Term],
    strengths: Sequence[float],
    work: Workspace | None = None,
    use: str = "result",
    through: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, float]:
    """``(new weight, squared norm of the change)`` in the official bf16 arithmetic (spec 02, section 4).

    ``through``: the dtype of the matmuls of the bf16 factors; products in float32 are rounded afterwards. It never
    reads alpha. A full difference, which the official loader does not know, is one more bf16 term. Raises ValueError
    for DoRA and all other methods, which this rule does not know.
    """
    work = work or Workspace()
    delta: Tensor | None = None
    for term, strength in zip(terms, strengths, strict=True):
        if not replace(term, diff=None).sums_only or term.delta is not None:
            raise ValueError("the official rule has products and differences only, no DoRA")
        if term.up is not None and term.down is not None:
            up, down = term.up.to(torch.bfloat16), term.down.to(torch.bfloat16)
            first = delta is None
            if delta is None:
                delta = work.empty(use, weight.shape, torch.bfloat16, weight.device)
            if through == torch.float32:
                product = work.empty("product in fp32", weight.shape, torch.float32, weight.device)
                torch.mm((up * strength if first else up).float(), down.float(), out=product)
                delta.copy_(product if first else product.mul_(strength).add_(delta))
            elif first:
                torch.mm(up * strength, down, out=delta)
            else:
                torch.addmm(delta, up, down, alpha=strength, out=delta)
        if term.diff is not None:
            diff = term.diff.to(torch.bfloat16)
            delta = diff * strength if delta is None else delta.add_(diff, alpha=strength)
    if delta is None:
        return weight, 0.0
    square = square_sum(delta)
    delta += weight
    return delta.to(weight.dtype), square


def square_sum(values: Tensor) -> float:
    """Sum of squares: fp32 within short runs, float64 over them, and so the same with any number of threads."""
    flat = values.reshape(-1)
    count = flat.numel()
    norms = torch.zeros(-(-count // _RUN), device=flat.device)
    # One tensor for all parts: small results between large ones would leave holes in the heap.
    memory = None if flat.dtype == torch.float32 else torch.empty(min(_PART, count), device=flat.device)
    step = _PART if memory is not None else max(1, count)
    for start in range(0, count, step):
        part = flat[start : start + step]
        part = part if memory is None else memory[: part.numel()].copy_(part)
        whole = part.numel() // _RUN
        first = start // _RUN
        torch.linalg.vector_norm(part[: whole * _RUN].view(-1, _RUN), dim=1, out=norms[first : first + whole])
        if part.numel() % _RUN:
            norms[first + whole] = torch.linalg.vector_norm(part[whole * _RUN :])
    total = norms.double().square_().sum().item()
    # Squares of values above 1e19 are beyond float32, and Infinity is no JSON.
    return total if math.isfinite(total) else flat.double().square_().sum().item()


def _sum_square(products: Sequence[Tensor], scales: Sequence[Sequence[float]]) -> list[float]:
    """The squared norm of sum of scale·product for each row of ``scales``, from the products' inner products."""
    count = len(products)
    inner = np.zeros((count, count))
    for i, first in enumerate(products):
        inner[i, i] = square_sum(first)
        for j, second in enumerate(products[:i]):
            # <a, b> = (|a + b|² - |a|² - |b|²) / 2
            inner[i, j] = inner[j, i] = (square_sum(first + second) - float(inner[i, i]) - float(inner[j, j])) / 2
    with np.errstate(over="ignore", invalid="ignore"):
        sums = [float(np.asarray(row) @ inner @ np.asarray(row)) for row in scales]
    return [math.inf if math.isnan(total) else max(0.0, total) for total in sums]


def _fuse_official(
    weight: Tensor,
    terms: Sequence[Term],
    strengths: Sequence[Sequence[float]],
    kernel: str,
    results: Workspace,
    into: Sequence[Tensor | None],
) -> list[Fused]:
    through = torch.float32 if kernel == "official-fp32" else torch.bfloat16
    made, base_square = [], square_sum(weight)
    for i, (row, memory) in enumerate(zip(strengths, into, strict=True)):
        new, delta_square = fuse_official(weight, terms, row, results, f"result {i}", through)
        stored = new if memory is None else memory.copy_(new)
        made.append(_measured(weight, stored, base_square, delta_square, rounded=memory is None))
    return made


def _fuse_fp32(
    weight: Tensor,
    terms: Sequence[Term],
    strengths: Sequence[Sequence[float]],
    work: Workspace,
    results: Workspace,
    into: Sequence[Tensor | None],
    measure: bool,
) -> list[Fused]:
    """Apply one :class:`Term` after the other in float32, and round once: all products first, then part by part.

    DoRA: m · (W + dW) / |W + dW| with the norm over a row (spec 02, section 7). The strength scales dW, as in PEFT; a
    strength of 0 leaves the weight alone, magnitudes included.
    """
    sums = [_summed(term, f"product {i}", work) for i, term in enumerate(terms)]
    made = [
        results.empty(f"result {i}", weight.shape, weight.dtype, weight.device) if memory is None else memory
        for i, memory in enumerate(into)
    ]
    whole = any(term.needs_whole for term in terms)
    parts = []
    for span in [(0, len(weight))] if whole else row_parts(weight.shape):
        rows = slice(*span)
        cut = [None if found is None else found[rows] for found in sums]
        own = [term.rows(*span) for term in terms]
        targets = [(memory[rows], kept is None) for memory, kept in zip(made, into, strict=True)]
        parts.append(_fuse_part(weight[rows], own, cut, strengths, work, targets, measure))
    return [_joined(memory, found) for memory, found in zip(made, zip(*parts, strict=True), strict=True)]


def _fuse_part(
    weight: Tensor,
    terms: Sequence[Term],
    sums: Sequence[Tensor | None],
    strengths: Sequence[Sequence[float]],
    work: Workspace,
    targets: Sequence[tuple[Tensor, bool]],
    measure: bool,
) -> list[Fused]:
    """Rows with finished products. ``targets``: for each bake the memory of its result, and whether to round it."""
    scales = [[strength * term.factor for strength, term in zip(row, terms, strict=True)] for row in strengths]
    lowrank = [found for found in sums if found is not None]
    plain = len(lowrank) == len(terms) and all(term.sums_only for term in terms)
    squares = _sum_square(lowrank, scales) if plain and measure else None
    base_square, delta_square, made = 0.0, 0.0, list[Fused]()
    for i, (row, (stored, rounded)) in enumerate(zip(strengths, targets, strict=True)):
        total = work.empty("sum", weight.shape, torch.float32, weight.device) if rounded else stored
        total.copy_(weight)
        base_square = square_sum(total) if i == 0 and measure else base_square
        for term, found, strength in zip(terms, sums, row, strict=True):
            if strength:
                _apply(term, found, strength, total)
        new = stored.copy_(total) if rounded else total
        if squares is not None:
            delta_square = squares[i]
        elif measure:
            change = work.empty("change", weight.shape, torch.float32, weight.device)
            delta_square = square_sum(torch.sub(total, weight, out=change))
        made.append(_measured(weight, new, base_square, delta_square, rounded) if measure else _unmeasured(new))
    return made


def _joined(memory: Tensor, parts: Sequence[Fused]) -> Fused:
    """The parts of a result, which are in ``memory``, as one."""
    stat = functools.reduce(TargetStat.plus, (part.stat for part in parts))
    return Fused(memory, all(part.finite for part in parts), stat, max(part.largest for part in parts))


def _summed(term: Term, use: str, work: Workspace) -> Tensor | None:
    """up@down in float32, or delta; None if there is neither."""
    if term.up is None or term.down is None:
        return term.delta
    shape = (term.up.shape[0], term.down.shape[1])
    product, up = work.empty(use, shape, torch.float32, term.up.device), term.up
    if up.dtype != torch.float32:
        up = work.empty("up in fp32", up.shape, torch.float32, up.device).copy_(up)
    return torch.mm(up, term.down.float(), out=product)


def _apply(term: Term, found: Tensor | None, strength: float, total: Tensor) -> None:
    """Apply to ``total``, float32, a term whose sum is ``found``."""
    axis = 0 if term.over_inputs else 1
    norm = torch.linalg.vector_norm(total, dim=axis, keepdim=True) if term.over_base else None
    if found is not None:
        total.add_(found, alpha=strength * term.factor)
    if term.diff is not None:
        total.add_(term.diff.float(), alpha=strength)
    if term.turn is not None:
        total.copy_(term.turn.apply(total, strength))
    if term.new is not None:
        total.lerp_(term.new.float(), strength)
    if term.magnitude is not None:
        after = torch.linalg.vector_norm(total, dim=axis, keepdim=True)
        scale = term.magnitude.float().reshape(after.shape) / (after if norm is None else norm)
        # A row of zeros has no direction, and stays.
        total.mul_(scale.masked_fill_(after == 0, 0.0))


def _fuse_addmm(
    weight: Tensor, term: Term, strengths: Sequence[float], results: Workspace, measure: bool
) -> list[Fused]:
    assert term.up is not None and term.down is not None
    square = base_square = 0.0
    if measure:
        square = _product_square(term.up, term.down) if term.square is None else term.square
        base_square = square_sum(weight)
    made = []
    for i, strength in enumerate(strengths):
        scale = strength * term.factor
        fused = weight
        if scale:
            fused = results.empty(f"result {i}", weight.shape, weight.dtype, weight.device)
            fused.copy_(weight).addmm_(term.up, term.down, alpha=scale)
        if not measure:
            made.append(_unmeasured(fused))
            continue
        result = _measured(weight, fused, base_square, square * scale * scale)
        counted = term.first or term.square is None
        made.append(result if counted else replace(result, stat=result.stat._replace(delta_square=0.0)))
    return made


def _product_square(up: Tensor, down: Tensor) -> float:
    """|B·A|² without the product; in float64 if uneven factors overflow in float32."""
    total = _gram_sum(up, down)
    return max(0.0, total if math.isfinite(total) else _gram_sum(up.double(), down.double()))


def _gram_sum(up: Tensor, down: Tensor) -> float:
    """Sum of (BᵀB)∘(A·Aᵀ); both are symmetric, so it makes only the bands on and above the diagonal."""
    total = 0.0
    for first in range(0, len(down), _BAND):
        left = up[:, first : first + _BAND].T @ up[:, first:]
        right = down[first : first + _BAND] @ down[first:].T
        inner = left.double().mul_(right.double())
        total += 2 * inner.sum().item() - inner[:, : len(inner)].sum().item()
    return total


def _is_plain(terms: Sequence[Term]) -> bool:
    """Whether there is one product of bf16 factors and nothing else."""
    if len(terms) != 1 or not terms[0].sums_only or terms[0].delta is not None:
        return False
    factors = (terms[0].up, terms[0].down)
    return all(factor is not None and factor.dtype == torch.bfloat16 for factor in factors)


def _measured(weight: Tensor, fused: Tensor, base_square: float, delta_square: float, rounded: bool = True) -> Fused:
    """New rows with measurements. If they are a sum that is not ``rounded``, every element counts as changed."""
    count = fused.numel()
    if not rounded:
        return replace(_unmeasured(fused), stat=TargetStat(base_square, delta_square, count, count))
    # No element exceeds the sum of the norms, so all need a check only if those are huge.
    bound = math.sqrt(base_square) + math.sqrt(delta_square)
    finite = bound < torch.finfo(fused.dtype).max / 2 or bool(torch.isfinite(fused).all())
    return Fused(fused, finite, TargetStat(base_square, delta_square, count, count_changed(weight, fused)))


def _unmeasured(fused: Tensor) -> Fused:
    """New rows without measurements."""
    low, high = (bound.item() for bound in torch.aminmax(fused))
    return Fused(fused, math.isfinite(high - low), largest=max(-low, high))


def count_changed(before: Tensor, after: Tensor) -> int:
    """Elements whose stored bits differ."""
    if before.device.type != "cpu":
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[before.element_size()]
        return int((before.view(bits) != after.view(bits)).sum().item())
    size = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[before.element_size()]
    old, new = (t.reshape(-1).view(torch.uint8).numpy().view(size) for t in (before, after))
    return sum(int(np.count_nonzero(old[i : i + _PART] != new[i : i + _PART])) for i in range(0, old.size, _PART))


@dataclass(frozen=True)
class Turn:
    """A rotation by orthogonal blocks on the diagonal, in one stage (OFT) or in those of a butterfly (BOFT).

    W -> rescale · (R W), or rescale · (W Rᵀ) if it is ``over_inputs``.

    ``blocks`` [stages, blocks, size, size], float32: R is the last stage times … times the first. Stage 0 turns
    neighbours (OFT, Qiu et al., arXiv 2306.07280), stage i turns rows that are 2^i·size/2 apart (BOFT, Liu et al.,
    arXiv 2311.06243). A strength s other than 1 makes each stage s·R + (1-s)·I, as in LyCORIS, or with ``of_result``
    gives W + s·(W' - W). ``rescale`` [out, 1] or None.
    """

    blocks: Tensor
    over_inputs: bool
    rescale: Tensor | None = None
    of_result: bool = False

    def rows(self, first: int, last: int) -> Turn:
        """The turn for the weight's rows ``first`` to ``last``; for a turn over outputs these must be all rows."""
        return self if self.rescale is None else replace(self, rescale=self.rescale[first:last])

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """``weight`` [out, in], float32, turned."""
        turned = weight.T if self.over_inputs else weight
        size, columns, blocks = self.blocks.shape[-1], turned.shape[1], self.blocks
        if blocks.shape[1] == 1:
            blocks = blocks.expand(-1, len(turned) // size, -1, -1)
        if strength != 1 and not self.of_result:
            blocks = blocks * strength + (1 - strength) * torch.eye(size, device=blocks.device)
        for i, stage in enumerate(blocks):
            near = turned.reshape(-1, 2, 2**i, size // 2, columns).transpose(1, 2) if i else turned
            near = torch.bmm(stage, near.reshape(len(stage), size, columns))
            back = near.reshape(-1, 2**i, 2, size // 2, columns).transpose(1, 2) if i else near
            turned = back.reshape(turned.shape)
        turned = turned.T if self.over_inputs else turned
        turned = turned if self.rescale is None else turned * self.rescale.float()
        return weight.lerp(turned, strength) if self.of_result and strength != 1 else turned


def cayley(skew: Tensor) -> Tensor:
    """(I + Q)(I - Q)⁻¹ of skew matrices [..., n, n]: rotations (Cayley); NaN if Q is so large that I is lost in it."""
    unit = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    rotation: Tensor = torch.linalg.solve_ex(unit - skew, unit + skew, left=False)[0]
    return rotation


def cayley_series(skew: Tensor, terms: int) -> Tensor:
    """PEFT's truncated Neumann series of (I + Q)(I - Q)⁻¹: I + 2Q + 2Q² + … + Q^(terms-1); for two terms I + 2Q."""
    power = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    total = power.clone()
    for i in range(1, terms):
        power = power @ skew
        total += power if i == terms - 1 > 1 else 2 * power
    return total
