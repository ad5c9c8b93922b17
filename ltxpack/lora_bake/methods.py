"""The methods of adapters: the shapes of their tensors, and the operands of a sum.

Sources are the papers of docs/adapters.md; ``peft`` and ``lycoris-lora`` are the oracles of the tests. The shapes need
no torch. Nothing here opens a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ltxpack.lora_bake.adapter import LoraTarget
    from ltxpack.lora_bake.fuse import Term

Shape = tuple[int, ...]
Sizes = Mapping[str, Shape]
Tensors = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Formula:
    """One method's entry in the table.

    ``shapes``: (shapes of the module's tensors by role, shape [out, in] of the weight) -> the required shapes. Raises
    ValueError saying why the weight cannot have such tensors. ``operands``: (tensors by role, the target) -> fields of
    a :class:`.fuse.Term`. ``rows``: the roles with a row for each row of the weight, which are cut for a part of a
    fused projection; None if the method cannot be cut.
    """

    shapes: Callable[[Sizes, Shape], dict[str, Shape]]
    operands: Callable[[Tensors, LoraTarget], dict[str, Any]]
    rows: frozenset[str] | None = None


def term_of(target: LoraTarget, tensors: Tensors) -> Term:
    """The term of ``target`` for its weight, from the stored ``tensors``."""
    from ltxpack.lora_bake.fuse import Term

    operands: dict[str, Any] = {}
    for method in target.methods:
        operands |= FORMULAS[method].operands(tensors, target)
    if "magnitude" in tensors:
        operands["magnitude"] = tensors["magnitude"]
        operands |= {"over_inputs": target.needs_whole, "over_base": target.over_base}
    return Term(target.factor, needs_whole=target.needs_whole, **operands)


def _lora_shapes(found: Sizes, weight: Shape) -> dict[str, Shape]:
    rank = found["down"][0]
    return {"down": (rank, weight[1]), "up": (weight[0], rank)}


def _lora(tensors: Tensors, target: LoraTarget) -> dict[str, Any]:
    if "up_b" in tensors:
        return {"delta": tensors["up_b"].float()}
    return {role: tensors[role] for role in ("down", "up")}


def _factored(found: Sizes, matrix: str, core: str, shape: Shape) -> dict[str, Shape]:
    """The shapes of a whole matrix, or of its factors a [out, rank] and b; with a Tucker core a is [rank, out]."""
    if matrix in found:
        return {matrix: shape}
    rank = found[f"{matrix}_b"][0]
    if core not in found:
        return {f"{matrix}_a": (shape[0], rank), f"{matrix}_b": (rank, shape[1])}
    return {f"{matrix}_a": (rank, shape[0]), f"{matrix}_b": (rank, shape[1]), core: (rank, rank)}


def _matrix(tensors: Tensors, matrix: str, core: str) -> Tensor:
    """A matrix in float32: whole, a·b, or aᵀ·core·b."""
    if matrix in tensors:
        return tensors[matrix].float()
    left, right = (tensors[f"{matrix}_{side}"].float() for side in "ab")
    return left.T @ tensors[core].float() @ right if core in tensors else left @ right


def _loha_shapes(found: Sizes, weight: Shape) -> dict[str, Shape]:
    return _factored(found, "hada_w1", "hada_t1", weight) | _factored(found, "hada_w2", "hada_t2", weight)


def _loha(tensors: Tensors, target: LoraTarget) -> dict[str, Any]:
    return {"delta": _matrix(tensors, "hada_w1", "hada_t1").mul_(_matrix(tensors, "hada_w2", "hada_t2"))}


def _lokr_shapes(found: Sizes, weight: Shape) -> dict[str, Shape]:
    rows, columns = found["lokr_w1"][:2] if "lokr_w1" in found else (found["lokr_w1_a"][0], found["lokr_w1_b"][1])
    if 0 in (rows, columns) or weight[0] % rows or weight[1] % columns:
        raise ValueError(f"w1 [{rows}, {columns}] does not divide {list(weight)}")
    inner = (weight[0] // rows, weight[1] // columns)
    return _factored(found, "lokr_w1", "", (rows, columns)) | _factored(found, "lokr_w2", "lokr_t2", inner)


def _lokr(tensors: Tensors, target: LoraTarget) -> dict[str, Any]:
    import torch

    return {"delta": torch.kron(_matrix(tensors, "lokr_w1", ""), _matrix(tensors, "lokr_w2", "lokr_t2"))}


def _oft_shapes(found: Sizes, weight: Shape) -> dict[str, Shape]:
    role = "oft_blocks" if "oft_blocks" in found else "oft_diag"
    shape = found[role]
    if not shape or not shape[-1] or weight[0] % shape[-1]:
        raise ValueError(f"{role} {list(shape)} cannot turn {weight[0]} outputs")
    stages = shape[:1] if len(shape) == 4 and role == "oft_blocks" else ()
    if stages:
        _check_stages(stages[0], shape[-1], weight[0])
    wanted = {role: (*stages, weight[0] // shape[-1], shape[-1], shape[-1])}
    return wanted | ({"rescale": (weight[0], 1)} if "rescale" in found else {})


def _check_stages(stages: int, size: int, turned: int) -> None:
    """Raises ValueError unless blocks of ``size`` fit this many stages of a butterfly."""
    if not 0 < stages < 32 or size % 2 or turned % (size << stages - 1):
        raise ValueError(f"a butterfly of {stages} stages with blocks of {size} cannot turn {turned}")


def _oft(tensors: Tensors, target: LoraTarget) -> dict[str, Any]:
    """LyCORIS and kohya: (I + Q)/(I - Q) with |Q| <= alpha · outputs, transposed but for BOFT (four dimensions)."""
    import torch

    from ltxpack.lora_bake.fuse import Turn, cayley

    stored = tensors["oft_blocks" if "oft_blocks" in tensors else "oft_diag"].double()
    skew = stored - stored.mT
    bound = (target.alpha or 0.0) * stored.shape[-3] * stored.shape[-1]
    norm = torch.linalg.vector_norm(skew).item()
    blocks = cayley(skew * (bound / (norm + 1e-8)) if 0 < bound < norm else skew)
    if "oft_diag" in tensors and _is_orthogonal(stored):
        blocks = stored
    if blocks.dim() == 4:
        count, size = blocks.shape[1:3]
        # LyCORIS interleaves the two halves of a block, element by element.
        apart = blocks.reshape(-1, count, size // 2, 2, size // 2, 2).permute(0, 1, 3, 2, 5, 4)
        blocks = apart.reshape(blocks.shape)
    else:
        blocks = blocks.mT[None]
    return {"turn": Turn(blocks.float(), over_inputs=False, rescale=tensors.get("rescale"))}


def _is_orthogonal(blocks: Tensor) -> bool:
    """Whether the file stores the rotations themselves, as early LyCORIS did."""
    import torch

    unit = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return bool((blocks @ blocks.mT - unit).abs().max() < 0.1)


def _triangle(count: int) -> int:
    """The size of a matrix with ``count`` elements above its diagonal, rounded down."""
    return (1 + math.isqrt(1 + 8 * count)) // 2


def _peft_oft_shapes(found: Sizes, weight: Shape) -> dict[str, Shape]:
    shape = found["oft_R"]
    size = _triangle(shape[-1])
    if shape[-1] < 1 or size * (size - 1) // 2 != shape[-1] or weight[1] % size:
        raise ValueError(f"oft_R {list(shape)} cannot turn {weight[1]} inputs")
    return {"oft_R": (1 if shape[0] == 1 else weight[1] // size, shape[-1])}


def _peft_oft(tensors: Tensors, target: LoraTarget) -> dict[str, Any]:
    """PEFT: the upper triangle of a skew matrix for each block of inputs, or one for all."""
    import torch

    from ltxpack.lora_bake.fuse import Turn, cayley, cayley_series

    stored = tensors["oft_R"].double()
    size = _triangle(stored.shape[1])
    upper = torch.zeros(len(stored), size, size, dtype=stored.dtype, device=stored.device)
    upper[:, *torch.triu_indices(size, size, 1)] = stored
    skew = upper - upper.mT
    terms, bound = target.cayley.terms, target.cayley.bound
    if bound is not None:
        norms = torch.linalg.matrix_norm(skew, keepdim=True)
        skew = skew * (bound / math.sqrt(len(skew)) / norms.clamp(min=1e-300)).clamp(max=1)
    blocks = cayley_series(skew, terms) if terms else cayley(-skew)
    return {"turn": Turn(blocks.float()[None], over_inputs=True, of_result=True)}


def _peft_boft_shapes(found: Sizes, weight: Shape) -> dict[str, Shape]:
    shape = found["boft_R"]
    if len(shape) != 4 or not shape[-1] or weight[1] % shape[-1]:
        raise ValueError(f"boft_R {list(shape)} cannot turn {weight[1]} inputs")
    if shape[0] != 1:
        _check_stages(shape[0], shape[-1], weight[1])
    wanted = {"boft_R": (shape[0], weight[1] // shape[-1], shape[-1], shape[-1])}
    return wanted | ({"boft_s": (weight[0], 1)} if "boft_s" in found else {})


def _peft_boft(tensors: Tensors, target: LoraTarget) -> dict[str, Any]:
    from ltxpack.lora_bake.fuse import Turn, cayley

    stored = tensors["boft_R"].double()
    blocks = cayley((stored.mT - stored) / 2).float()
    return {"turn": Turn(blocks, over_inputs=True, rescale=tensors.get("boft_s"), of_result=True)}


def _same_shape(*roles: str) -> Callable[[Sizes, Shape], dict[str, Shape]]:
    return lambda found, weight: {role: weight for role in roles if role in found}


def _operand(**fields: str) -> Callable[[Tensors, LoraTarget], dict[str, Any]]:
    """Operands that are the tensors themselves; ``fields``: role -> field of the term."""
    return lambda tensors, target: {field: tensors[role] for role, field in fields.items() if role in tensors}


FORMULAS: Mapping[str, Formula] = {
    "lora": Formula(_lora_shapes, _lora, frozenset({"up", "up_b"})),
    "loha": Formula(_loha_shapes, _loha, frozenset({"hada_w1_a", "hada_w2_a"})),
    "lokr": Formula(_lokr_shapes, _lokr),
    "oft": Formula(_oft_shapes, _oft),
    "peft-oft": Formula(_peft_oft_shapes, _peft_oft),
    "peft-boft": Formula(_peft_boft_shapes, _peft_boft),
    "diff": Formula(_same_shape("diff"), _operand(diff="diff", diff_b="diff"), frozenset({"diff", "diff_b"})),
    "weight": Formula(_same_shape("weight"), _operand(weight="new", bias="new"), frozenset({"weight", "bias"})),
}
