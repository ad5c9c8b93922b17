"""The kernels that can compute softmax(q·kᵀ/√d)·v, and the choice of one by measurement.

Knows queries, keys and values ``[B, heads, T, head_dim]``; no mask, nothing causal. A kernel is a plain function, so
a compiled block contains the one that was chosen before it was compiled.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ltxpack.errors import UsageError

Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
VARIABLE = "LTXPACK_ATTENTION"
AUTO = "auto"
DEFAULT = "sdpa"
FLASH3_PACKAGE = "flash_attn_interface"
# Every kernel must come this near to float64 on random data before it may be chosen: bf16 operands stay well below.
AGREEMENT = 2e-2
# Where two kernels are as good as equal the first of the list is taken, so that noise does not change a video.
MARGIN = 1.03
# Long enough to fill a large card, short enough for any: 0.5 GB of operands at 32 heads of 128 in bf16.
MEASURED_TOKENS = 16384
# Queries and keys: either may be fewer, and the sound of a single frame is one token.
PROBED = ((200, 101), (101, 200), (101, 1), (1, 101), (1, 1))
# From this version on cuDNN's attention is right where lengths are no multiples of 128 (pytorch 169849); torch takes an
# older one only where it is told to.
SOUND_CUDNN = 91501
WARM_UPS, REPEATS = 2, 5


def _torch(backend: SDPBackend) -> Kernel:
    """torch's attention, held to one of its backends; RuntimeError where that one cannot."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value)

    return attention


