"""The form of a file of weights, by its header: the storage of its linears, its parts, the prefix of its names.

The one place that tells bf16, fp8, int8 and other quantised files apart (spec 09, sections 1, 2 and 7). Knows no
programs that read a form.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

from ltxpack.errors import FormatError, UnsupportedError
from ltxpack.files.tensorfile import DTYPE_BITS, TensorFile, TensorInfo, parse_json
from ltxpack.ltx23.renames import CHECKPOINT_TABLES, TRANSFORMER, component_of

(ROOT,) = TRANSFORMER.roots
# Prefixes of a transformer's names: the official one, that of ComfyUI's split files, or none.
ROOTS = (ROOT, ROOT.removeprefix("model."), "")
ALL, TRANSFORMER_ALONE, CODECS, TEXT, SOME = "all", "transformer", "codecs", "text", "some"
PARTS_TOLD = {
    ALL: "a whole checkpoint",
    TRANSFORMER_ALONE: "the transformer alone",
    CODECS: "codecs alone",
    TEXT: "text connectors alone",
    SOME: "some parts of a checkpoint",
}
# The parts that an export may hold; the transformer comes with the connectors.
PARTS = (ALL, TRANSFORMER_ALONE)
# Prefixes in a file of one codec with bare names, as ComfyUI's tools split it off.
BARE_CODEC_MARK = "per_channel_statistics"
CODEC_COMPONENTS = frozenset({"vae", "audio_vae", "vocoder"})

# The key under which a bake's shards state their form.
OUR_FORMAT = "ltxpack_format"
# The key under which an export states its sources.
MADE_FROM = "ltxpack"
QUANTISATION = "_quantization_metadata"
WEIGHT, WEIGHT_SCALE, INPUT_SCALE, MARKER = "weight", "weight_scale", "input_scale", "comfy_quant"
MAX_MARKER_BYTES, MAX_LINEARS = 1024, 4096
FP8_FORMAT, INT8_FORMAT = "float8_e4m3fn", "int8_tensorwise"
# A marker's name of a format -> the dtype of the codes.
FORMAT_DTYPES = {FP8_FORMAT: "F8_E4M3", f"rowwise-{FP8_FORMAT}": "F8_E4M3", "float8_e5m2": "F8_E5M2", INT8_FORMAT: "I8"}

PLAIN = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}
CAST, SCALED, ROWS, ROTATED, INT8, OTHER = "fp8-cast", "fp8-scaled", "fp8-rows", "int8-rotated", "int8", "other"
# Form -> words for it in a sentence.
TOLD = {
    **{form: form for form in PLAIN.values()},
    CAST: "fp8, cast without scales",
    SCALED: "scaled fp8",
    ROWS: "fp8 with a scale for each row",
    "fp8-legacy": "fp8 with scale_weight, ComfyUI's earlier form",
    "fp8-blocks": "fp8 with scales for blocks",
    ROTATED: "rotated int8",
    INT8: "int8",
    "nvfp4": "nvfp4, 4 bits",
    "mxfp8": "mxfp8",
    "nf4": "nf4 or fp4, 4 bits of bitsandbytes",
    "bnb-int8": "int8 of bitsandbytes",
    "gptq": "GPTQ or AWQ, 4 or 8 bits",
    OTHER: "numbers of a form that is not known here",
}
# The last part of a tensor's name -> the only form with such tensors. The first match counts.
MARKS = {
    "qweight": "gptq", "qzeros": "gptq", "quant_map": "nf4", "absmax": "nf4", "SCB": "bnb-int8",
    "weight_scale_2": "nvfp4", "weight_scale_inv": "fp8-blocks", "scaled_fp8": "fp8-legacy",
    "scale_weight": "fp8-legacy",
}  # fmt: skip

ReadTensor = Callable[[TensorInfo], bytes]


@dataclass(frozen=True)
class Linears:
    """The quantised linears of a file, by their names in the file without ``.weight``.

    ``codes``: weights of at most 8 bits a number; ``scales``: ending -> linear -> tensor; ``markers``: the comfy_quant
    tensors. ``layers``: the statements of the metadata, by their own keys, None if unreadable; ``described``: the
    statements of these or of a marker, by linear.
    """

    form: str
    codes: Mapping[str, TensorInfo]
    scales: Mapping[str, Mapping[str, TensorInfo]]
    layers: Mapping[str, Mapping[str, Any]] | None
    markers: Mapping[str, TensorInfo]
    described: Mapping[str, Mapping[str, Any]]

    @property
    def quantised(self) -> bool:
        return bool(self.codes or any(self.scales.values()) or self.form in MARKS.values())


def read_linears(file: TensorFile, read: ReadTensor | None = None) -> Linears:
    """The storage of ``file``'s linears. Without ``read`` the content of comfy_quant tensors stays unknown."""
    found: dict[str, dict[str, TensorInfo]] = {ending: {} for ending in (WEIGHT, WEIGHT_SCALE, INPUT_SCALE, MARKER)}
    for name, info in file.tensors.items():
        linear, _, ending = name.rpartition(".")
        if ending in found and linear and (ending != WEIGHT or DTYPE_BITS[info.dtype] <= 8):
            found[ending][linear] = info
    codes, markers = found.pop(WEIGHT), found.pop(MARKER)
    layers = _layers(file)
    described = {linear: _marker(info, read) for linear, info in markers.items()} if read and few(markers) else {}
    for key, layer in (layers or {}).items():
        described[spelled(key, codes) or key] = layer
    form = _form(file, codes, found, described or markers or layers)
    return Linears(form, codes, found, layers, markers, described)


