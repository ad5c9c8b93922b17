"""The programs that take a file of weights, and the faults of the file: two tables, from spec 09, section 2.

A cell is a verdict and, after a colon, the reason: ``yes``, ``no`` (refuses or fails), ``wrong`` (computes nonsense) or
``unknown`` (not tried).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ltxpack.files.tensorfile import TensorFile, TensorInfo
from ltxpack.ltx23 import forms

BUILDER, SCALED_MM, FP8_CAST = (f"official code, {how}" for how in ("bf16", "fp8-scaled-mm", "fp8-cast"))
LOADER, UNET, SGLANG, DIFFUSERS = "ComfyUI CheckpointLoaderSimple", "ComfyUI UNETLoader", "sglang", "diffusers"
OFFICIAL, COMFYUI = (BUILDER, SCALED_MM, FP8_CAST), (LOADER, UNET)
PROGRAMS = (*OFFICIAL, *COMFYUI, SGLANG, DIFFUSERS)
# Program that reads one part of a file of any form -> the prefix of the names it reads, and whether it reads `config`.
PART_LOADERS = {
    "ComfyUI LTXVAudioVAELoader": (("audio_vae.", "vocoder."), True),
    "ComfyUI LTXAVTextEncoderLoader": (("text_embedding_projection.",), False),
}
# From bad to good: the worst of several verdicts counts.
VERDICTS = ("no", "wrong", "unknown", "yes")
UNTRIED = "unknown: not tried"

Cells = Mapping[str, str]


def _cells(cell: str, *programs: str) -> dict[str, str]:
    return dict.fromkeys(programs, cell)


_FOLDERS_ONLY = "no: from_single_file loads no LTX-2.3 file; the folder that ltxpack materialize writes does load"
_NO_LTX = "no: its reader of quantised files is not wired to LTX-2.3"
_NO_OFFICIAL = _cells("no: reads neither int8 nor a rotation", SCALED_MM, FP8_CAST)
_FAILS = "no: loads it silently, fails in the first matmul"
# Form -> program -> cell. A form that is not here has not been tried.
BY_FORM: Mapping[str, Cells] = {
    "bf16": _cells("yes", BUILDER, *COMFYUI)
    | {SCALED_MM: "no: refuses it, names fp8-cast", FP8_CAST: "yes: casts the linears of all blocks, without scales"},
    forms.SCALED: _cells("yes: activations by input_scale", SCALED_MM, *COMFYUI)
    | {BUILDER: _FAILS, FP8_CAST: "yes: folds the scales into bf16 and casts again; values below 2^-6 lose bits"},
    forms.ROWS: _cells("no: raises in the first matmul", *COMFYUI)
    | {BUILDER: _FAILS, SCALED_MM: "no: the sizes of the scales differ", FP8_CAST: "no: takes one scale a tensor"},
    forms.CAST: _cells("yes: the codes are the values", *COMFYUI)
    | {SCALED_MM: "no: warns of uninitialized parameters, cannot be used"},
    forms.ROTATED: _cells("yes", *COMFYUI) | _NO_OFFICIAL | {BUILDER: "no: refuses it"},
}
_NO_TRANSFORMER = _cells("no: there is no transformer in it", *OFFICIAL, *COMFYUI)
# Part of a checkpoint -> the cells that it changes.
BY_PART: Mapping[str, Cells] = {
    forms.ALL: {},
    forms.TRANSFORMER_ALONE: _cells("yes: with --transformer-path", *OFFICIAL),
    forms.SOME: _cells("unknown: parts are missing", *OFFICIAL, LOADER),
    forms.CODECS: _NO_TRANSFORMER,
    forms.TEXT: _NO_TRANSFORMER,
}


@dataclass(frozen=True)
class Look:
    """A file to search for faults. ``root``: the prefix of the transformer's names."""

    file: TensorFile
    linears: forms.Linears
    root: str | None
    parts: str
    input_scales: Mapping[str, float] = field(default_factory=dict)

    @property
    def scaled(self) -> bool:
        """Whether its codes are meaningless without scales and a marker."""
        return self.linears.form in (forms.SCALED, forms.ROWS, forms.ROTATED)


