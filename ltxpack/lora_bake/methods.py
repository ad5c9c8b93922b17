"""How each method of an adapter changes a weight: the shapes its tensors must have, and what they become for a sum.

Sources are the papers of docs/adapters.md; ``peft`` and ``lycoris-lora`` are the oracles of the tests. The shapes need
no torch. Nothing here opens a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ltxpack.lora_bake.adapter import LoraTarget
    from ltxpack.lora_bake.fuse import Term, Workspace

Shape = tuple[int, ...]
Sizes = Mapping[str, Shape]
Tensors = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Formula:
    """One method's part of the table.

    ``shapes``: (shapes of the method's tensors by role, shape [out, in] of the weight) -> the shapes they must have.
    Raises ValueError saying why the weight cannot have such tensors. ``operands``: (tensors by role, the target,
    memory) -> fields of a :class:`.fuse.Term`. ``rows``: the roles with a row for each row of the weight, which are
    cut where the weight is a part of a fused projection; None if a part cannot be had so. ``pairs``: factors of one
    product.
    """

    shapes: Callable[[Sizes, Shape], dict[str, Shape]]
    operands: Callable[[Tensors, LoraTarget, Workspace], dict[str, Any]]
    rows: frozenset[str] | None = None
    pairs: tuple[tuple[str, str], ...] = ()


def term_of(target: LoraTarget, tensors: Tensors, work: Workspace) -> Term:
    """What ``target`` adds to its weight. ``tensors`` are as stored; what is made of them lies in ``work``."""
    from ltxpack.lora_bake.fuse import Term

    operands: dict[str, Any] = {}
    for method in target.methods:
        made = FORMULAS[method].operands(tensors, target, work)
        if "delta" in operands and "delta" in made:
            made["delta"] = operands["delta"] + made["delta"]
        operands |= made
    if "magnitude" in tensors:
        operands |= {"magnitude": tensors["magnitude"], "over_inputs": needs_whole(target)}
    return Term(target.factor, **operands)


def needs_whole(target: LoraTarget) -> bool:
    """Whether :attr:`.fuse.Term.needs_whole` will hold of its term."""
    magnitude = target.tensors.get("magnitude")
    return magnitude is not None and len(magnitude.shape) == 2 and magnitude.shape[0] == 1


def _lora_shapes(found: Sizes, weight: Shape) -> dict[str, Shape]:
    rank = found["down"][0]
    return {"down": (rank, weight[1]), "up": (weight[0], rank)}


def _lora(tensors: Tensors, target: LoraTarget, work: Workspace) -> dict[str, Any]:
    if "up_b" in tensors:
        return {"delta": tensors["up_b"].float()}
    return {role: tensors[role] for role in ("down", "up")}


def _loha_shapes(found: Sizes, weight: Shape) -> dict[str, Shape]:
    wanted: dict[str, Shape] = {}
    for pair in ("1", "2"):
        rank = found[f"hada_w{pair}_b"][0]
        core = f"hada_t{pair}"
        wanted[f"hada_w{pair}_b"] = (rank, weight[1])
        wanted[f"hada_w{pair}_a"] = (rank, weight[0]) if core in found else (weight[0], rank)
        wanted |= {core: (rank, rank)} if core in found else {}
    return wanted


def _loha(tensors: Tensors, target: LoraTarget, work: Workspace) -> dict[str, Any]:
    import torch

    first, second = (
        (_outer(tensors, f"hada_w{pair}", f"hada_t{pair}"), tensors[f"hada_w{pair}_b"].float()) for pair in "12"
    )
    shape = (len(first[0]), first[1].shape[1])
    delta = work.empty("delta", shape, torch.float32, first[0].device)
    other = work.empty("other product", shape, torch.float32, first[0].device)
    return {"delta": torch.mm(*first, out=delta).mul_(torch.mm(*second, out=other))}


def _outer(tensors: Tensors, matrix: str, core: str) -> Tensor:
    """The left factor [out, rank] of a matrix; with a Tucker core aᵀ·t, where a is [rank, out]."""
    left = tensors[f"{matrix}_a"].float()
    return left.T @ tensors[core].float() if core in tensors else left


def _lokr_shapes(found: Sizes, weight: Shape) -> dict[str, Shape]:
    rows, columns = found["lokr_w1"] if "lokr_w1" in found else (found["lokr_w1_a"][0], found["lokr_w1_b"][-1])
    if 0 in (rows, columns) or weight[0] % rows or weight[1] % columns:
        raise ValueError(f"w1 [{rows}, {columns}] does not divide {list(weight)}")
    wanted: dict[str, Shape] = {}
    for matrix, (high, wide) in (("1", (rows, columns)), ("2", (weight[0] // rows, weight[1] // columns))):
        name, core = f"lokr_w{matrix}", f"lokr_t{matrix}"
        if name in found:
            wanted[name] = (high, wide)
            continue
        rank = found[f"{name}_b"][0]
        wanted |= {f"{name}_a": (rank, high) if core in found else (high, rank), f"{name}_b": (rank, wide)}
        wanted |= {core: (rank, rank)} if core in found else {}
    return wanted


def _lokr(tensors: Tensors, target: LoraTarget, work: Workspace) -> dict[str, Any]:
    import torch

    first, second = (
        tensors[name].float() if name in tensors else _outer(tensors, name, core) @ tensors[f"{name}_b"].float()
        for name, core in (("lokr_w1", ""), ("lokr_w2", "lokr_t2"))
    )
    shape = (first.shape[0] * second.shape[0], first.shape[1] * second.shape[1])
    delta = work.empty("delta", shape, torch.float32, first.device)
    return {"delta": torch.kron(first, second, out=delta)}


def _same_shape(*roles: str) -> Callable[[Sizes, Shape], dict[str, Shape]]:
    return lambda found, weight: {role: weight for role in roles if role in found}


def _operand(**fields: str) -> Callable[[Tensors, LoraTarget, Workspace], dict[str, Any]]:
    """role -> the field that its tensor is."""
    return lambda tensors, target, work: {field: tensors[role] for role, field in fields.items() if role in tensors}


FORMULAS: Mapping[str, Formula] = {
    "lora": Formula(_lora_shapes, _lora, frozenset({"up", "up_b"}), (("up", "down"),)),
    "loha": Formula(_loha_shapes, _loha, frozenset({"hada_w1_a", "hada_w2_a"})),
    "lokr": Formula(_lokr_shapes, _lokr),
    "diff": Formula(_same_shape("diff"), _operand(diff="diff", diff_b="diff"), frozenset({"diff", "diff_b"})),
    "weight": Formula(_same_shape("weight"), _operand(weight="new", bias="new"), frozenset({"weight", "bias"})),
}
