"""The bytes of each part of the pipeline, in its files and in memory; from headers, or from an inventory.

Knows no machine and no mode. Weights are counted as they are loaded: floats in the run's dtype, codes as they are.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltxpack.errors import OverlayError, quoted
from ltxpack.files.tensorfile import DTYPE_BITS, DTYPE_NAMES, FLOATS, read_json, read_tensorfile
from ltxpack.ltx23.classes import TEXT_ROOT
from ltxpack.ltx23.codes import Tensor, coded_linears, never_cast, with_codes
from ltxpack.ltx23.expected import published_configs, published_tensors
from ltxpack.ltx23.text_encoder import root_of
from ltxpack.runtime.overlay import BASE, Overlay, codes_named, transformer_part
from ltxpack.runtime.weights.activations import Widths

# Tensors in a slot begin at multiples of this, for matrix kernels.
ALIGNMENT = 256
TRANSFORMER, TEXT_ENCODER, VOCODER = "transformer", "text_encoder", "vocoder"
SMALL_PARTS = ("connectors", "vae", "audio_vae", VOCODER, "latent_upsampler")
# Part -> the modules in it that can be streamed one by one.
BLOCKS = {TRANSFORMER: "transformer_blocks", TEXT_ENCODER: "layers"}


@dataclass(frozen=True)
class PartSizes:
    """Bytes of a part: ``stored`` in its files; in memory, of each of its ``blocks`` and of the ``rest``.

    ``codes``: the dtype of the codes of its linears, if some have codes. ``unused``: bytes in the files that are not
    loaded.
    """

    stored: int
    rest: int
    blocks: tuple[int, ...] = ()
    codes: str = ""
    unused: int = 0

    @functools.cached_property
    def total(self) -> int:
        """Bytes in memory."""
        return self.rest + sum(self.blocks)

    def of(self, numbers: Collection[int]) -> int:
        """Bytes of these blocks."""
        return sum(map(self.blocks.__getitem__, numbers))

    def largest(self, numbers: Collection[int]) -> int:
        """Bytes of the largest of these blocks, which a slot must hold."""
        return max(map(self.blocks.__getitem__, numbers), default=0)


@dataclass(frozen=True)
class ModelSizes:
    """An overlay's parts by name, and the widths and the bytes of a number that its activations follow."""

    parts: Mapping[str, PartSizes]
    widths: Widths
    itemsize: int


def model_sizes(overlay: Overlay | None, names: Iterable[str], dtype: str) -> ModelSizes:
    """The sizes of ``overlay`` by its files' headers, or of the published model, with the transformers ``names``.

    A bake that is not there counts as the base in the form that its usual name says. Raises OverlayError, FormatError.
    """
    itemsize, configs = itemsize_of(dtype), read_configs(overlay)

    def part(component: str, name: str = BASE) -> PartSizes:
        if overlay is None:
            return _published_part(component, codes_named(name), itemsize)
        there = name in overlay.manifest.bakes
        records = overlay.records(transformer_part(name) if there else component)
        weights = [record for record in records if record.path.endswith(".safetensors")]
        files = (read_tensorfile(overlay.root / record.path).tensors.values() for record in weights)
        tensors = ((tensor.name, tensor.dtype, tensor.shape) for file in files for tensor in file)
        codes = None if there else codes_named(name)
        if codes is not None:
            return part_of(component, with_codes(tensors, codes), itemsize)
        return part_of(component, tensors, itemsize, sum(record.size for record in weights))

    parts = {name: part(name) for name in (*SMALL_PARTS, TEXT_ENCODER)}
    parts |= {transformer_part(name): part(TRANSFORMER, name) for name in names}
    return ModelSizes(parts, read_widths(configs, Path() if overlay is None else overlay.root), itemsize)


def read_configs(overlay: Overlay | None) -> Mapping[str, Mapping[str, Any]]:
    """The config of each component of ``overlay``, or of the published model. Raises OverlayError, FormatError."""
    if overlay is None:
        return published_configs()
    return {name: read_json(overlay.folder(name) / "config.json") for name in (*SMALL_PARTS, *BLOCKS)}


@functools.cache
def _published_tensors() -> Mapping[str, Collection[Tensor]]:
    return published_tensors(published_configs())


@functools.cache
def _published_part(component: str, codes: str | None, itemsize: int) -> PartSizes:
    tensors = _published_tensors()[component]
    return part_of(component, tensors if codes is None else with_codes(tensors, codes), itemsize)


