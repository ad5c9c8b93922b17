"""Weights stored as codes: their dtypes, their scales, and the blocks without codes (spec 09)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

E4M3, I8 = "F8_E4M3", "I8"
# The form of a bake in users' words -> the dtype of its codes.
CODES = {"fp8": E4M3, "int8": I8}
# The dtype of a linear's ``weight`` in codes -> the float32 scales beside it.
SCALES = {E4M3: ("weight_scale", "input_scale"), I8: ("weight_scale",)}
# Number of blocks of a model -> the blocks that usually stay in bf16; in other models the first and the last.
KEPT_BLOCKS = {48: (0, 1, 46, 47)}

# The field of a transformer's config.json that says that its weights are codes; diffusers, which would take the codes
# for weights, refuses the values that it does not know.
CODED = "quantization_config"

_IN_BLOCK = re.compile(r"transformer_blocks\.(\d+)\..+\.weight\Z")
# The most inputs that int8 rotates together: the largest power of 4 up to this that divides their number.
MOST_ROTATED = 256

Tensor = tuple[str, str, tuple[int, ...]]
"""Name, dtype as safetensors spells it, shape."""


def kept_blocks(count: int) -> tuple[int, ...]:
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


def stored(linear: str, codes: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The weight of ``linear`` in ``codes``, then its scales."""
    yield f"{linear}.weight", codes, shape
    for part in SCALES[codes]:
        yield f"{linear}.{part}", "F32", (shape[0], 1) if codes == I8 else ()


def linears_by_block(shapes: Mapping[str, tuple[int, ...]]) -> dict[int, list[str]]:
    """Block of a transformer -> its linears, without ``.weight``."""
    blocks: dict[int, list[str]] = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and (found := _IN_BLOCK.match(name)):
            blocks.setdefault(int(found[1]), []).append(name.removesuffix(".weight"))
    return blocks


def with_codes(tensors: Iterable[Tensor], codes: str) -> Iterator[Tensor]:
    """The transformer's ``tensors``, with ``codes`` for the linears of all blocks but the usual bf16 ones."""
    tensors = list(tensors)
    blocks = linears_by_block({name: shape for name, _, shape in tensors})
    kept = kept_blocks(max(blocks, default=-1) + 1)
    coded = {linear for block, linears in blocks.items() if block not in kept for linear in linears}
    for name, dtype, shape in tensors:
        linear = name.removesuffix(".weight")
        yield from stored(linear, codes, shape) if linear in coded else [(name, dtype, shape)]