@torch.library.custom_op(
    "ltxpack::flash_attention_3", mutates_args=(), schema="(Tensor query, Tensor key, Tensor value) -> Tensor"
)
def _flash3_op(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlashAttention 3 on ``[B, T, heads, head_dim]``; one opaque node to the compiler, whatever the package does."""
    found = importlib.import_module(FLASH3_PACKAGE).flash_attn_func(query, key, value)
    # Older releases also return the log-sum-exp.
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out.contiguous()


@_flash3_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(query.shape)


def _flash3(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    swapped = (part.transpose(1, 2) for part in (query, key, value))
    found: Tensor = _flash3_op(*swapped)
    return found.transpose(1, 2)


def _cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """cuDNN's, but for a single query or key, which torch does not give it."""
    if query.shape[-2] == 1 or key.shape[-2] == 1:
        return _any(query, key, value)
    return _cudnn_alone(query, key, value)


_cudnn_alone = _torch(SDPBackend.CUDNN_ATTENTION)


def _any(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


# Name -> kernel, best first where several are as fast. "sdpa" leaves the choice to torch, at every call.
KERNELS: Mapping[str, Kernel] = {
    "flash3": _flash3,
    "cudnn": _cudnn,
    "flash": _torch(SDPBackend.FLASH_ATTENTION),
    "efficient": _torch(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa": _any,
    "math": _torch(SDPBackend.MATH),
}
# "math" keeps every score: 34 GB at MEASURED_TOKENS. It has to be asked for.
MEASURED = ("flash3", "cudnn", "flash", "efficient")


@dataclass(frozen=True)
class Heads:
    """What is attended with: number and width of the heads, where and in which dtype; ``others`` are the widths of the
    model's other heads, on which a kernel must run too.
    """

    count: int
    width: int
    device: torch.device
    dtype: torch.dtype
    others: tuple[int, ...] = ()

    def random(self, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v ``[1, heads, T, head_dim]`` of random numbers; never zeros, on which kernels run faster."""
        generator = torch.Generator(self.device).manual_seed(0)

        def draw(tokens: int) -> Tensor:
            shape = (1, self.count, tokens, self.width)
            return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)

        return draw(queries), draw(keys), draw(keys)


@dataclass(frozen=True)
class Choice:
    """The kernel to use. ``milliseconds``: what was measured, at ``MEASURED_TOKENS``; ``refused``: name -> why;
    ``why`` it is this one, where nothing was measured.
    """

    name: str
    milliseconds: Mapping[str, float]
    refused: Mapping[str, str]
    why: str = "no other runs here"

    @property
    def note(self) -> str:
        """One line for the user."""
        if not self.milliseconds:
            return f"attention: {self.name} ({self.why})"
        times = ", ".join(f"{name} {value:.2f} ms" for name, value in sorted(self.milliseconds.items(), key=_second))
        return f"attention: {self.name} (of {MEASURED_TOKENS} tokens: {times})"


def choose(heads: Heads, name: str | None = None) -> Choice:
    """The kernel called ``name``, or by ``LTXPACK_ATTENTION``; for ``auto`` or nothing, the fastest on this device.

    Measured once per process for the same ``heads``; on a CPU torch's own choice is taken without measuring. Raises
    UsageError for an unknown name, and for a kernel that does not run here or gives wrong numbers.
    """
    asked = asked_for(name)
    if asked != AUTO:
        return _pinned(heads, asked, "asked for" if name else f"by {VARIABLE}")
    if heads.device.type == "cpu":
        return Choice(DEFAULT, {}, {}, "torch's own choice; nothing is measured on a CPU")
    return measured(heads, MEASURED, MEASURED_TOKENS)


def asked_for(name: str | None = None) -> str:
    """``name``, else what ``LTXPACK_ATTENTION`` says, else ``auto``."""
    return name or os.environ.get(VARIABLE) or AUTO


@functools.cache
def measured(heads: Heads, names: tuple[str, ...], tokens: int) -> Choice:
    """The fastest of ``names`` at ``tokens`` tokens attending to themselves; torch's own choice if none runs."""
    refused, times = {}, {}
    for name in names:
        try:
            why = _doubt(name) or fault(heads, name)
            if why is None:
                times[name] = milliseconds(heads, KERNELS[name], tokens)
        except torch.OutOfMemoryError:
            why = "no memory to measure it"
        if why is not None:
            refused[name] = why
    enough = MARGIN * min(times.values(), default=0.0)
    return Choice(next((name for name, value in times.items() if value <= enough), DEFAULT), times, refused)


def fault(heads: Heads, name: str) -> str | None:
    """Why the kernel cannot be used here, or None: it is run on a few lengths at each width, and compared."""
    if name == "flash3" and importlib.util.find_spec(FLASH3_PACKAGE) is None:
        return f"no package {FLASH3_PACKAGE}"
    for width, (queries, keys) in itertools.product((heads.width, *heads.others), PROBED):
        found = _fault_at(replace(heads, width=width), name, queries, keys)
        if found is not None:
            return found
    return None


@torch.inference_mode()
def _fault_at(heads: Heads, name: str, queries: int, keys: int) -> str | None:
    query, key, value = heads.random(queries, keys)
    try:
        found = KERNELS[name](query, key, value).double()
    except (RuntimeError, ImportError, TypeError, AttributeError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    scores = query.double() @ key.double().mT / heads.width**0.5
    expected = scores.softmax(-1) @ value.double()
    error_found = ((found - expected).norm() / expected.norm()).item()
    # Written so that what is no number is wrong too.
    return None if error_found <= AGREEMENT else f"wrong by {error_found:.1e} with {queries} queries and {keys} keys"


def _doubt(name: str) -> str | None:
    """Why a kernel that may run here is not taken unless it is asked for, or None."""
    version: Callable[[], int | None] = torch.backends.cudnn.version
    found = version() if name == "cudnn" else None
    return None if found is None or found >= SOUND_CUDNN else f"cuDNN {found} is older than {SOUND_CUDNN}"


@torch.inference_mode()
def milliseconds(heads: Heads, kernel: Kernel, tokens: int) -> float:
    """Median of a few calls, after warming up."""
    operands = heads.random(tokens, tokens)
    for _ in range(WARM_UPS):
        kernel(*operands)
    times = sorted(_timed(heads.device, lambda: kernel(*operands)) for _ in range(REPEATS))
    return times[len(times) // 2]


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        work()
        return (time.perf_counter() - begin) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        start.record()
        work()
        end.record()
        end.synchronize()
    return start.elapsed_time(end)


def _pinned(heads: Heads, name: str, why: str) -> Choice:
    if name not in KERNELS:
        raise UsageError(
            "unknown attention kernel", expected=", ".join((AUTO, *KERNELS)), found=name, next=_instead(heads)
        )
    wrong = fault(heads, name)
    if wrong is not None:
        raise UsageError(
            f"the attention kernel {name} cannot be used here",
            expected=f"one for {heads.device}, {heads.dtype}".replace("torch.", ""),
            found=wrong,
            next=_instead(heads),
        )
    return Choice(name, {}, {}, why)


def _instead(heads: Heads) -> str:
    """What runs here."""
    running = (name for name in KERNELS if fault(heads, name) is None)
    return f"give --attention one that runs here ({', '.join((AUTO, *running))}), or unset {VARIABLE}"


def _second(pair: tuple[str, float]) -> float:
    return pair[1]