def part_of(component: str, tensors: Iterable[Tensor], itemsize: int, stored: int | None = None) -> PartSizes:
    """The part that holds ``tensors``; ``stored`` defaults to their own bytes."""
    pattern = re.compile(re.escape(BLOCKS[component]) + r"\.(\d+)\.") if component in BLOCKS else None
    in_files = unused = rest = 0
    blocks: dict[int, int] = {}
    tensors = tuple(tensors)
    dtypes = {name: dtype for name, dtype, _ in tensors}
    root = root_of(dtypes) or TEXT_ROOT if component == TEXT_ENCODER else ""
    kept = never_cast(dtypes)
    for full_name, dtype, shape in tensors:
        count = math.prod(shape)
        in_files += count * DTYPE_BITS[dtype] // 8
        if not full_name.startswith(root):
            unused += count * DTYPE_BITS[dtype] // 8
            continue
        name = full_name.removeprefix(root)
        # The vocoder computes in float32 whatever the rest does.
        wanted = itemsize_of("float32") if component == VOCODER else itemsize
        cast = dtype in FLOATS and full_name not in kept
        size = count * wanted if cast else count * DTYPE_BITS[dtype] // 8
        block = pattern.match(name) if pattern is not None else None
        if block is None:
            rest += size
        else:
            blocks[int(block[1])] = blocks.get(int(block[1]), 0) + aligned(size)
    in_order = tuple(blocks[number] for number in sorted(blocks))
    codes = next(iter(coded_linears(dtypes).values()), "")
    return PartSizes(in_files if stored is None else stored, rest, in_order, codes, unused)


def itemsize_of(dtype: str) -> int:
    """Bytes of a number of ``dtype``, named as users do: ``bfloat16``."""
    return next(DTYPE_BITS[code] for code, name in DTYPE_NAMES.items() if name == dtype) // 8


def aligned(size: int) -> int:
    """``size`` rounded up to a multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def read_widths(configs: Mapping[str, Mapping[str, Any]], file: Path) -> Widths:
    """The widths in the components' configs. Raises OverlayError naming a field that is missing or no size."""

    def sizes(component: str, field: str, many: bool) -> list[int]:
        value: Any = configs[component]
        for name in field.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        found = value if many else [value]
        if isinstance(found, list) and found and all(type(size) is int and size > 0 for size in found):
            return found
        raise OverlayError(
            f"has no usable {field}",
            file=file / component / "config.json",
            expected="a list of sizes" if many else "a size",
            found=value,
            next=f"ltxpack verify {quoted(file)}",
        )

    def number(component: str, field: str) -> int:
        return sizes(component, field, many=False)[0]

    numbers = functools.partial(sizes, many=True)
    decoder = numbers("vae", "decoder_block_out_channels")
    return Widths(
        video=number(TRANSFORMER, "num_attention_heads") * number(TRANSFORMER, "attention_head_dim"),
        audio=number(TRANSFORMER, "audio_num_attention_heads") * number(TRANSFORMER, "audio_attention_head_dim"),
        text=number(TEXT_ENCODER, "text_config.hidden_size"),
        text_layers=number(TEXT_ENCODER, "text_config.num_hidden_layers"),
        text_inner=number(TEXT_ENCODER, "text_config.intermediate_size"),
        encoder=number("vae", "latent_channels"),
        decoder=decoder[-1] // math.prod(numbers("vae", "upsample_factor")) or 1,
        patch=number("vae", "patch_size"),
        upsampler=number("latent_upsampler", "mid_channels"),
        mel=number("audio_vae", "base_channels") * number("audio_vae", "mel_bins"),
        sound=_sound_width(number, numbers),
    )


def _sound_width(number: Callable[[str, str], int], numbers: Callable[[str, str], list[int]]) -> int:
    """Channels times samples per audio latent in the widest layer of the vocoder."""
    starts = {"": 4, "bwe_": 4 * math.prod(numbers(VOCODER, "upsample_factors")) // number(VOCODER, "hop_length")}
    widest = 0
    for prefix, start in starts.items():
        width, samples = number(VOCODER, f"{prefix}hidden_channels"), start
        for factor in numbers(VOCODER, f"{prefix}upsample_factors"):
            width, samples = width // 2, samples * factor
            widest = max(widest, width * samples)
    return widest
