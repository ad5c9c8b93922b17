"""Weights stored as codes: their dtypes, their scales, and the blocks without codes (spec 09)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

FP8, INT8 = "F8_E4M3", "I8"
# The form of a bake in users' words -> the dtype of its codes.
CODES = {"fp8": FP8, "int8": INT8}
# The dtype of a linear's ``weight`` in codes -> the float32 scales beside it.
SCALES = {FP8: ("weight_scale", "input_scale"), INT8: ("weight_scale",)}
# Number of blocks of a model -> the blocks that usually stay in bf16; in other models the first and the last.
KEPT_BLOCKS = {48: (0, 1, 46, 47)}

# The most inputs that int8 rotates together: the largest power of 4 up to this that divides their number.
MOST_ROTATED = 256

Tensor = tuple[str, str, tuple[int, ...]]
"""Name, dtype as safetensors spells it, shape."""


def kept_blocks(count: int) -> tuple[int, ...]:
    """The blocks that usually stay in bf16 in a model of ``count`` blocks."""
    return KEPT_BLOCKS.get(count, (0, count - 1) if count > 1 else (0,))


def rotated_together(inputs: int) -> int:
    """The number of inputs of a weight that int8 rotates together."""
    size = 1
    while size < MOST_ROTATED and inputs % (4 * size) == 0:
        size *= 4
    return size


def coded_linears(dtypes: Mapping[str, str]) -> dict[str, str]:
    """The linears (without ``.weight``) stored as codes -> the dtype of the codes; ``dtypes`` has all tensors."""
    weights = ((name, dtype) for name, dtype in dtypes.items() if name.endswith(".weight"))
    return {name.removesuffix(".weight"): dtype for name, dtype in weights if dtype in SCALES}


def never_cast(dtypes: Mapping[str, str]) -> frozenset[str]:
    """The codes and scales among these tensors, which keep their stored dtype whatever the model's dtype."""
    parts = (f"{name}.{part}" for name, codes in coded_linears(dtypes).items() for part in ("weight", *SCALES[codes]))
    return frozenset(parts) & dtypes.keys()


def with_codes(tensors: Iterable[Tensor], codes: str) -> Iterator[Tensor]:
    """The transformer's ``tensors``, with ``codes`` for the linears of all blocks but the usual bf16 ones."""
    found = [(re.match(r"transformer_blocks\.(\d+)\.", tensor[0]), *tensor) for tensor in tensors]
    count = 1 + max((int(block[1]) for block, *_ in found if block), default=-1)
    for block, name, dtype, shape in found:
        linear = name.endswith(".weight") and len(shape) == 2
        if block is None or not linear or int(block[1]) in kept_blocks(count):
            yield name, dtype, shape
            continue
        yield name, codes, shape
        scale = (shape[0], 1) if codes == INT8 else ()
        yield from ((f"{name.removesuffix('weight')}{part}", "F32", scale) for part in SCALES[codes])
