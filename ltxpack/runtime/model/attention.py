"""Gated multi-head attention and the feed-forward layer (spec 06 section 9). They know no timesteps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltxpack.runtime.model.kernels import DEFAULT, KERNELS, Kernel
from ltxpack.runtime.model.linear import Linear
from ltxpack.runtime.model.rope import Rotation, rotate


@dataclass(frozen=True)
class AttentionShape:
    """Heads of an attention and the widths it connects."""

    query_dim: int
    context_dim: int
    heads: int
    head_dim: int


class Keys(NamedTuple):
    """What is attended to: keys (normed and turned) and values, [B, heads, S, head_dim] each."""

    key: Tensor
    value: Tensor


class Packed(NamedTuple):
    """Several projections as one; the projections' own parameters are views into it."""

    weight: Tensor
    bias: Tensor | None


class Attention(nn.Module):
    """q from the stream, k and v from the context; q/k RMSNorm over all heads, RoPE, softmax, a gate per head."""

    def __init__(self, shape: AttentionShape, *, bias: bool, out_bias: bool, eps: float) -> None:
        super().__init__()
        inner = shape.heads * shape.head_dim
        self.heads = shape.heads
        self.to_q = Linear(shape.query_dim, inner, bias=bias)
        self.to_k = Linear(shape.context_dim, inner, bias=bias)
        self.to_v = Linear(shape.context_dim, inner, bias=bias)
        self.norm_q = nn.RMSNorm(inner, eps=eps)
        self.norm_k = nn.RMSNorm(inner, eps=eps)
        self.to_gate_logits = Linear(shape.query_dim, shape.heads)
        self.to_out = nn.Sequential(Linear(inner, shape.query_dim, bias=out_bias))
        self.kernel: Kernel = KERNELS[DEFAULT]
        self.packed: Packed | None = None
        self._packed_names: tuple[str, ...] = ()
        self.register_load_state_dict_post_hook(_pack_again)

    def forward(self, x: Tensor, keys: Keys, rotation: Rotation | None = None) -> Tensor:
        """``x`` [B, T, query_dim] attends to ``keys``; returns [B, T, query_dim]."""
        return self._attend(x, self.to_q(x), keys, rotation)

    def keys(self, context: Tensor, rotation: Rotation | None = None) -> Keys:
        """Keys and values of ``context`` [B, S, context_dim]."""
        key, value = self._project(context, self.to_k, self.to_v)
        return self._keys(key, value, rotation)

    def to_itself(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Self-attention of ``x`` [B, T, query_dim]."""
        query, key, value = self._project(x, self.to_q, self.to_k, self.to_v)
        return self._attend(x, query, self._keys(key, value, rotation), rotation)

    def values_only(self, x: Tensor) -> Tensor:
        """The perturbed self-attention of STG: every token keeps its own value."""
        return self._out(x, self._heads(self.to_v(x)))

    def pack(self, *names: str) -> None:
        """Keep the weights of the projections ``names``, those of one call of this module, in one tensor each.

        Their parameters stay under their names as views, so nothing is stored twice and ``state_dict`` is unchanged;
        what is loaded or moved later is packed again. Not for weights that are put in place of parameters by hand.
        """
        parts = [getattr(self, name) for name in names]
        if any(part.weight.is_meta for part in parts):
            raise ValueError("weights are packed after they are loaded")
        with torch.no_grad():
            weight = _joined(parts, "weight")
            bias = None if parts[0].bias is None else _joined(parts, "bias")
        self.packed, self._packed_names = Packed(weight, bias), names

    def _project(self, x: Tensor, *parts: Linear) -> tuple[Tensor, ...]:
        if self.packed is None:
            return tuple(part(x) for part in parts)
        return F.linear(x, *self.packed).split([part.out_features for part in parts], dim=-1)

    def _keys(self, key: Tensor, value: Tensor, rotation: Rotation | None) -> Keys:
        return Keys(self._turned(self.norm_k(key), rotation), self._heads(value))

    def _attend(self, x: Tensor, query: Tensor, keys: Keys, rotation: Rotation | None) -> Tensor:
        return self._out(x, self.kernel(self._turned(self.norm_q(query), rotation), keys.key, keys.value))

    def _turned(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        heads = self._heads(x)
        return heads if rotation is None else rotate(heads, rotation)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _out(self, x: Tensor, attended: Tensor) -> Tensor:
        gates = 2 * torch.sigmoid(self.to_gate_logits(x))
        return self.to_out((attended.transpose(1, 2) * gates.unsqueeze(-1)).flatten(2))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Attention:
        """Moves and casts parameter by parameter, which would leave the packed tensors behind."""
        self.packed = None
        super()._apply(fn, recurse)
        _pack_again(self)
        return self


def _joined(parts: list[Linear], attribute: str) -> Tensor:
    """The parts' parameters one below the other; each parameter becomes a view of its rows."""
    given = [getattr(part, attribute) for part in parts]
    joined = torch.cat([parameter.detach() for parameter in given])
    for part, rows in zip(parts, joined.split([len(parameter) for parameter in given]), strict=True):
        setattr(part, attribute, nn.Parameter(rows, requires_grad=False))
    return joined


def _pack_again(attention: Attention, incompatible_keys: object = None) -> None:
    """After new values came, by copy or as new parameters."""
    if attention._packed_names and not attention.to_q.weight.is_meta:
        attention.pack(*attention._packed_names)


class FeedForward(nn.Module):
    """Linear to four times the width, tanh-approximated GELU, linear back."""

    def __init__(self, dim: int, *, bias: bool) -> None:
        super().__init__()
        # diffusers keeps a dropout between the two, hence the names net.0.proj and net.2.
        self.net = nn.Sequential(_GeluProjection(dim, 4 * dim, bias), nn.Identity(), Linear(4 * dim, dim, bias))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.net(x)


class _GeluProjection(nn.Module):
    def __init__(self, dim: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.proj = Linear(dim, inner, bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")
