"""The activations file: the largest input of each linear of each transformer, and the scales of fp8 bakes from it.

``ltxpack run --save-activations`` writes it, ``bake-lora`` and ``export`` read it and do not trust it (spec 09).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from ltxpack.errors import AdapterError, FormatError, UsageError
from ltxpack.files.reader import hash_file
from ltxpack.files.tensorfile import MAX_HEADER_BYTES, build_header, open_source, parse_header, parse_json
from ltxpack.manifest import Calibration, FileRecord, printed_name
from ltxpack.strength import Strength

FORMAT = "ltxpack-activations-1"
# Room for the largest header and a float for each tensor, whose entry in the header takes far more than four bytes.
MAX_BYTES = 2 * MAX_HEADER_BYTES
# The largest number that E4M3 holds, and the smallest scale: the smallest normal float32.
E4M3_LARGEST, SMALLEST_SCALE = 448.0, 2.0**-126
ANOTHER = "choose another file, or write a new one with --save-activations"

Loras = tuple[tuple[str, float | str], ...]
"""The blake3 and strength of each LoRA of a transformer, in their order; see manifest.BakedLora.stated."""


@dataclass(frozen=True)
class ActivationsFile:
    """The contents of a file. ``base`` is the base's :func:`base_digest`.

    Both mappings go by the name of the transformer: ``transformers`` has the LoRAs in it, ``largest`` the largest |x|
    that entered each linear (overlay name without ``.weight``).
    """

    model_version: str
    base: str
    transformers: Mapping[str, Loras] = field(default_factory=dict)
    largest: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> ActivationsFile:
        """The file at ``path``. Raises FormatError for any other file, SourceError if it cannot be read."""
        with open_source(path) as file:
            size, data = os.fstat(file.fileno()).st_size, file.read(MAX_BYTES)
        wrong = functools.partial(FormatError, file=path, next=ANOTHER)
        try:
            header = parse_header(data, size, path)
        except FormatError as error:
            # It may be the output of a run, and nothing that a user could fetch again.
            raise wrong(error.problem, tensor=error.tensor, expected=error.expected, found=error.found) from None
        found = header.metadata
        if found.get("format") != FORMAT or not {"model_version", "base", "transformers"} <= found.keys():
            raise wrong("is not an activations file", expected=f"format {FORMAT}", found=found.get("format"))
        try:
            stated = parse_json(found["transformers"], path).items()
            transformers = {str(name): tuple((str(each), _stated(by)) for each, by in loras) for name, loras in stated}
        except (AttributeError, TypeError, ValueError, UsageError):
            raise wrong("does not say which transformers it was recorded from") from None
        largest: dict[str, dict[str, float]] = {name: {} for name in transformers}
        for name, info in header.tensors.items():
            transformer, _, linear = name.partition(":")
            scalar = (info.dtype, info.shape) == ("F32", ()) and transformer in transformers
            value = struct.unpack_from("<f", data, info.start)[0] if scalar else math.nan
            if not 0 <= value < math.inf:
                problem, expected = "is not the largest |x| of an input", "one finite F32 that is not negative"
                raise wrong(problem, tensor=name, expected=expected, found=value if scalar else info.dtype)
            largest[transformer][linear] = value
        return cls(found["model_version"], found["base"], transformers, largest)

    def with_larger(self, transformer: str, loras: Loras, largest: Mapping[str, float]) -> ActivationsFile:
        """These values, and for each linear the maximum with ``largest``, another run of ``transformer``."""
        before = self.largest.get(transformer, {})
        larger = {name: max(value, before.get(name, 0.0)) for name, value in largest.items()}
        return dataclasses.replace(
            self,
            transformers={**self.transformers, transformer: loras},
            largest={**self.largest, transformer: {**before, **larger}},
        )

    def dump(self) -> bytes:
        """The file's bytes: the same values always give the same bytes."""
        values = {
            f"{transformer}:{linear}": value
            for transformer, largest in sorted(self.largest.items())
            for linear, value in sorted(largest.items())
        }
        metadata = {
            "format": FORMAT,
            "model_version": self.model_version,
            "base": self.base,
            "transformers": json.dumps(dict(sorted(self.transformers.items()))),
        }
        header = build_header(((name, "F32", ()) for name in values), metadata)
        return header + struct.pack(f"<{len(values)}f", *values.values())


def _stated(strength: object) -> float | str:
    """A strength from the file. Raises UsageError, TypeError or ValueError."""
    return str(Strength.parse(strength)) if isinstance(strength, str) else float(strength)  # type: ignore[arg-type]


def base_digest(files: Iterable[FileRecord]) -> str:
    """Identifies the base transformer with these files: the blake3 of the sorted lines ``path blake3``."""
    shards = (file for file in files if file.path.endswith(".safetensors"))
    return blake3("".join(sorted(f"{file.path} {file.blake3}\n" for file in shards)).encode()).hexdigest()


def activation_scale(largest: float) -> float:
    """The scale of a linear's input: |x| / 448, rounded up to a power of two; 1 for an input that is always zero."""
    return max(2.0 ** math.ceil(math.log2(largest / E4M3_LARGEST)), SMALLEST_SCALE) if largest else 1.0


def calibrated(path: Path, loras: Loras, base: str, linears: Sequence[str], next: str) -> Calibration:
    """The input scales of ``linears`` in the base ``base`` with ``loras`` (none at 0) in it.

    ``path`` is an activations file. Raises FormatError or SourceError for another one, AdapterError, with ``next`` to
    do, for one of another model or bake.
    """
    file = ActivationsFile.read(path)
    if file.base != base:
        raise AdapterError("was recorded from another base", file=path, expected=base, found=file.base, next=next)
    made_of = {name: [lora for lora in found if lora[1]] for name, found in file.transformers.items()}
    names = [name for name, found in made_of.items() if found == list(loras)]
    if not names:
        raise AdapterError(
            "was recorded from other bakes", file=path, items=sorted(made_of), next=next,
            expected=", ".join(f"{digest[:8]} at {strength}" for digest, strength in loras) or "the base",
        )  # fmt: skip
    largest: dict[str, float] = {}
    for name in names:
        largest |= {linear: max(value, largest.get(linear, 0.0)) for linear, value in file.largest[name].items()}
    if missing := [linear for linear in linears if linear not in largest]:
        raise AdapterError("lacks linears of this model", file=path, items=missing, next=next)
    scales = tuple(activation_scale(largest[linear]) for linear in linears)
    return Calibration(printed_name(path), hash_file(path), scales)