Names = Iterable[str]


@dataclass(frozen=True)
class FileFault:
    """One possible fault. ``find`` names the places; ``effect``: the cells that the fault causes."""

    name: str
    find: Callable[[Look], Names]
    effect: Cells = field(default_factory=dict)


def judge(look: Look) -> tuple[dict[str, list[str]], dict[str, str]]:
    """``{fault: places}`` of the faults found, and ``{program: cell}`` with the worst of form, parts and faults."""
    found = {fault.name: sorted(fault.find(look)) for fault in FAULTS}
    rest = {DIFFUSERS: _FOLDERS_ONLY} | ({SGLANG: _NO_LTX} if look.linears.quantised else {})
    rules: list[Cells] = [{**BY_FORM.get(look.linears.form, {}), **rest}, BY_PART[look.parts]]
    rules += [fault.effect for fault in FAULTS if found[fault.name]]
    takes = {program: _worst([cells.get(program, "") for cells in rules]) for program in PROGRAMS}
    takes |= {program: _part_cell(look.file, *needs) for program, needs in PART_LOADERS.items()}
    return {name: where for name, where in found.items() if where}, takes


def _part_cell(file: TensorFile, roots: tuple[str, ...], config: bool) -> str:
    missing = [root for root in roots if not any(name.startswith(root) for name in file.tensors)]
    missing += ["`config`"] * (config and not file.metadata.get("config"))
    return f"no: lacks {', '.join(missing)}" if missing else "yes"


def _worst(cells: list[str]) -> str:
    """The worst verdict, with all its reasons."""
    parted = [cell.partition(": ") for cell in (cells[0] or UNTRIED, *cells[1:]) if cell]
    worst = min((verdict for verdict, _, _ in parted), key=VERDICTS.index)
    reasons = dict.fromkeys(why for verdict, _, why in parted if verdict == worst and why)
    return ": ".join([worst, *(["; ".join(reasons)] if reasons else [])])


def _without(ending: str) -> Callable[[Look], Names]:
    def find(look: Look) -> Names:
        wanted = look.scaled and (ending == forms.WEIGHT_SCALE or look.linears.form != forms.ROTATED)
        return look.linears.codes.keys() - look.linears.scales[ending].keys() if wanted else ()

    return find


def _scales(look: Look) -> Iterator[tuple[str, str, TensorInfo, tuple[int, ...]]]:
    """Linear, ending, scale, and the shape of the codes, of every scale that has codes."""
    codes = look.linears.codes
    for ending, scales in look.linears.scales.items() if look.scaled else ():
        yield from ((one, ending, info, codes[one].shape) for one, info in scales.items() if one in codes)


def _row_scales(look: Look) -> Names:
    return [one for one, _, info, _ in _scales(look) if math.prod(info.shape) > 1 and look.linears.form == forms.ROWS]


def _odd_scales(look: Look) -> Names:
    """Linears with a scale that is not F32, or of a shape that no form has."""
    for one, ending, info, shape in _scales(look):
        rows = shape[0] if shape else 0
        shapes: tuple[tuple[int, ...], ...] = ((), (1,), (rows,), (rows, 1))
        if look.linears.form == forms.ROTATED:
            shapes = shapes[3:]
        elif ending == forms.INPUT_SCALE:
            shapes = shapes[:2]
        if info.dtype != "F32" or info.shape not in shapes:
            yield one


def _scales_without_codes(look: Look) -> Names:
    scales = look.linears.scales
    return (scales[forms.WEIGHT_SCALE].keys() | scales[forms.INPUT_SCALE].keys()) - look.linears.codes.keys()


def _unmarked(look: Look) -> Names:
    """Linears that neither the metadata, under any root, nor a comfy_quant tensor marks."""
    linears = look.linears
    return linears.codes.keys() - linears.described.keys() - linears.markers.keys() if look.scaled else ()


def _unreadable(look: Look) -> Names:
    return (forms.QUANTISATION,) if look.linears.layers is None else ()


def _other_root(look: Look) -> Names:
    """Keys of the metadata that differ from a linear's name only in the root."""
    codes = look.linears.codes
    return [key for key in look.linears.layers or () if key not in codes and forms.spelled(key, codes)]


