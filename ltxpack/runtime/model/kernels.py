"""The kernels that can compute softmax(q·kᵀ/√d)·v, and the choice of one for each kind of attention, by measurement.

Knows queries, keys and values ``[B, heads, T, head_dim]``; no mask, nothing causal. A kernel is a plain function that
calls one operator. It changes no setting of torch, so threads do not disturb each other, and a compiled block contains
the kernel that was chosen before it was compiled.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ltxpack.errors import UsageError
from ltxpack.ltx23.classes import TEXT_TOKENS
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.rope import Rotation, rotate, split_heads

Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
VARIABLE = "LTXPACK_ATTENTION"
AUTO = "auto"
DEFAULT = "sdpa"
# The kinds of attention: of the video's tokens to themselves, of the video's to the text, and all that has the sound's
# heads (to itself, to its text, to and from the video).
VIDEO, TEXT, AUDIO = "video", "text", "audio"
FLASH3_PACKAGE = "flash_attn_interface"
# The largest error against float64 on random data with which a kernel may be chosen: bf16 stays well below.
AGREEMENT = 2e-2
# Kernels within this factor count as equally fast, and the first in the list wins, so that noise changes no video.
MARGIN = 1.03
# Enough tokens to fill a large card, few enough for a small one: 0.5 GB of operands at 32 heads of 128 in bf16.
VIDEO_TOKENS = 16384
# Tokens of the sound of 121 frames at 24 fps.
AUDIO_TOKENS = 126
# (Queries, keys) of the first, small comparisons, with either one larger; the sound of a single frame is one token.
PROBED = ((200, 101), (101, 200), (101, 1), (1, 101), (1, 1))
# The first version of cuDNN whose attention is right for lengths that 128 does not divide (pytorch 169849). torch
# itself uses an older one only on request.
SOUND_CUDNN = 91501
WARM_UPS, REPEATS = 2, 5

_aten = torch.ops.aten


@torch.library.custom_op(
    "ltxpack::flash_attention_3", mutates_args=(), schema="(Tensor query, Tensor key, Tensor value) -> Tensor"
)
def _flash3_op(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlashAttention 3 on ``[B, T, heads, head_dim]``; always one opaque node for the compiler."""
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
    """cuDNN's attention, except for a single query or key, which cuDNN does not take."""
    if query.shape[-2] == 1 or key.shape[-2] == 1:
        return F.scaled_dot_product_attention(query, key, value)
    return _cudnn_alone(query, key, value)


def _cudnn_alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    found: Tensor = _aten._scaled_dot_product_cudnn_attention(query, key, value, None, False)[0]
    return found


def _flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    on_cpu = query.device.type == "cpu"
    run = _aten._scaled_dot_product_flash_attention_for_cpu if on_cpu else _aten._scaled_dot_product_flash_attention
    found: Tensor = run(query, key, value)[0]
    return found


# Name -> kernel, the best first among equally fast ones. "sdpa" leaves the choice to torch, at every call.
KERNELS: Mapping[str, Kernel] = {
    "flash3": _flash3,
    "cudnn": _cudnn,
    "flash": _flash,
    "efficient": lambda q, k, v: _aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0],
    "sdpa": F.scaled_dot_product_attention,
    "math": lambda q, k, v: _aten._scaled_dot_product_attention_math(q, k, v)[0],
}
# "math" stores every score, 34 GB at VIDEO_TOKENS, so it is used only on request.
MEASURED = ("flash3", "cudnn", "flash", "efficient")
# torch's own check of a call, which its operators do not repeat.
_JUDGES = {
    "cudnn": torch.backends.cuda.can_use_cudnn_attention,
    "flash": torch.backends.cuda.can_use_flash_attention,
    "efficient": torch.backends.cuda.can_use_efficient_attention,
}


