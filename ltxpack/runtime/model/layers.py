"""The layers of the model: linear, gated attention, feed-forward, and AdaLN-single (spec 06 section 9).

AdaLN turns timesteps into modulation rows. Its MLPs see each distinct timestep once; an index maps tokens to timesteps
where a row is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltxpack.ltx23.expected import FEED_FORWARD, TIMESTEP_WIDTH
from ltxpack.runtime.model.kernels import DEFAULT, KERNELS, Kernel
from ltxpack.runtime.model.rope import Rotation, rotate, split_heads

# Codes and their scales, by the dtype of the codes.
Made: TypeAlias = dict[torch.dtype, tuple[Tensor, Tensor]]


@torch.library.custom_op(
    "ltxpack::note_largest", mutates_args=("largest",), schema="(Tensor(a!) largest, Tensor x) -> ()"
)
def note_largest(largest: Tensor, x: Tensor) -> None:
    """Raise ``largest`` (float32 scalar) to the largest |x|; NaN stays.

    It is one opaque node for the compiler, so that the code around it rounds as without it.
    """
    torch.maximum(largest, torch.linalg.vector_norm(x, ord=math.inf).float(), out=largest)


@note_largest.register_fake
def _(largest: Tensor, x: Tensor) -> None:
    return None


class Linear(nn.Linear):
    """``torch.nn.Linear`` without initial values, whose drawing takes longer than the rest of building a model.

    Off the meta device its weights are undefined. ``largest_input``: see :class:`.LargestInputs`.
    """

    largest_input: Tensor | None = None

    def reset_parameters(self) -> None:
        """Does nothing."""

    def forward(self, x: Tensor, made: Made | None = None) -> Tensor:
        """[..., in] -> [..., out]. ``made``: codes of this ``x`` that quantised linears have made and share."""
        if self.largest_input is not None:
            note_largest(self.largest_input, x)
        return F.linear(x, self.weight, self.bias)


class Keys(NamedTuple):
    """The keys (normed and turned) and values of an attention, [B, heads, S, head_dim] each."""

    key: Tensor
    value: Tensor


class Attention(nn.Module):
    """q from the stream, k and v from the context; q/k RMSNorm over all heads, RoPE, softmax, a gate per head.

    ``kind``: ``kernels.VIDEO``, ``TEXT`` or ``AUDIO``.
    """

    def __init__(
        self,
        kind: str,
        query_dim: int,
        context_dim: int,
        heads: int,
        head_dim: int,
        *,
        bias: bool,
        out_bias: bool,
        eps: float,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.kind, self.heads = kind, heads
        self.to_q = Linear(query_dim, inner, bias=bias)
        self.to_k = Linear(context_dim, inner, bias=bias)
        self.to_v = Linear(context_dim, inner, bias=bias)
        self.norm_q = nn.RMSNorm(inner, eps=eps)
        self.norm_k = nn.RMSNorm(inner, eps=eps)
        self.to_gate_logits = Linear(query_dim, heads)
        self.to_out = nn.Sequential(Linear(inner, query_dim, bias=out_bias))
        self.kernel: Kernel = KERNELS[DEFAULT]

    def forward(self, x: Tensor, keys: Keys, rotation: Rotation | None = None, made: Made | None = None) -> Tensor:
        """``x`` [B, T, query_dim] attends to ``keys``; returns [B, T, query_dim]."""
        made = {} if made is None else made
        query = self._turned(self.norm_q(self.to_q(x, made)), rotation)
        return self._out(x, self.kernel(query, keys.key, keys.value), made)

    def keys(self, context: Tensor, rotation: Rotation | None = None, made: Made | None = None) -> Keys:
        """Keys and values of ``context`` [B, S, context_dim]."""
        made = {} if made is None else made
        key = self._turned(self.norm_k(self.to_k(context, made)), rotation)
        return Keys(key, split_heads(self.to_v(context, made), self.heads))

    def to_itself(self, x: Tensor, rotation: Rotation) -> Tensor:
        made: Made = {}
        return self(x, self.keys(x, rotation, made), rotation, made)

    def values_only(self, x: Tensor) -> Tensor:
        """The perturbed self-attention of STG: every token keeps its own value."""
        made: Made = {}
        return self._out(x, split_heads(self.to_v(x, made), self.heads), made)

    def _turned(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        heads = split_heads(x, self.heads)
        return heads if rotation is None else rotate(heads, rotation)

    def _out(self, x: Tensor, attended: Tensor, made: Made) -> Tensor:
        gates = 2 * torch.sigmoid(self.to_gate_logits(x, made))
        return self.to_out((attended.transpose(1, 2) * gates.unsqueeze(-1)).flatten(2))


class FeedForward(nn.Module):
    """Linear to four times the width, tanh-approximated GELU, linear back."""

    def __init__(self, dim: int, *, bias: bool) -> None:
        super().__init__()
        # diffusers keeps a dropout between the two, hence the names net.0.proj and net.2.
        inner = FEED_FORWARD * dim
        self.net = nn.Sequential(_GeluProjection(dim, inner, bias), nn.Identity(), Linear(inner, dim, bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _GeluProjection(nn.Module):
    def __init__(self, dim: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.proj = Linear(dim, inner, bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


@dataclass(frozen=True)
class Rows:
    """Modulation rows of the K distinct timesteps.

    ``values`` [B, K, rows, D]; ``index`` [T] says which of the K each token uses, None that K is 1.
    """

    values: Tensor
    index: Tensor | None = None

    def plus(self, table: Tensor) -> Rows:
        """These rows with a learned ``table`` [rows, D] added (rounded to the rows' dtype first)."""
        return Rows(self.values + table.to(self.values.dtype), self.index)

    def row(self, number: int) -> Tensor:
        """One row for every token: [B, T, D], or [B, 1, D] when all tokens share a timestep."""
        values = self.values[:, :, number]
        return values if self.index is None else values.index_select(1, self.index)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x·(1 + scale) + shift``."""
    return x * (1 + scale) + shift


def sinusoid(timesteps: Tensor) -> Tensor:
    """[cos, sin] of ``t·10000^(-i/128)`` in float32: ``timesteps`` [...] -> [..., 256]."""
    half = TIMESTEP_WIDTH // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[..., None] * torch.exp(-math.log(10000) * steps / half)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(TIMESTEP_WIDTH, dim)
        self.linear_2 = Linear(dim, dim)

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Timesteps in the model's scale, [...] float32 or float64 -> [..., D] in ``dtype``."""
        return self.linear_2(F.silu(self.linear_1(sinusoid(timesteps).to(dtype))))


class AdaLayerNormSingle(nn.Module):
    """Timesteps -> ``rows`` modulation vectors, and the embedding behind them."""

    def __init__(self, dim: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(dim)})
        self.linear = Linear(dim, rows * dim)

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[B, K] -> rows [B, K, rows, D] and embedding [B, K, 1, D], both in ``dtype``."""
        embedded = self.emb["timestep_embedder"](timesteps, dtype)
        return self.linear(F.silu(embedded)).unflatten(-1, (self.rows, -1)), embedded.unsqueeze(2)
