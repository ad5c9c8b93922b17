"""What a card is asked for, operation by operation: kernels, FLOP, and what the host would wait for.

Everything is on the meta device, so nothing is computed. What the host computes for itself does not count.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

META = torch.device("meta")
BFLOAT16 = torch.bfloat16
aten = torch.ops.aten
# One kernel on a card, though torch can also make them of others.
WHOLE = {
    aten.rms_norm.default,
    aten.layer_norm.default,
    aten.gelu.default,
    aten.silu.default,
    aten.scaled_dot_product_attention.default,
}
# What the host cannot know before the card has computed it.
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _product(one: Tensor, other: Tensor, *_: Any, **__: Any) -> int:
    """FLOP of [rows, inner] times [inner, columns]."""
    return 2 * math.prod(one.shape) * other.shape[1]


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """FLOP of scores, and of values weighted by them."""
    return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


# Of operators that torch's own counter does not know.
FLOP: dict[Any, Callable[..., int]] = {
    getattr(aten, "_scaled_mm_v2", None): _product,
    aten._int_mm: _product,
    aten.scaled_dot_product_attention: _attention,
}


class Operator(NamedTuple):
    """What is known of an operator: whether others carry it out, its FLOP, whether it waits, if it is a kernel, if
    it makes one new tensor and changes none, and if it changes and returns its first argument and no other.
    """

    divides: bool
    flop: Callable[..., int] | None
    waits: bool
    launches: bool
    pure: bool
    in_place: bool


@functools.cache
def _known(func: Any) -> Operator:
    outs = [given.alias_info for given in func._schema.returns]
    # A view is no kernel, nor is what only makes room.
    view = func.overloadpacket is aten.empty or all(alias is not None and not alias.is_write for alias in outs)
    flop = FLOP.get(func.overloadpacket) or flop_registry.get(func.overloadpacket)
    waits, divides = bool(WAITS & set(func.tags)), func not in WHOLE and func._can_decompose()
    shared = [given.alias_info for given in func._schema.arguments if given.alias_info is not None] + outs
    pure = shared == [None]
    in_place = len(shared) == 2 and all(alias is not None and alias.is_write for alias in shared)
    in_place = in_place and func._schema.arguments[0].alias_info is not None
    return Operator(divides, flop, waits, not view, pure and not waits, in_place and not waits)


# What an operation on the meta device makes, by what it is given: torch takes half a millisecond to find out.
_made: dict[Any, tuple[Any, ...]] = {}


def carried_out(func: Any, args: Any, kwargs: Any) -> Any:
    """``func(*args, **kwargs)``; of the same again on the meta device only a tensor of the same layout."""
    known = _known(func)
    if not (known.pure or known.in_place):
        return func(*args, **kwargs)
    key = (func, torch.is_inference_mode_enabled(), described(args), described(kwargs))
    if key in _made:
        if known.in_place:
            return args[0]
        size, stride, dtype = _made[key]
        return torch.empty_strided(size, stride, dtype=dtype, device=META)
    made = func(*args, **kwargs)
    if (
        isinstance(made, Tensor)
        and made.is_meta
        and (described(made) == key[2][0] if known.in_place else made.storage_offset() == 0)
    ):
        _made[key] = tuple(made.shape), made.stride(), made.dtype
    return made


def described(value: Any) -> Any:
    """Arguments as a key; tensors by their layout, and none that has content twice.

    1, 1.0 and True are equal keys and different arguments.
    """
    if isinstance(value, Tensor):
        place = getattr(value, "_fake_device", None) or (META if value.is_meta else object())
        return place, value.dtype, value.shape, value.stride()
    if isinstance(value, list | tuple):
        return tuple(map(described, value))
    if isinstance(value, dict):
        return tuple((name, described(part)) for name, part in value.items())
    return type(value), value


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is launched in the block, its FLOP, and how often the host would wait."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, known = kwargs or {}, _known(func)
        if known.divides:
            with self:
                return func.decompose(*args, **kwargs)
        given = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        read_back = func is aten._local_scalar_dense.default and args[0].is_meta
        made = 0 if read_back else carried_out(func, args, kwargs)
        first = made[0] if isinstance(made, tuple | list) and made else made
        if not read_back and not any(isinstance(part, Tensor) and part.is_meta for part in (*given, first)):
            return made
        self.found["waits"] += known.waits or any(arg.device.type == "cpu" and arg.dim() > 0 for arg in given)
        if known.launches and not read_back:
            self.found["launches"] += 1
            self.found["flop"] += 0 if known.flop is None else int(known.flop(*args, **kwargs, out_val=made))
        return made
