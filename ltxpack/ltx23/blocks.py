"""The block lists of the video VAE's config: alternating residual and resampling blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ltxpack.ltx23.fields import ABSENT, MAX_REPEATS, Check, UnfitError, same, shown, whole

RESAMPLINGS = 4

# Parameters of a resampling block besides ``multiplier``, each with the only value LTX-2.3 has.
_FIXED_PARAMETERS: Mapping[str, Any] = {"residual": False, "inject_noise": False}


@dataclass(frozen=True)
class Blocks:
    """``layers`` (one more than resamplings), ``kinds`` and ``multipliers`` of the resamplings; in listed order."""

    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    multipliers: tuple[int, ...]


def block_list(kinds: Mapping[str, str]) -> Check:
    """Check for ``[["res_x", {"num_layers": n}], [<a name in kinds>, {"multiplier": m}], …, ["res_x", …]]``."""

    def check(found: Any) -> Blocks:
        count = 2 * RESAMPLINGS + 1
        if not isinstance(found, list) or len(found) != count:
            raise UnfitError(f"a list of {count} blocks", found)
        names, values = [], []
        for position, block in enumerate(found):
            where = f"[{position}]"
            if not (isinstance(block, list) and len(block) == 2 and isinstance(block[1], dict)):
                raise UnfitError("a block: [name, {parameters}]", block, where)
            name, parameters = block
            wanted = ["res_x"] if position % 2 == 0 else sorted(kinds)
            if name not in wanted:
                raise UnfitError(" or ".join(wanted), name, where)
            names.append(kinds.get(name, name))
            values.append(_only_number(parameters, "multiplier" if position % 2 else "num_layers", where))
        return Blocks(tuple(values[::2]), tuple(names[1::2]), tuple(values[1::2]))

    return check


def _only_number(parameters: Mapping[str, Any], wanted: str, where: str) -> int:
    """The parameter ``wanted``; any other must have its fixed value."""
    for name, value in parameters.items():
        if name == wanted or (name in _FIXED_PARAMETERS and same(value, _FIXED_PARAMETERS[name])):
            continue
        expected = shown(_FIXED_PARAMETERS[name]) if name in _FIXED_PARAMETERS else "no such parameter"
        raise UnfitError(expected, value, f"{where}.{name}")
    if wanted not in parameters:
        raise UnfitError("a whole number", ABSENT, f"{where}.{wanted}")
    try:
        return int(whole(0 if wanted == "num_layers" else 1, MAX_REPEATS)(parameters[wanted]))
    except UnfitError as unfit:
        raise UnfitError(unfit.expected, unfit.found, f"{where}.{wanted}") from None
