"""A linear's weight in codes: the float32 sum of a bake, rounded once (spec 09, sections 4, 5 and 7). Pure.

======  ==========  =============================================================================================
form    codes       scales
======  ==========  =============================================================================================
fp8     E4M3        one for the weight; value = code·scale. One more for the activations
int8    int8, of rows rotated by a Hadamard matrix in runs of inputs; one for each row
======  ==========  =============================================================================================
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ltxpack.activations import E4M3_LARGEST, SMALLEST_SCALE
from ltxpack.lora_bake.coverage import UNMEASURED, TargetStat
from ltxpack.lora_bake.fuse import Workspace, square_sum
from ltxpack.ltx23.codes import rotated_together
from ltxpack.manifest import FP8, INT8

INT8_LARGEST = 127.0


@dataclass(frozen=True)
class Encoded:
    """Some rows in codes: ``codes`` [rows, in] in the memory of the sum; ``scales`` [] or [rows, 1], float32.

    ``stat``: the three measurements that codes have, if these are wanted.
    """

    codes: Tensor
    scales: Tensor
    stat: TargetStat = UNMEASURED


def encode(
    form: str, rows: Tensor, largest: float, work: Workspace, beside: Tensor | None = None, measure: bool = True
) -> Encoded:
    """``rows`` [rows, in] of a float32 sum in the codes of ``form``, with ``largest`` the whole weight's largest |x|.

    ``beside``: ``rows`` less the fp32 rule's sum, if they differ. It overwrites both, ``rows`` with the codes.
    ``measure``: whether the squared norms are wanted, which take longer than the codes.
    """
    if form == FP8:
        return _encode_fp8(rows, largest, work, beside, measure)
    assert form == INT8
    return _encode_int8(rows, work, beside, measure)


def fp8_scale(largest: float) -> float:
    """The scale of a weight: its largest |x| / 448 in float32; 1 for a weight of zeros."""
    if largest == 0:
        return 1.0
    return max(float(np.float32(largest) / np.float32(E4M3_LARGEST)), SMALLEST_SCALE)


@functools.cache
def hadamard(size: int) -> Tensor:
    """H4⊗…⊗H4 / √size, [size, size], float32: symmetric, its own inverse. ``size``: a power of 4."""
    four, found = torch.ones(4, 4) - 2 * torch.eye(4).flip(0), torch.ones(1, 1)
    while len(found) < size:
        found = torch.kron(found, four)
    return found / math.sqrt(size)


def rotate(rows: Tensor, work: Workspace) -> Tensor:
    """Each run of inputs of ``rows`` times the Hadamard matrix, in ``work``.

    It multiplies by the two factors H_a⊗H_b, which takes an eighth of the multiplications.
    """
    size = rotated_together(rows.shape[1])
    left = 4 ** (round(math.log(size, 4)) // 2)
    half = work.empty("half", (rows.numel() // size, left, size // left), torch.float32, rows.device)
    whole = work.empty("scaled", half.shape, torch.float32, rows.device)
    torch.matmul(rows.view(half.shape), hadamard(size // left).to(rows.device), out=half)
    return torch.matmul(hadamard(left).to(rows.device), half, out=whole).view_as(rows)


def _encode_fp8(rows: Tensor, largest: float, work: Workspace, beside: Tensor | None, measure: bool) -> Encoded:
    # A tensor on the device: for a plain number a card multiplies with the reciprocal, which gives other bits.
    scale = torch.tensor(fp8_scale(largest), device=rows.device)
    scaled = work.empty("scaled", rows.shape, torch.float32, rows.device)
    torch.div(rows, scale, out=scaled).clamp_(-E4M3_LARGEST, E4M3_LARGEST)
    if not measure:
        return Encoded(_memory_of(rows, torch.float8_e4m3fn).copy_(scaled), scale.cpu())
    codes = work.empty("codes", rows.shape, torch.float8_e4m3fn, rows.device).copy_(scaled)
    square = square_sum(rows)
    stat = _stat(square, rows.sub_(_decoded_fp8(codes, work), alpha=256 * scale.item()), beside)
    return Encoded(_memory_of(rows, codes.dtype).copy_(codes), scale.cpu(), stat)


def _decoded_fp8(codes: Tensor, work: Workspace) -> Tensor:
    """The codes' values / 256 in float32: moves sign, exponent and mantissa to their places in float16.

    torch decodes one code at a time, which takes as long as the sum.
    """
    bits = work.empty("bits", codes.shape, torch.int16, codes.device).copy_(codes.view(torch.int8))
    half = bits.mul_(1 << 7).bitwise_and_(~0x4000).view(torch.float16)
    return work.empty("scaled", codes.shape, torch.float32, codes.device).copy_(half)


def _encode_int8(rows: Tensor, work: Workspace, beside: Tensor | None, measure: bool) -> Encoded:
    rotated = rotate(rows, work)
    largest = torch.maximum(rotated.amax(dim=1, keepdim=True), -rotated.amin(dim=1, keepdim=True))
    scales = torch.where(largest > 0, largest / torch.full_like(largest, INT8_LARGEST), 1.0).clamp_(SMALLEST_SCALE)
    if not measure:
        whole = torch.div(rotated, scales, out=rotated).round_().clamp_(-INT8_LARGEST, INT8_LARGEST)
        return Encoded(_memory_of(rows, torch.int8).copy_(whole), scales.cpu())
    square = square_sum(rows)
    torch.div(rotated, scales, out=rows).round_().clamp_(-INT8_LARGEST, INT8_LARGEST)
    codes = work.empty("codes", rows.shape, torch.int8, rows.device).copy_(rows)
    stat = _stat(square, rotated.sub_(rows.mul_(scales)), None if beside is None else rotate(beside, Workspace()))
    return Encoded(_memory_of(rows, codes.dtype).copy_(codes), scales.cpu(), stat)


def _stat(square: float, lost: Tensor, beside: Tensor | None) -> TargetStat:
    """``square``, and the squared norms of ``lost``, the change by rounding, and of ``lost`` plus ``beside``."""
    rounding = square_sum(lost)
    error = rounding if beside is None else square_sum(beside.sub_(lost))
    return TargetStat(sum_square=square, error_square=error, rounding_square=rounding)


def _memory_of(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of ``rows``, which are no longer needed, for as many codes."""
    return rows.view(-1).view(dtype)[: rows.numel()].view_as(rows)
