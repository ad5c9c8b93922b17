"""Linears whose weights are codes: fp8 (E4M3), and int8 of rotated rows (spec 09, sections 6 and 7).

======== ====================================================================
mode     what a linear computes
======== ====================================================================
token    both sides in codes; each token of the input has its own scale
static   fp8 only: both sides in codes; the stored scale for the whole input
weights  the weights decoded, and a plain product
======== ====================================================================

Knows codes, scales and products; neither blocks nor files. In this form a compiler makes the codes of an input in the
kernel that makes the input.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltxpack.errors import DeviceError
from ltxpack.ltx23.codes import CODES, E4M3, I8, rotated_together
from ltxpack.runtime.model.layers import Linear, Made
from ltxpack.runtime.settings import STATIC, TOKEN, WEIGHTS

# The most numbers that are copied to float32 at once without a compiler.
STRETCH = 2**22
# The fewest tokens for which cuBLAS multiplies int8 codes.
FEWEST_INT8_TOKENS = 17
# The largest error of a usable product of codes against the decoded one on random data; 4 % is usual.
AGREEMENT = 0.1
# Mode -> words for the user.
TOLD = {
    TOKEN: "inputs in codes, with a scale for each token",
    STATIC: "inputs in codes, with the scales of the bake",
    WEIGHTS: "weights decoded for each product",
}


class QuantisedLinear(Linear):
    """``x·Wᵀ + bias``, with W in ``codes`` of at most ``largest``. ``weight_scale``: float32, [] or [out, 1].

    ``mode`` as above; ``decoded``: decode the weights whatever the mode. ``granule``: cards multiply codes if both
    widths are multiples of it.
    """

    codes: torch.dtype
    largest: float
    granule: int
    weight_scale: Tensor

    def __init__(self, plain: nn.Linear, **scales: tuple[int, ...]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.mode, self.decoded = TOKEN, False
        self.weight = _unset(plain.weight, plain.weight.shape, self.codes)
        for name, shape in scales.items():
            self.register_parameter(name, _unset(plain.weight, shape, torch.float32))
        self.register_parameter("bias", plain.bias)

    def forward(self, x: Tensor, made: Made | None = None) -> Tensor:
        """As :class:`.layers.Linear`, in the dtype of ``x``."""
        if self.decoded or self.mode == WEIGHTS:
            return F.linear(self.turned(x), self.values(x.dtype), self.bias)
        product = self.product(*self.once(x.flatten(0, -2), made), x.dtype).unflatten(0, x.shape[:-1])
        return product if self.bias is None else product + self.bias

    def once(self, rows: Tensor, made: Made | None) -> tuple[Tensor, Tensor]:
        """:meth:`codes_of`, or the codes that another linear has made of the same rows, except with stored scales."""
        if made is None or self.mode == STATIC:
            return self.codes_of(rows)
        if self.codes not in made:
            codes, scales = self.codes_of(rows)
            # The strides promise the compiler one memory; without that each product gets codes of its own.
            made[self.codes] = codes.as_strided(codes.shape, (self.in_features, 1)), scales
        return made[self.codes]

    def codes_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, in] -> their codes and the scales of these."""
        return self.by_token(self.turned(rows))

    def product(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Those codes -> [tokens, out] in ``dtype``."""
        raise NotImplementedError

    def turned(self, x: Tensor) -> Tensor:
        """``x`` in the basis of the codes."""
        return x

    def code(self, scaled: Tensor) -> Tensor:
        """``scaled`` numbers as codes; overwrites them."""
        return scaled.clamp_(-self.largest, self.largest).to(self.codes)

    def by_token(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of ``rows``, and the scale of each, [tokens, 1]; 1 for a row of zeros."""
        scales = torch.linalg.vector_norm(rows, math.inf, dim=-1, keepdim=True).float() / self.largest
        scales = torch.where(scales == 0, 1.0, scales)
        return by_stretches(lambda some, scale: self.code(some / scale), self.codes, rows, scales), scales

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weights, decoded in float32 and rounded to ``dtype``; rotated ones stay rotated."""
        scales = self.weight_scale.reshape(-1, 1).expand(self.out_features, 1)
        return by_stretches(lambda codes, scale: codes.float().mul_(scale).to(dtype), dtype, self.weight, scales)

    def fits(self, device: torch.device) -> bool:
        """Whether ``device`` multiplies codes of these widths."""
        if device.type == "cpu":
            return self.in_features > 1  # where a CPU has VNNI, torch multiplies int8 codes of a single input wrongly
        return not (self.in_features % self.granule or self.out_features % self.granule)


class Fp8Linear(QuantisedLinear):
    """E4M3 codes. ``input_scale``: 1 if the bake was not calibrated."""

    codes, largest, granule = torch.float8_e4m3fn, 448.0, 16
    input_scale: Tensor

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain, weight_scale=(), input_scale=())

    def codes_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """As in the base class, or with the stored scale."""
        if self.mode != STATIC:
            return super().codes_of(rows)
        # The product is rounded to the dtype of the input before it becomes codes, as in the official code.
        factor = self.input_scale.reciprocal()
        return by_stretches(lambda some: self.code(some * factor), self.codes, rows), self.input_scale

    def product(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """As in the base class. Both scales of a product are single ones, or both are by row."""
        weight, weight_scale = self.weight, self.weight_scale
        row = scales.dim() or weight_scale.dim()
        if row:
            scales = scales.reshape(-1, 1).expand(len(codes), 1).contiguous()
            weight_scale = weight_scale.reshape(1, -1).expand(1, len(weight)).contiguous()
        if not hasattr(F, "scaled_mm"):  # before torch 2.10
            return torch._scaled_mm(codes, weight.t(), scales, weight_scale, out_dtype=dtype, use_fast_accum=True)
        kind = F.ScalingType.RowWise if row else F.ScalingType.TensorWise
        return F.scaled_mm(codes, weight.t(), scales, kind, weight_scale, kind, output_dtype=dtype, use_fast_accum=True)


class Int8Linear(QuantisedLinear):
    """int8 codes of rotated rows, each row with its scale."""

    codes, largest, granule = torch.int8, 127.0, 8

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain, weight_scale=(plain.out_features, 1))

    def turned(self, x: Tensor) -> Tensor:
        """Each run of inputs times the matrix."""
        size = rotated_together(self.in_features)
        return (x.unflatten(-1, (-1, size)) @ hadamard(size, x.device).to(x.dtype)).flatten(-2)

    def code(self, scaled: Tensor) -> Tensor:
        """Rounded half to even."""
        return super().code(scaled.round_())

    def product(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        tokens, weight_scales = len(codes), self.weight_scale.t()
        if codes.is_cuda and tokens < FEWEST_INT8_TOKENS:
            codes = F.pad(codes, (0, 0, 0, FEWEST_INT8_TOKENS - tokens))
        product = torch._int_mm(codes, self.weight.t())[:tokens]
        return by_stretches(lambda some, scale: (some * scale).mul_(weight_scales).to(dtype), dtype, product, scales)


KINDS: Mapping[str, type[Fp8Linear | Int8Linear]] = {E4M3: Fp8Linear, I8: Int8Linear}


def put_quantised(model: nn.Module, codes: Mapping[str, str]) -> None:
    """Replace the linears of ``model`` that ``codes`` names, with the dtype of theirs; other modules stay."""
    modules = dict(model.named_modules())
    for name, dtype in codes.items():
        if isinstance(modules.get(name), Linear):
            model.set_submodule(name, KINDS[dtype](modules[name]))


def quantised_linears(model: nn.Module) -> list[QuantisedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantisedLinear)]


def decode_weights(model: nn.Module, decoded: bool) -> None:
    """Decode the weights of ``model`` until the next call, or follow its modes."""
    for linear in quantised_linears(model):
        linear.decoded = decoded


def mode_of(codes: str, fp8: str) -> str:
    """The mode of linears in these ``codes``; ``fp8`` is the mode of fp8 ones."""
    return fp8 if codes == E4M3 else TOKEN


def faults(fp8: str, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """:func:`fault` for each dtype of codes in its mode; None if the weights are decoded."""
    modes = {codes: mode_of(codes, fp8) for codes in CODES.values()}
    return {codes: None if mode == WEIGHTS else fault(codes, mode, device, dtype) for codes, mode in modes.items()}


def use_codes(
    model: nn.Module, fp8: str, device: torch.device, dtype: torch.dtype, found: Mapping[str, str | None] | None = None
) -> list[str]:
    """Have ``model`` compute with codes, fp8 ones in the mode ``fp8``, as far as ``device`` can; returns notes.

    ``found``: the :func:`faults` of another device, like which it must compute. Raises DeviceError if it cannot.
    """
    told = []
    for form, codes in CODES.items():
        linears = [linear for linear in quantised_linears(model) if isinstance(linear, KINDS[codes])]
        mode, why = mode_of(codes, fp8), None
        if linears and mode != WEIGHTS:
            why = own = fault(codes, mode, device, dtype)
            if found is not None:
                why = found[codes]
                _check_like(device, form, own if why is None else None)
        odd = [linear for linear in linears if mode != WEIGHTS and not linear.fits(device)]
        if why is not None:
            told.append(f"{form}: {TOLD[WEIGHTS]}: {device} does not multiply these codes: {why}")
        elif linears:
            told.append(f"{form}: {TOLD[mode]}")
        if odd and why is None:
            wanted = f"{device} multiplies codes where both widths are multiples of {KINDS[codes].granule}"
            told.append(f"{form}: {len(odd)} of {len(linears)} linears with {TOLD[WEIGHTS]}: {wanted}")
        for linear in linears:
            linear.mode = mode if why is None and linear not in odd else WEIGHTS
    return told


def _check_like(device: torch.device, form: str, why: str | None) -> None:
    """Raises DeviceError if ``device`` cannot multiply codes that rank 0 multiplies."""
    if why is not None:
        problem = f"{device} does not multiply {form} codes, which rank 0 does"
        way = f"--fp8 {WEIGHTS}" if CODES[form] == E4M3 else "the bf16 bakes"
        raise DeviceError(problem, found=why, next=f"the same command with {way}, or without this device")


@functools.cache
@torch.inference_mode()
def fault(codes: str, mode: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``device`` cannot compute in this mode; None if its result is near to that of decoded weights. Tried once."""
    generator = torch.Generator().manual_seed(0)
    linear = KINDS[codes](Linear(64, 32, bias=False, device="meta")).to_empty(device="cpu")
    for name, value in linear.named_parameters():
        given = torch.randn(32, 64, generator=generator) * linear.largest / 8
        value.copy_(given if name == "weight" else torch.full(value.shape, 1 / 64))
    try:
        linear, x = linear.to(device), torch.randn(40, 64, generator=generator).to(device, dtype)
        linear.mode = mode
        found, linear.mode = linear(x).float(), WEIGHTS
        exact = linear(x).float()
        error = ((found - exact).norm() / exact.norm()).item()
    except (RuntimeError, AttributeError, TypeError) as failed:
        return (str(failed).strip() or type(failed).__name__).splitlines()[0]
    return None if error <= AGREEMENT else f"its result is {error:.0%} off"


def by_stretches(make: Callable[..., Tensor], dtype: torch.dtype, *rows: Tensor) -> Tensor:
    """``make(*rows)``, of the first one's shape, in ``dtype``; without a compiler from some rows at a time."""
    first = rows[0]
    if torch.compiler.is_compiling() or first.numel() <= STRETCH:
        return make(*rows)
    found = torch.empty(first.shape, dtype=dtype, device=first.device)
    stretches = (each.split(max(1, STRETCH // first.shape[1])) for each in (found, *rows))
    for target, *some in zip(*stretches, strict=True):
        target.copy_(make(*some))
    return found


def hadamard(size: int, device: torch.device) -> Tensor:
    """H4⊗…⊗H4 / √size, [size, size], float32: symmetric, and its own inverse.

    An entry is negative where an odd number of the base-4 digits of row and column add up to 3.
    """
    number = torch.arange(size, device=device)
    threes = number[:, None] ^ number
    threes = threes & (threes >> 1) & 0x55
    for shift in (4, 2):
        threes = threes ^ (threes >> shift)
    return (1 - 2 * (threes & 1)).float() / math.sqrt(size)


def _unset(like: Tensor, shape: Iterable[int], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(tuple(shape), dtype=dtype, device=like.device), requires_grad=False)