def refuse_quantised(file: TensorFile, label: object, purpose: str, next: str) -> None:
    """Raises UnsupportedError for codes; ``purpose``, as in "overlays are made from", needs bf16 weights."""
    linears = read_linears(file)
    if linears.quantised:
        scales = [info.name for scales in linears.scales.values() for info in scales.values()]
        codes = [info.name for info in linears.codes.values()]
        marked = [name for name in file.tensors if name.rpartition(".")[2] in MARKS]
        counts = ((len(codes), "weights in codes"), (len(scales), "scales"), (len(marked), "tensors of that form"))
        raise UnsupportedError(
            f"is quantised ({TOLD[linears.form]}); {purpose} bf16 weights",
            file=str(label), tensor=(scales + codes + marked)[0], expected="BF16 weights",
            found=", ".join(f"{count} {what}" for count, what in counts if count), next=next,
        )  # fmt: skip


def few(linears: Sized) -> bool:
    """Whether a model may have so many: nothing is read from a hostile file."""
    return len(linears) <= MAX_LINEARS


def spelled(key: str, linears: Iterable[str]) -> str | None:
    """The spelling of ``key`` among ``linears``, whatever root either has; None if it is none of them."""
    bare = key.removeprefix(ROOTS[0]).removeprefix(ROOTS[1])
    return next((root + bare for root in ROOTS if root + bare in linears), None)


def spelled_root(names: Iterable[str]) -> str | None:
    """The prefix of a transformer's names, one of ROOTS; None without a transformer with official names."""
    names = list(names)
    root = next((root for root in ROOTS if any(name.startswith(f"{root}transformer_blocks.") for name in names)), None)
    # A bare name may also be diffusers'.
    return root if root != "" or any(part in TRANSFORMER.paths for name in names for part in name.split(".")) else None


def official(name: str, root: str | None) -> str:
    """``name`` with the official root in place of ``root``; names of other parts stay."""
    own = component_of(name) is None and root is not None and name.startswith(root)
    return ROOT + name.removeprefix(root or "") if own else name


def _parts_of(names: Collection[str]) -> str | None:
    """The parts of a checkpoint that the official ``names`` belong to, in a word; None if they belong to none."""
    if BARE_CODEC_MARK in {name.rpartition(".")[0] for name in names}:
        return CODECS
    found = {component for name in names if (component := component_of(name))}
    if not found or found == CHECKPOINT_TABLES.keys():
        return ALL if found else None
    if "transformer" in found:
        return TRANSFORMER_ALONE if found <= {"transformer", "connectors"} else SOME
    return CODECS if found <= CODEC_COMPONENTS else TEXT if found == {"connectors"} else SOME


def root_and_parts(file: TensorFile) -> tuple[str | None, str | None]:
    """The prefix of the transformer's names in ``file``, and the parts of a checkpoint in it."""
    root = spelled_root(file.tensors)
    return root, _parts_of([official(name, root) for name in file.tensors])


def _form(
    file: TensorFile,
    codes: Mapping[str, TensorInfo],
    scales: Mapping[str, Mapping[str, TensorInfo]],
    marked: Mapping[str, Any] | None,
) -> str:
    endings = {name.rpartition(".")[2] for name in file.tensors}
    mark = next((form for ending, form in MARKS.items() if ending in endings), None)
    if mark is not None:
        return mark
    dtypes = {info.dtype for info in codes.values()}
    if not dtypes and not any(scales.values()):
        return _plain(file)
    if dtypes == {"I8"} and file.metadata.get(OUR_FORMAT) == "int8":
        return ROTATED
    if dtypes == {"I8"}:
        # Without ``read``, an unread comfy_quant tensor may say that the weights are rotated.
        told = marked.values() if marked else ()
        return ROTATED if any(isinstance(one, Mapping) and one.get("convrot") is True for one in told) else INT8
    return _fp8(scales, bool(marked)) if dtypes <= {"F8_E4M3", "F8_E5M2"} else OTHER


def _fp8(scales: Mapping[str, Mapping[str, TensorInfo]], marked: bool) -> str:
    weight_scales = scales[WEIGHT_SCALE].values()
    if any(info.dtype in ("U8", "F8_E8M0") for info in weight_scales):
        return "mxfp8"
    if any(math.prod(info.shape) > 1 for info in weight_scales):
        return ROWS
    return SCALED if any(scales.values()) or marked else CAST


def _plain(file: TensorFile) -> str:
    """The float dtype of most numbers."""
    numbers: Counter[str] = Counter()
    for info in file.tensors.values():
        numbers[info.dtype] += math.prod(info.shape)
    return PLAIN.get(max(numbers, key=lambda dtype: numbers[dtype]) if numbers else "BF16", OTHER)


def _layers(file: TensorFile) -> Mapping[str, Mapping[str, Any]] | None:
    """``layers`` of the metadata's marker; {} without a marker, None for an unreadable one."""
    text = file.metadata.get(QUANTISATION)
    if text is None:
        return {}
    try:
        document = parse_json(text, file.path)
    except FormatError:
        return None
    layers = document.get("layers") if isinstance(document, dict) else None
    sound = isinstance(layers, dict) and all(isinstance(layer, dict) for layer in layers.values())
    return layers if sound else None


def _marker(info: TensorInfo, read: ReadTensor) -> Mapping[str, Any]:
    """The content of a comfy_quant tensor; {} if it is not the expected JSON."""
    if info.nbytes > MAX_MARKER_BYTES:
        return {}
    try:
        document = parse_json(read(info).rstrip(b"\0"), info.name)
    except FormatError:
        return {}
    return document if isinstance(document, dict) else {}