def _without_codes(look: Look) -> Names:
    return [key for key in look.linears.layers or () if forms.spelled(key, look.linears.codes) is None]


def _impossible_codes(look: Look) -> Names:
    """Linears that are no matrix, or whose codes differ from the marker."""
    for linear, info in look.linears.codes.items() if look.scaled else ():
        layer = look.linears.described.get(linear, {})
        name, group = layer.get("format"), layer.get("convrot_groupsize", 1)
        other = isinstance(name, str) and forms.FORMAT_DTYPES.get(name, info.dtype) != info.dtype
        whole = type(group) is int and group > 0
        if other or not whole or len(info.shape) != 2 or 0 in info.shape or info.shape[1] % group:
            yield linear


def _begin_with(root: str) -> Callable[[Look], Names]:
    """Finds the transformer's names if they begin with ``root``; the other parts keep their names."""
    return lambda look: (
        [name for name in look.file.tensors if forms.official(name, root) != name] if look.root == root else ()
    )


def _lacks(*keys: str) -> Callable[[Look], Names]:
    return lambda look: () if any(look.file.metadata.get(key) for key in keys) else keys[:1]


def _number(look: Look) -> Names:
    """A model_version that is a number: the official reader parses metadata as JSON, where 2.3 is one and 2.3.0 not."""
    text = look.file.metadata.get("model_version", "").strip()
    return ("model_version",) if text.replace(".", "", 1).isdecimal() else ()


_ODD = _cells("unknown: the file contradicts itself", *OFFICIAL, *COMFYUI)
_UNSET = "no: warns of uninitialized parameters, cannot be used"
_NOISE = "wrong: takes the codes for weights: noise"
_DROPS = _cells(f"no: silently drops every tensor without {forms.ROOT}", *OFFICIAL)
FAULTS = (
    FileFault(
        "no input_scale",
        _without(forms.INPUT_SCALE),
        {SCALED_MM: _UNSET} | _cells("yes: linears without input_scale silently run at 1.0", *COMFYUI),
    ),
    FileFault(
        "no weight_scale", _without(forms.WEIGHT_SCALE), {SCALED_MM: _UNSET} | _cells(_NOISE, FP8_CAST, *COMFYUI)
    ),
    FileFault("a scale for each row", _row_scales),
    FileFault(
        "scales of shape [1]",
        lambda look: {one for one, _, info, _ in _scales(look) if info.shape == (1,)},
        {FP8_CAST: "no: takes scalars only"},
    ),
    FileFault("scales that no loader reads", lambda look: set(_odd_scales(look)), _ODD),
    FileFault(
        "input_scale is no positive number",
        lambda look: [one for one, value in look.input_scales.items() if not 0 < value < math.inf],
        _cells("wrong: divides by it", SCALED_MM, *COMFYUI),
    ),
    FileFault("scales without codes", _scales_without_codes),
    FileFault("codes that cannot be right", _impossible_codes, _ODD),
    FileFault(f"neither in {forms.QUANTISATION} nor marked by {forms.MARKER}", _unmarked, _cells(_NOISE, *COMFYUI)),
    FileFault(f"{forms.QUANTISATION} that cannot be read", _unreadable),
    FileFault(f"keys of {forms.QUANTISATION} that begin otherwise than the tensors", _other_root, {LOADER: _NOISE}),
    FileFault(f"layers of {forms.QUANTISATION} without codes", _without_codes),
    FileFault("bare names", _begin_with(""), _DROPS | {LOADER: UNTRIED}),
    FileFault(
        f"names that begin with {forms.ROOTS[1]}", _begin_with(forms.ROOTS[1]), _DROPS | _cells(UNTRIED, *COMFYUI)
    ),
    FileFault("no config in the metadata", _lacks("config"), {LOADER: "no: needs `config`"}),
    FileFault("no model_version in the metadata", _lacks("model_version")),
    FileFault("model_version that is a number", _number, _cells("no: its check of model_version fails", *OFFICIAL)),
    FileFault("no licence in the metadata", _lacks("license", "licence")),
)