@dataclass(frozen=True)
class AttentionKind:
    """Attentions of a model that share a kernel: number and width of their heads, their device and dtype.

    ``lengths``: the (queries, keys) of a measurement. ``rotated``: RoPE turns the queries and keys.
    """

    name: str
    heads: int
    width: int
    lengths: tuple[tuple[int, int], ...]
    rotated: bool
    device: torch.device
    dtype: torch.dtype

    def random(self, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v ``[1, heads, T, head_dim]`` of random numbers, with the strides they have in a block.

        The numbers are not zeros, with which kernels run faster.
        """
        generator = torch.Generator(self.device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)

        def projected(tokens: int) -> Tensor:
            return split_heads(draw(1, tokens, self.heads * self.width), self.heads)

        def turned(tokens: int) -> Tensor:
            if not self.rotated:
                return projected(tokens)
            angles = draw(1, self.heads, tokens, self.width // 2)
            return rotate(projected(tokens), Rotation(angles.cos(), angles.sin()))

        return turned(queries), turned(keys), projected(keys)


def attention_kinds(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> tuple[AttentionKind, ...]:
    """The kinds of attention in a DiT, for :func:`choose` before any weight is loaded."""
    video, audio = config.streams.video, config.streams.audio
    lengths = {
        VIDEO: ((VIDEO_TOKENS, VIDEO_TOKENS),),
        TEXT: ((VIDEO_TOKENS, TEXT_TOKENS),),
        AUDIO: ((VIDEO_TOKENS, AUDIO_TOKENS), (AUDIO_TOKENS, VIDEO_TOKENS)),
    }
    return tuple(
        AttentionKind(name, stream.heads, stream.head_dim, lengths[name], name != TEXT, device, dtype)
        for name, stream in ((VIDEO, video), (TEXT, video), (AUDIO, audio))
    )


@dataclass(frozen=True)
class Measurement:
    """The kernel for one kind; the milliseconds of all kernels that run, and the faults of the others."""

    best: str
    milliseconds: Mapping[str, float]
    refused: Mapping[str, str]

    def __str__(self) -> str:
        ordered = sorted(self.milliseconds.items(), key=lambda pair: pair[1])
        times = ", ".join(f"{name} {value:.2f} ms" for name, value in ordered)
        return times or "no other runs here"


@dataclass(frozen=True)
class KernelChoice:
    """The kernel's name for each kind of attention. ``note`` is one line for the user; ``refused``: kernel -> why."""

    kernels: Mapping[str, str]
    note: str
    refused: Mapping[str, str]

    @property
    def name(self) -> str:
        """The kernel's name, or ``video cudnn, text flash, audio flash`` if they differ."""
        names = set(self.kernels.values())
        return names.pop() if len(names) == 1 else ", ".join(f"{kind} {name}" for kind, name in self.kernels.items())


def choose(kinds: Sequence[AttentionKind], name: str | None = None) -> KernelChoice:
    """The kernel called ``name``, else that of ``LTXPACK_ATTENTION``; for ``auto``, the fastest for each kind.

    It measures a kind once per process; on a CPU it measures nothing, and torch chooses. Raises UsageError for an
    unknown name, and for a kernel that does not run here or gives wrong numbers.
    """
    asked = asked_for(name)
    if asked != AUTO:
        _check_usable(kinds, asked)
        why = "asked for" if name else f"by {VARIABLE}"
    elif kinds[0].device.type == "cpu":
        asked, why = DEFAULT, "torch's own choice; nothing is measured on a CPU"
    else:
        return fastest(kinds)
    return KernelChoice({kind.name: asked for kind in kinds}, f"attention: {asked} ({why})", {})


def fastest(kinds: Sequence[AttentionKind]) -> KernelChoice:
    """The fastest kernel for each kind, by measurement on the device of the kinds."""
    found = {kind.name: measured(kind, MEASURED) for kind in kinds}
    told = ", ".join(f"{each.best} for {kind} ({each})" for kind, each in found.items())
    refused = {}
    for (kind, each), name in itertools.product(found.items(), MEASURED):
        why = each.refused.get(name)
        if why is not None:
            everywhere = all(other.refused.get(name) == why for other in found.values())
            refused[name if everywhere else f"{name} for {kind}"] = why
    return KernelChoice({kind: each.best for kind, each in found.items()}, f"attention: {told}", refused)


def asked_for(name: str | None = None) -> str:
    """``name``, else ``LTXPACK_ATTENTION``, else ``auto``."""
    return name or os.environ.get(VARIABLE) or AUTO


@functools.cache
def measured(kind: AttentionKind, names: tuple[str, ...]) -> Measurement:
    """The fastest of ``names`` for attentions of ``kind``; torch's own choice if none runs."""
    refused, times = {}, {}
    for name in names:
        try:
            why = _doubt(name) or fault(kind, name)
            if why is None:
                times[name] = milliseconds(kind, KERNELS[name])
        except torch.OutOfMemoryError:
            why = "no memory to measure it"
        if why is not None:
            refused[name] = why
    enough = MARGIN * min(times.values(), default=0.0)
    return Measurement(next((name for name, value in times.items() if value <= enough), DEFAULT), times, refused)


def fault(kind: AttentionKind, name: str) -> str | None:
    """Why the kernel cannot be used for ``kind``, or None. Runs it on a few lengths and compares with float64."""
    if name == "flash3" and importlib.util.find_spec(FLASH3_PACKAGE) is None:
        return f"no package {FLASH3_PACKAGE}"
    return next(filter(None, (_fault_at(kind, name, *lengths) for lengths in PROBED)), None)


@torch.inference_mode()
def _fault_at(kind: AttentionKind, name: str, queries: int, keys: int) -> str | None:
    query, key, value = kind.random(queries, keys)
    judge = None if kind.device.type == "cpu" or (name == "cudnn" and 1 in (queries, keys)) else _JUDGES.get(name)
    if judge and not judge(torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, False)):
        return f"torch does not run it on this card with {kind.dtype} and heads of {kind.width}".replace("torch.", "")
    try:
        found = KERNELS[name](query, key, value).double()
    except NotImplementedError:
        return f"it does not run on a device of type {kind.device.type}"
    except (RuntimeError, ImportError, TypeError, AttributeError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    scores = query.double() @ key.double().mT / kind.width**0.5
    expected = scores.softmax(-1) @ value.double()
    error_found = ((found - expected).norm() / expected.norm()).item()
    # In this form NaN is a fault too.
    return None if error_found <= AGREEMENT else f"wrong by {error_found:.1e} with {queries} queries and {keys} keys"


def _doubt(name: str) -> str | None:
    """Why ``auto`` leaves out a kernel that may run here, or None."""
    version: Callable[[], int | None] = torch.backends.cudnn.version
    found = version() if name == "cudnn" else None
    return None if found is None or found >= SOUND_CUDNN else f"cuDNN {found} is older than {SOUND_CUDNN}"


@torch.inference_mode()
def milliseconds(kind: AttentionKind, kernel: Kernel) -> float:
    """The time of one call at each length of ``kind``: the median of a few, after a warm-up."""
    total = 0.0
    for queries, keys in kind.lengths:
        call = functools.partial(kernel, *kind.random(queries, keys))
        for _ in range(WARM_UPS):
            call()
        total += sorted(_timed(kind.device, call) for _ in range(REPEATS))[REPEATS // 2]
    return total


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


def _check_usable(kinds: Sequence[AttentionKind], name: str) -> None:
    """Raises UsageError, which says what runs here, unless ``name`` is a kernel that does."""
    if name not in KERNELS:
        problem, expected, found = "unknown attention kernel", ", ".join((AUTO, *KERNELS)), name
    elif (wrong := _fault_of_any(kinds, name)) is not None:
        problem, found = f"the attention kernel {name} cannot be used here", wrong
        expected = f"one for {kinds[0].device}, {kinds[0].dtype}".replace("torch.", "")
    else:
        return
    running = (AUTO, *(other for other in KERNELS if _fault_of_any(kinds, other) is None))
    advice = f"give --attention one that runs here ({', '.join(running)}), or unset {VARIABLE}"
    raise UsageError(problem, expected=expected, found=found, next=advice)


def _fault_of_any(kinds: Sequence[AttentionKind], name: str) -> str | None:
    return next(filter(None, (fault(kind, name) for kind in kinds)), None)
