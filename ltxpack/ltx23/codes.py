"""Weights stored as codes: which dtypes they have, and the tensors that belong to them (spec 09, sections 5 and 7)."""

from __future__ import annotations

from collections.abc import Mapping

FP8, INT8 = "F8_E4M3", "I8"
# The dtype of a linear's ``weight`` in codes -> the float32 scales beside it.
SCALES = {FP8: ("weight_scale", "input_scale"), INT8: ("weight_scale",)}


def coded_linears(dtypes: Mapping[str, str]) -> dict[str, str]:
    """The linears (without ``.weight``) stored as codes, and the dtype of these; ``dtypes`` is of all tensors."""
    weights = ((name, dtype) for name, dtype in dtypes.items() if name.endswith(".weight"))
    return {name.removesuffix(".weight"): dtype for name, dtype in weights if dtype in SCALES}


def never_cast(dtypes: Mapping[str, str]) -> frozenset[str]:
    """The codes and scales among these tensors: they are loaded as they are stored, whatever the model's dtype is."""
    parts = (f"{name}.{part}" for name, codes in coded_linears(dtypes).items() for part in ("weight", *SCALES[codes]))
    return frozenset(parts) & dtypes.keys()
