"""What a bake stores of its quantised linears, and which these are (spec 09, sections 1, 4, 5 and 7). Needs no torch.

The arithmetic is in quantise.py. How large the inputs of the linears are says an activations file, which ``ltxpack run
--save-activations`` writes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from ltxpack.errors import AdapterError, FormatError, UsageError
from ltxpack.files.reader import hash_file
from ltxpack.files.tensorfile import TensorFile, open_source, parse_json, read_tensorfile
from ltxpack.lora_bake.coverage import split_name
from ltxpack.manifest import FP8, INT8, Calibration, FileRecord
from ltxpack.repack.items import TensorSpec

CODES = {FP8: "F8_E4M3", INT8: "I8"}
# Blocks that stay as they are in a model of so many; of others the first and the last.
KEPT_BLOCKS = {48: (0, 1, 46, 47)}
E4M3_LARGEST = 448.0
SMALLEST_SCALE = 2.0**-126
ACTIVATIONS_FORMAT = "ltxpack-activations-1"

Shapes = Mapping[str, tuple[int, ...]]


def stored_specs(form: str, name: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
    """The weight ``name`` in codes and, behind it, its scales."""
    codes, scale = TensorSpec(name, CODES[form], shape), f"{name}_scale"
    if form == INT8:
        return codes, TensorSpec(scale, "F32", (shape[0], 1))
    return codes, TensorSpec(scale, "F32", ()), TensorSpec(f"{name.removesuffix('weight')}input_scale", "F32", ())


def parse_blocks(text: str) -> tuple[int, ...]:
    """``0,1,46,47`` or ``none``. Raises UsageError."""
    if text.strip() == "none":
        return ()
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise UsageError("--keep-blocks needs numbers of blocks", expected="N,N,… or none", found=text) from None


def quantised_linears(shapes: Shapes, kept: Sequence[int] | None, command: str) -> tuple[str, ...]:
    """The linears of all blocks but ``kept`` (None: the usual ones), named without ``.weight``, sorted.

    Raises UsageError, with ``command`` to run instead, for a block that is not there, or if none is left.
    """
    blocks: dict[int, list[str]] = {}
    for name, shape in shapes.items():
        block = split_name(name)[0]
        if block is not None and len(shape) == 2 and name.endswith(".weight"):
            blocks.setdefault(block, []).append(name.removesuffix(".weight"))
    count = max(blocks, default=-1) + 1
    kept = KEPT_BLOCKS.get(count, (0, count - 1)) if kept is None else kept
    if absent := [block for block in kept if block not in blocks]:
        there = f"blocks 0 to {count - 1}"
        raise UsageError("--keep-blocks names a block that is not there", expected=there, found=absent[0], next=command)
    found = sorted(linear for block, linears in blocks.items() if block not in kept for linear in linears)
    if not found:
        raise UsageError("every block is kept, so that no linear would be quantised", items=sorted(kept), next=command)
    return tuple(found)


def activation_scale(largest: float) -> float:
    """The scale of a linear's input: |x| / 448, up to a power of two; 1 for an input that is always zero."""
    return max(2.0 ** math.ceil(math.log2(largest / E4M3_LARGEST)), SMALLEST_SCALE) if largest else 1.0


def base_digest(shards: Sequence[FileRecord]) -> str:
    """Tells the base transformer with these shards from others in an activations file."""
    from blake3 import blake3

    return blake3("".join(sorted(f"{shard.path} {shard.blake3}\n" for shard in shards)).encode()).hexdigest()


class Activations:
    """The largest inputs of linears as an activations file has them, of one or more transformers of one base."""

    def __init__(self, path: Path) -> None:
        """Raises SourceError or FormatError."""
        self.path = path
        self._file = read_tensorfile(path)
        metadata = self._file.metadata
        if metadata.get("format") != ACTIVATIONS_FORMAT:
            raise FormatError(
                "is not an activations file", file=path, expected=f"format {ACTIVATIONS_FORMAT}",
                found=metadata.get("format"), next="run an overlay with --save-activations FILE",
            )  # fmt: skip
        self.base = metadata.get("base")
        self._made_of = _made_of(self._file)

    def calibration(
        self, loras: Sequence[tuple[str, float]], base: str, linears: Sequence[str], next: str
    ) -> Calibration:
        """The input scales of ``linears`` in the base ``base`` with ``loras`` (blake3, strength; none at 0) in it.

        Raises AdapterError, with ``next`` to do, for a file of another model or bake, FormatError for a number that no
        input can have.
        """
        if self.base != base:
            raise AdapterError(
                "was recorded of another base", file=self.path, expected=base, found=self.base, next=next
            )
        names = [name for name, found in self._made_of.items() if found == list(loras)]
        if not names:
            raise AdapterError(
                "was recorded of other bakes", file=self.path, items=sorted(self._made_of), next=next,
                expected=", ".join(f"{digest[:8]} at {strength:g}" for digest, strength in loras) or "the base",
            )  # fmt: skip
        tensors = self._file.tensors
        if missing := [linear for linear in linears if f"{names[0]}:{linear}" not in tensors]:
            raise AdapterError("lacks linears of this model", file=self.path, items=missing, next=next)
        largest = self._largest([f"{names[0]}:{linear}" for linear in linears])
        scales = tuple(map(activation_scale, largest))
        return Calibration(self.path.name, hash_file(self.path), scales)

    def _largest(self, names: Sequence[str]) -> list[float]:
        found = []
        with open_source(self.path) as file:
            for name in names:
                info = self._file.tensors[name]
                file.seek(info.start)
                stored = file.read(4) if (info.dtype, info.nbytes) == ("F32", 4) else b""
                value = struct.unpack("<f", stored)[0] if len(stored) == 4 else math.nan
                if not 0 <= value < math.inf:
                    problem, expected = "is not the largest |x| of an input", "one finite F32 that is not negative"
                    raise FormatError(problem, file=self.path, tensor=name, expected=expected, found=value)
                found.append(value)
        return found


def _made_of(file: TensorFile) -> dict[str, list[tuple[str, float]]]:
    """Each transformer's LoRAs, (blake3, strength), those at 0 left out."""
    stated = parse_json(file.metadata.get("transformers", "null").encode(), file.path)
    try:
        return {
            str(name): [(str(digest), float(strength)) for digest, strength in loras if strength]
            for name, loras in stated.items()
        }
    except (AttributeError, TypeError, ValueError):
        raise FormatError("does not say which transformers it was recorded of", file=file.path) from None
