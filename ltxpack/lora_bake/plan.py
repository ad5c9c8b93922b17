"""A bake before a byte moves: the options, names, the clean base, and the plan with the size of every file.

Needs no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any

from blake3 import blake3

from ltxpack.errors import OverlayError, UsageError, quoted
from ltxpack.files.reader import Range
from ltxpack.files.tensorfile import FLOATS, MAX_INDEX_BYTES, TensorFile, read_tensorfile
from ltxpack.lora_bake import coverage, coverage_page
from ltxpack.lora_bake.adapter import LoraUse
from ltxpack.lora_bake.coverage import TargetStat
from ltxpack.manifest import BAKE_NAME, RESERVED_BAKE_NAMES, Bake, BakedLora, FileRecord, Manifest, changed_file
from ltxpack.repack.items import Buffer, Copied, Item, LinkFile, ShardEntry, WriteBytes, WriteShard, stored_tensor

RULES = ("fp32", "official")
DEVICES = ("auto", "cpu", "cuda")
BAKES = "bakes"
TRANSFORMER = "transformer"
MAX_NAME_LENGTH = 200
# Beyond it weights leave what bfloat16 holds, whatever the LoRA and its alpha.
MAX_STRENGTH = 1e18
# Raised when the same inputs would give other bytes than before.
ARITHMETIC_VERSION = 1

_FOREIGN = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclass(frozen=True)
class BakeOptions:
    """What is asked for: one bake per strength of the main LoRA (default: the overlay's distilled one).

    ``added``: (file, PEFT folder or REPO/FILE; strength), applied in this order before the main one.
    """

    overlay: Path
    strengths: tuple[float, ...]
    lora: str | None = None
    added: tuple[tuple[str, float], ...] = ()
    rule: str = "fp32"
    name: str | None = None
    device: str = "auto"
    force: bool = False
    allow_unmatched: bool = False

    def command(self, **changes: object) -> str:
        """The command line that asks for this, with ``changes``, to be typed as it is."""
        wanted = dataclasses.replace(self, **changes)  # type: ignore[arg-type]
        flags = [f"--strength {format_strength(strength)}" for strength in wanted.strengths]
        flags += [f"--lora {quoted(wanted.lora)}"] if wanted.lora is not None else []
        flags += [f"--add {quoted(f'{file}={format_strength(strength)}')}" for file, strength in wanted.added]
        named = (("--rule", wanted.rule, "fp32"), ("--name", wanted.name, None), ("--device", wanted.device, "auto"))
        flags += [f"{flag} {quoted(value)}" for flag, value, default in named if value is not None and value != default]
        flags += [flag for flag, on in (("--allow-unmatched", wanted.allow_unmatched), ("--force", wanted.force)) if on]
        return " ".join(["ltxpack bake-lora", quoted(wanted.overlay), *flags])

    def checked(self) -> BakeOptions:
        """The same with equal strengths once. Raises UsageError for anything wrong."""
        if not self.strengths:
            raise UsageError("needs a strength", next=self.command(strengths=(1.0,)))
        for value, known, flag in ((self.rule, RULES, "--rule"), (self.device, DEVICES, "--device")):
            if value not in known:
                raise UsageError(f"{flag} is unknown", expected=" or ".join(known), found=value)
        strengths = tuple(dict.fromkeys(check_strength(strength) for strength in self.strengths))
        added = tuple((file, check_strength(strength)) for file, strength in self.added)
        if self.name is not None:
            check_bake_name(self.name)
            if len(self.strengths) > 1:
                raise UsageError("--name goes with one strength", found=f"{len(self.strengths)} strengths")
        return dataclasses.replace(self, strengths=strengths, added=added)


# Names


def format_strength(strength: float) -> str:
    """The shortest decimal that reads back as ``strength``: no exponent, no trailing zeros (1.0 -> ``1``)."""
    if strength == 0:
        return "0"
    text = format(Decimal(repr(float(strength))), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def check_strength(strength: float) -> float:
    """``strength`` if the sums, which are float32, can use it. Raises UsageError."""
    if not abs(strength) <= MAX_STRENGTH:
        most, advice = f"one of at most {MAX_STRENGTH:g}", "choose another, such as 0.5"
        raise UsageError("a strength must be a finite number", expected=most, found=strength, next=advice)
    return 0.0 if strength == 0 else strength


def parse_added(text: str) -> tuple[str, float]:
    """``FILE=S`` split at the last ``=``. Raises UsageError."""
    file, equals, number = text.rpartition("=")
    if not equals or not file:
        raise UsageError("--add needs a file and a strength", expected="FILE=S", found=text)
    try:
        strength = float(number)
    except ValueError:
        raise UsageError("the strength of --add is not a number", expected="FILE=S", found=text) from None
    return file, check_strength(strength)


def lora_name(stem: str) -> str:
    """A file's stem with what a bake's name may not hold replaced by ``-``."""
    return _FOREIGN.sub("-", stem).strip("-.") or "lora"


def bake_name(main: tuple[str, float], added: Sequence[tuple[str, float]]) -> str:
    """``distilled-0.5+style-0.8``: the main LoRA, then the added ones in order of application."""
    name = "+".join(f"{lora}-{format_strength(strength)}" for lora, strength in (main, *added))
    if len(name) > MAX_NAME_LENGTH:
        raise UsageError("the bake's name would be too long", found=name[:80] + "…", next="give it one with --name")
    return name


def check_bake_name(name: str) -> str:
    """``name`` if a bake may have it. Raises UsageError."""
    if not BAKE_NAME.fullmatch(name) or name in RESERVED_BAKE_NAMES or len(name) > MAX_NAME_LENGTH:
        reserved = ", ".join(sorted(RESERVED_BAKE_NAMES))
        allowed = f"letters, digits, . _ + - ({MAX_NAME_LENGTH} at most), and not {reserved}"
        raise UsageError("is not a name for a bake", file=name, expected=allowed)
    return name


# The clean base


@dataclass(frozen=True)
class BaseShard:
    """One shard as the manifest lists it, and its header."""

    record: FileRecord
    file: TensorFile

    @property
    def name(self) -> str:
        """The file's name."""
        return PurePosixPath(self.record.path).name


@dataclass(frozen=True)
class BaseTransformer:
    """The transformer that every bake starts from. ``small`` holds config and index: file name -> bytes."""

    shards: tuple[BaseShard, ...]
    small: dict[str, bytes]
    shapes: dict[str, tuple[int, ...]]


def read_base(overlay: Path, manifest: Manifest) -> BaseTransformer:
    """The base of ``overlay``; sizes and small files are checked here, shards while they are streamed.

    Raises OverlayError for anything that is not as the manifest says.
    """
    if TRANSFORMER not in manifest.components:
        advice = f"ltxpack materialize SOURCE {quoted(overlay)} --force"
        raise OverlayError("holds no transformer", file=overlay, next=advice)
    shards: list[BaseShard] = []
    small: dict[str, bytes] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for record in manifest.components[TRANSFORMER].files:
        path = overlay / record.path
        if not path.is_file() or path.stat().st_size != record.size:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
            raise changed_file(path, f"{record.size} bytes", found)
        if not record.path.endswith(".safetensors"):
            if record.size > MAX_INDEX_BYTES:
                raise changed_file(path, f"at most {MAX_INDEX_BYTES} bytes", f"{record.size} bytes")
            data = small[path.name] = path.read_bytes()
            if (digest := blake3(data).hexdigest()) != record.blake3:
                raise changed_file(path, f"blake3 {record.blake3}", f"blake3 {digest}")
            continue
        shard = BaseShard(record, read_tensorfile(path))
        for name, info in shard.file.tensors.items():
            if name in shapes:
                raise OverlayError("is in two shards", file=path, tensor=name, next=f"ltxpack verify {quoted(overlay)}")
            if info.dtype not in FLOATS:
                problem, usable = "has a dtype no LoRA is baked into", " or ".join(FLOATS)
                raise OverlayError(problem, file=path, tensor=name, expected=usable, found=info.dtype)
            shapes[name] = info.shape
        shards.append(shard)
    return BaseTransformer(tuple(shards), small, shapes)


# One bake


@dataclass(frozen=True)
class Arithmetic:
    """How the sums are made: all of it goes into the manifest, and a resumed bake keeps it."""

    rule: str
    kernel: str
    device: str


class FusedTensor(Copied):
    """The producer of a base tensor with LoRAs added to it: its place in a shard's plan.

    ``stream.Engine`` makes the bytes, for several bakes from one read of the base.
    """

    def make(self, data: Iterator[memoryview]) -> Iterator[Buffer]:
        """Raises AssertionError: this producer alone does not know the factors."""
        raise AssertionError("stream.Engine writes the shards of a bake")


@dataclass(frozen=True)
class BakePlan:
    """A bake to be made; ``loras`` in order of application."""

    name: str
    loras: tuple[LoraUse, ...]
    rule: str
    base: BaseTransformer
    overlay: Path

    @property
    def folder(self) -> str:
        """Where it goes in the overlay."""
        return f"{BAKES}/{self.name}"

    @functools.cached_property
    def recorded(self) -> tuple[BakedLora, ...]:
        """Its LoRAs as the manifest lists them."""
        return tuple(lora.record(self.rule) for lora in self.loras)

    def is_made_from(self, bake: Bake) -> bool:
        """Whether ``bake`` is this very bake: the same LoRAs, strengths, order and rule."""
        return (bake.loras, bake.rule) == (self.recorded, self.rule)

    @functools.cached_property
    def touched(self) -> frozenset[str]:
        """The tensors that are fused. A strength of 0 adds nothing; the official rule only skips when all are 0."""
        all_take_part = self.rule == "official" and any(lora.strength for lora in self.loras)
        active = (lora for lora in self.loras if lora.strength or all_take_part)
        return frozenset(name for lora in active for name in lora.adapter.targets)

    @functools.cached_property
    def shards(self) -> dict[str, WriteShard]:
        """Base shard's name -> the shard to be written: those that hold a touched tensor."""
        return {
            shard.name: WriteShard(f"{self.folder}/{shard.name}", tuple(self._entries(shard)), self._provenance(shard))
            for shard in self.base.shards
            if not self.touched.isdisjoint(shard.file.tensors)
        }

    @functools.cached_property
    def links(self) -> tuple[LinkFile, ...]:
        """The other shards: links to the base's."""
        records = {shard.name: shard.record for shard in self.base.shards if shard.name not in self.shards}
        return tuple(
            LinkFile(f"{self.folder}/{name}", record.size, record.blake3, f"../../{record.path}")
            for name, record in records.items()
        )

    @functools.cached_property
    def small(self) -> tuple[WriteBytes, ...]:
        """config.json and the index, as in the base."""
        return tuple(WriteBytes(f"{self.folder}/{name}", data) for name, data in sorted(self.base.small.items()))

    @property
    def items(self) -> tuple[Item, ...]:
        """Every file of the bake but the reports, in the order they are written."""
        return (*self.small, *self.links, *self.shards.values())

    def reports(self, document: Mapping[str, Any]) -> tuple[WriteBytes, WriteBytes]:
        """coverage.json and coverage.html."""
        return (
            WriteBytes(f"{self.folder}/{coverage.REPORT_NAME}", coverage.dump(document)),
            WriteBytes(f"{self.folder}/{coverage.PAGE_NAME}", coverage_page.render(document)),
        )

    def document(self, arithmetic: Arithmetic, stats: Iterable[TargetStat]) -> dict[str, Any]:
        """coverage.json as a document."""
        return coverage.build_report(self.name, self.loras, stats, self.base.shapes, dataclasses.asdict(arithmetic))

    def files(self, arithmetic: Arithmetic) -> list[dict[str, Any]]:
        """Every file with its size and what is done for it; for the two reports a bound, whatever will be measured."""
        # No figure is longer than a change of 1.11e-100 and a count of all elements.
        counts = {name: math.prod(self.base.shapes[name]) for name in sorted(self.touched)}
        longest = [TargetStat(name, 1.0, 1.2321e-200, count, count) for name, count in counts.items()]
        document = self.document(arithmetic, longest)
        files = [(item.path, item.size, "link" if isinstance(item, LinkFile) else "write") for item in self.items]
        # A page with other looks than these is longer, but never twice as long.
        files += [(report.path, 2 * report.size, "write") for report in self.reports(document)]
        return [{"path": path, "bytes": size, "action": action} for path, size, action in sorted(files)]

    def fingerprint(self) -> str:
        """Tells this bake's inputs from others'."""
        inputs = {
            "version": ARITHMETIC_VERSION,
            "rule": self.rule,
            "name": self.name,
            "loras": [[lora.blake3, lora.strength, lora.scale] for lora in self.recorded],
            "base": [dataclasses.astuple(shard.record) for shard in self.base.shards],
            "small": {item.path: blake3(item.data).hexdigest() for item in self.small},
        }
        return blake3(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def record(self, arithmetic: Arithmetic, files: Mapping[str, FileRecord], changed: Iterable[str]) -> Bake:
        """How the manifest lists the finished bake."""
        reports = [f"{self.folder}/{name}" for name in coverage.REPORT_NAMES]
        paths = [*(item.path for item in self.items), *reports]
        return Bake(
            loras=self.recorded,
            rule=arithmetic.rule,
            kernel=arithmetic.kernel,
            device=arithmetic.device,
            files=tuple(files[path] for path in sorted(paths)),
            changed=tuple(sorted(changed)),
        )

    def _entries(self, shard: BaseShard) -> Iterator[ShardEntry]:
        """The base's tensors in the base's order; each that is touched comes from a FusedTensor."""
        source = shard.file.path
        for info in shard.file.tensors.values():
            entry = stored_tensor(info.name, info, source)
            fused = FusedTensor(Range(source, info.start, info.nbytes))
            yield dataclasses.replace(entry, producer=fused) if info.name in self.touched else entry

    def _provenance(self, shard: BaseShard) -> dict[str, str]:
        loras = [{"name": lora.name, "blake3": lora.blake3, "strength": lora.strength} for lora in self.recorded]
        return {
            "format": "pt",
            "ltxpack_base_blake3": shard.record.blake3,
            "ltxpack_loras": json.dumps(loras, sort_keys=True),
            "ltxpack_rule": self.rule,
        }
