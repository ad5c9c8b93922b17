"""A bake before a byte moves: the options, names, the clean base, and the plan with the size of every file.

Needs no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from ltxpack.errors import OverlayError, UsageError, quoted
from ltxpack.files.reader import Range
from ltxpack.files.tensorfile import FLOATS, TensorFile, parse_json, read_tensorfile
from ltxpack.lora_bake import coverage, coverage_page
from ltxpack.lora_bake.adapter import LoraUse, Shapes
from ltxpack.lora_bake.coverage import TargetStat
from ltxpack.ltx23.codes import CODED, CODES, kept_blocks, linears_by_block, stored
from ltxpack.ltx23.configs import json_bytes
from ltxpack.ltx23.fields import MAX_REPEATS
from ltxpack.ltx23.lora_keys import TEXT_COMPONENTS
from ltxpack.manifest import (
    BAKE_NAME,
    BAKES,
    BF16,
    FORMATS,
    FP8,
    RESERVED_BAKE_NAMES,
    RULES,
    TEXT_ENCODERS,
    Bake,
    BakedLora,
    Calibration,
    FileRecord,
    Manifest,
    changed_file,
    recorded_bytes,
    usual_name,
)
from ltxpack.repack.items import (
    INDEX_ENDING,
    Buffer,
    Copied,
    Item,
    LinkFile,
    ShardEntry,
    TensorSpec,
    WriteBytes,
    WriteShard,
    index_bytes,
    stored_tensor,
)
from ltxpack.strength import Strength, format_strength

DEVICES = ("auto", "cpu", "cuda")
TRANSFORMER, CONNECTORS = "transformer", "connectors"
CONFIG = "config.json"
MAX_NAME_LENGTH = 200
# Rises when the same inputs give other bytes than before.
ARITHMETIC_VERSION = 1

_FOREIGN = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclass(frozen=True)
class BakeOptions:
    """The options: one bake per format and strength of the main LoRA (default: the overlay's distilled one).

    ``added``: (file, PEFT folder or REPO/FILE; strength), applied in this order before the main one. ``keep_blocks``:
    the blocks that quantised bakes leave in bf16, None for the usual ones. ``activations``: the file with fp8's input
    scales. ``export``: the flags of an export for which the bake is made, "" for a bake of the overlay. ``text``: bake
    the LoRAs' changes of the text path too.
    """

    overlay: Path
    strengths: tuple[float | Strength, ...]
    lora: str | None = None
    added: tuple[tuple[str, float | Strength], ...] = ()
    rule: str = "fp32"
    formats: tuple[str, ...] = (BF16,)
    name: str | None = None
    device: str = "auto"
    force: bool = False
    allow_unmatched: bool = False
    keep_blocks: tuple[int, ...] | None = None
    activations: Path | None = None
    export: str = ""
    text: bool = False

    @property
    def without_main(self) -> bool:
        """Whether only added LoRAs are wanted, or the quantised base: then the overlay needs no LoRA of its own."""
        zero = tuple(map(Strength.of, self.strengths)) == (Strength(0.0),)
        return self.lora is None and zero and (bool(self.added) or BF16 not in self.formats)

    def command(self, **changes: object) -> str:
        """The command line with these options and ``changes``, ready to type."""
        wanted = dataclasses.replace(self, **changes)  # type: ignore[arg-type]
        flags = [f"--strength {_typed(strength)}" for strength in wanted.strengths]
        flags += [f"--lora {quoted(wanted.lora)}"] if wanted.lora is not None else []
        flags += [f"--add {quoted(f'{file}={_typed(strength)}')}" for file, strength in wanted.added]
        name = None if wanted.export else wanted.name
        named = (("--rule", wanted.rule, "fp32"), ("--name", name, None), ("--device", wanted.device, "auto"))
        flags += [f"{flag} {quoted(value)}" for flag, value, default in named if value is not None and value != default]
        flags += [f"--format {form}" for form in wanted.formats if wanted.formats != (BF16,)]
        if wanted.keep_blocks is not None:
            flags.append(f"--keep-blocks {','.join(map(str, wanted.keep_blocks)) or 'none'}")
        flags += [f"--activations {quoted(wanted.activations)}"] if wanted.activations is not None else []
        switches = (("--text", wanted.text), ("--allow-unmatched", wanted.allow_unmatched), ("--force", wanted.force))
        flags += [flag for flag, on in switches if on]
        command = ["ltxpack export" if wanted.export else "ltxpack bake-lora", quoted(wanted.overlay)]
        return " ".join([*command, *([wanted.export] if wanted.export else []), *flags])

    def checked(self) -> BakeOptions:
        """The options with equal strengths once. Raises UsageError for any fault."""
        if not self.strengths:
            raise UsageError("needs a strength", next=self.command(strengths=(1.0,)))
        formats = tuple(dict.fromkeys(self.formats)) or (BF16,)
        choices = ((self.rule, RULES, "--rule"), (self.device, DEVICES, "--device"))
        for value, known, flag in (*choices, *((form, FORMATS, "--format") for form in formats)):
            if value not in known:
                raise UsageError(f"{flag} is unknown", expected=" or ".join(known), found=value)
        checked = self.with_strengths(Strength.of)
        if self.keep_blocks is not None and formats == (BF16,):
            raise UsageError("--keep-blocks goes with --format fp8 or int8", next=self.command(formats=(FP8,)))
        if self.activations is not None and FP8 not in formats:
            again = self.command(formats=(FP8,) if self.export else (*formats, FP8))
            raise UsageError("--activations goes with --format fp8", next=again)
        if self.name is not None:
            check_bake_name(self.name)
            if len(self.strengths) * len(formats) > 1:
                found = f"{len(self.strengths)} strengths and {len(formats)} formats"
                raise UsageError("--name goes with one strength and one format", found=found)
        return dataclasses.replace(checked, formats=formats)

    def with_strengths(self, change: Callable[[float | Strength], Strength]) -> BakeOptions:
        """The options with every strength changed, and equal strengths once."""
        strengths = tuple(dict.fromkeys(map(change, self.strengths)))
        added = tuple((file, change(strength)) for file, strength in self.added)
        return dataclasses.replace(self, strengths=strengths, added=added)


# Names


def _typed(strength: float | Strength) -> str:
    return str(strength) if isinstance(strength, Strength) else format_strength(strength)


def parse_added(text: str) -> tuple[str, Strength]:
    """``FILE=S`` or ``FILE=S@BLOCKS:S`` split at the last ``=``. Raises UsageError."""
    file, equals, number = text.rpartition("=")
    if not equals or not file:
        raise UsageError(
            "--add needs a file and a strength", expected="FILE=S", found=text, next="write --add FILE=0.8"
        )
    return file, Strength.parse(number)


def parse_blocks(text: str) -> tuple[int, ...]:
    """``0,1,46,47`` or ``none``. Raises UsageError."""
    if text.strip() == "none":
        return ()
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise UsageError("--keep-blocks needs numbers of blocks", expected="N,N,… or none", found=text) from None


def lora_name(stem: str) -> str:
    """A file's stem, with ``-`` for characters that a bake's name may not hold."""
    return _FOREIGN.sub("-", stem).strip("-.") or "lora"


def bake_name(loras: Sequence[tuple[str, float | Strength]], form: str = BF16) -> str:
    """:func:`.manifest.usual_name`. Raises UsageError for a name that is too long."""
    name = usual_name(((lora, Strength.of(strength)) for lora, strength in loras), form)
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
    """One shard: its manifest entry and its header."""

    record: FileRecord
    file: TensorFile

    @classmethod
    def open(cls, overlay: Path, record: FileRecord) -> BaseShard:
        """Raises OverlayError if its size is not the manifest's; its content is checked while it streams."""
        path, expected = overlay / record.path, f"{record.size} bytes"
        found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
        if found != expected:
            raise changed_file(path, expected, found)
        return cls(record, read_tensorfile(path))

    @property
    def name(self) -> str:
        return _name_in_bake(self.record.path)


def _name_in_bake(path: str) -> str:
    """The path in a bake of the base's file ``path``: in the bake's folder, for connectors in a subfolder."""
    component, _, name = path.partition("/")
    return path if component == CONNECTORS else name


@dataclass(frozen=True)
class Base:
    """The base of every bake: the transformer, or the text encoder and its connectors.

    ``small`` holds configs and indices: name in a bake -> bytes. ``place``: the folder of its bakes.
    """

    shards: tuple[BaseShard, ...]
    small: dict[str, bytes]
    shapes: dict[str, tuple[int, ...]]
    place: str = BAKES

    def strength(self, asked: float | Strength) -> Strength:
        """``asked`` for this base: blocks in a strength are the transformer's."""
        found = Strength.of(asked)
        return found if self.place == BAKES else Strength(found.value)


def read_base(overlay: Path, manifest: Manifest, place: str = BAKES) -> Base:
    """The base of ``overlay`` for bakes in ``place``.

    Raises OverlayError for any difference from the manifest but in the content of shards.
    """
    components = TEXT_COMPONENTS if place == TEXT_ENCODERS else (TRANSFORMER,)
    advice = f"ltxpack materialize SOURCE {quoted(overlay)} --force"
    if lacking := [name for name in components if name not in manifest.components]:
        raise OverlayError(f"holds no {' and no '.join(lacking)}", file=overlay, next=advice)
    shards: list[BaseShard] = []
    small: dict[str, bytes] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for record in (record for name in components for record in manifest.components[name].files):
        if not record.path.endswith(".safetensors"):
            small[_name_in_bake(record.path)] = recorded_bytes(overlay, record)
            continue
        shard = BaseShard.open(overlay, record)
        path = shard.file.path
        for name, info in shard.file.tensors.items():
            if name in shapes:
                raise OverlayError("is in two shards", file=path, tensor=name, next=f"ltxpack verify {quoted(overlay)}")
            if info.dtype not in FLOATS:
                problem, usable = "has a dtype that no LoRA can be baked into", " or ".join(FLOATS)
                raise OverlayError(problem, file=path, tensor=name, expected=usable, found=info.dtype)
            if (coverage.split_name(name)[0] or 0) >= MAX_REPEATS:  # the page has a row for each block
                problem, most = "is of a block that no model has", f"fewer than {MAX_REPEATS} blocks"
                raise OverlayError(problem, file=path, tensor=name, expected=most, next=advice)
            shapes[name] = info.shape
        shards.append(shard)
    if not shapes:
        raise OverlayError(f"holds no weights of the {components[0]}", file=overlay, next=advice)
    return Base(tuple(shards), small, shapes, place)


# One bake


def quantised_linears(shapes: Shapes, kept: Sequence[int] | None, command: str) -> tuple[str, ...]:
    """The linears of all blocks but ``kept`` (None: the usual ones), named without ``.weight``, sorted.

    Raises UsageError, with ``command`` to run instead, for an unknown block, or if no block is left.
    """
    blocks = linears_by_block(shapes)
    count = max(blocks, default=-1) + 1
    kept = kept_blocks(count) if kept is None else kept
    if absent := [block for block in kept if block not in blocks]:
        there = f"blocks 0 to {count - 1}"
        raise UsageError("--keep-blocks names a block that is not there", expected=there, found=absent[0], next=command)
    found = sorted(linear for block, linears in blocks.items() if block not in kept for linear in linears)
    if not found:
        raise UsageError("all blocks stay in bf16, so no linear would be quantised", items=sorted(kept), next=command)
    return tuple(found)


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic of the sums: the manifest records all of it, and a resumed bake keeps it."""

    rule: str
    kernel: str
    device: str


@dataclass(frozen=True, slots=True)
class FusedTensor(Copied):
    """The producer, in a shard's plan, of a base tensor with LoRAs added to it.

    ``stream.Engine`` makes the bytes, for several bakes from one read of the base. In a ``form`` other than bf16 they
    are codes and scales, for fp8 with the ``input_scale``.
    """

    form: str = BF16
    input_scale: float = 1.0

    def make(self, data: Iterator[memoryview]) -> Iterator[Buffer]:
        """Raises AssertionError: this producer does not know the factors."""
        raise AssertionError("stream.Engine writes the shards of a bake")


@dataclass(frozen=True)
class BakePlan:
    """A bake to make; ``loras`` in order of application. ``quantised``: the linears stored in ``form``."""

    name: str
    loras: tuple[LoraUse, ...]
    rule: str
    base: Base
    overlay: Path
    form: str = BF16
    quantised: tuple[str, ...] = ()
    calibration: Calibration | None = None

    @property
    def folder(self) -> str:
        return f"{self.base.place}/{self.name}"

    def strengths_in(self, name: str) -> tuple[float, ...]:
        """The strengths of its LoRAs in the tensor ``name``."""
        block = coverage.split_name(name)[0]
        return tuple(lora.applied.at(block) for lora in self.recorded)

    @functools.cached_property
    def recorded(self) -> tuple[BakedLora, ...]:
        return tuple(lora.baked for lora in self.loras)

    @functools.cached_property
    def stated(self) -> Bake:
        """Its manifest entry, without files and arithmetic."""
        return Bake(self.recorded, self.rule, "", "", (), (), self.form, self.quantised, self.calibration)

    def is_made_from(self, bake: Bake) -> bool:
        """Whether ``bake`` has the same LoRAs, strengths, order, rule and form."""
        return dataclasses.replace(bake, kernel="", device="", files=(), changed=()) == self.stated

    @functools.cached_property
    def input_scales(self) -> dict[str, float]:
        """Quantised weight -> the scale of its input: 1 without a calibration."""
        names = [f"{linear}.weight" for linear in self.quantised]
        scales = [1.0] * len(names) if self.calibration is None else self.calibration.scales
        return dict(zip(names, scales, strict=True))

    @functools.cached_property
    def touched(self) -> frozenset[str]:
        """The tensors that are fused or quantised.

        A strength of 0 adds nothing; the official rule skips a tensor only if all strengths are 0.
        """
        all_take_part = self.rule == "official" and not all(lora.idle for lora in self.recorded)
        found = set(self.input_scales)
        for i, lora in enumerate(self.loras):
            found |= {name for name in lora.adapter.targets if all_take_part or self.strengths_in(name)[i]}
        return frozenset(found)

    @functools.cached_property
    def shards(self) -> dict[str, WriteShard]:
        """Base shard's name -> the shard to write, for shards with a touched tensor."""
        return {
            shard.name: WriteShard(f"{self.folder}/{shard.name}", tuple(self.entries(shard)), self._provenance(shard))
            for shard in self.base.shards
            if not self.touched.isdisjoint(shard.file.tensors)
        }

    @functools.cached_property
    def links(self) -> tuple[LinkFile, ...]:
        """The other shards: links to the base's."""
        linked = (shard for shard in self.base.shards if shard.name not in self.shards)
        records = {f"{self.folder}/{shard.name}": shard.record for shard in linked}
        return tuple(
            LinkFile(path, record.size, record.blake3, posixpath.relpath(record.path, posixpath.dirname(path)))
            for path, record in records.items()
        )

    @functools.cached_property
    def small(self) -> tuple[WriteBytes, ...]:
        """config.json and the index of the base; the config says if weights are codes, the index names their scales."""
        small = dict(self.base.small)
        if self.quantised:
            small |= {name: self._index() for name in small if name.endswith(INDEX_ENDING)}
            small |= {name: self._config(small[name]) for name in small if name == CONFIG}
        return tuple(WriteBytes(f"{self.folder}/{name}", data) for name, data in sorted(small.items()))

    @property
    def items(self) -> tuple[Item, ...]:
        """Every file of the bake except the reports, in the order of writing."""
        return (*self.small, *self.links, *self.shards.values())

    def reports(self, document: Mapping[str, Any]) -> tuple[WriteBytes, WriteBytes]:
        """coverage.json and coverage.html."""
        return (
            WriteBytes(f"{self.folder}/{coverage.REPORT_NAME}", coverage.dump(document)),
            WriteBytes(f"{self.folder}/{coverage.PAGE_NAME}", coverage_page.render(document)),
        )

    def document(self, arithmetic: Arithmetic, stats: Mapping[str, TargetStat]) -> dict[str, Any]:
        """coverage.json as a document."""
        return coverage.build_report(self.name, self.loras, stats, self.base.shapes, self._made_by(arithmetic))

    def files(self, arithmetic: Arithmetic) -> list[dict[str, Any]]:
        """Every file with its size and action; for the two reports an upper bound of any measurement."""
        # No figure is longer than a change of 1.11e-100 and a count of all elements.
        counts = {name: math.prod(self.base.shapes[name]) for name in self.touched}
        longest = {name: TargetStat(1.0, 1.2321e-200, n, n, 1.0, 1.2321e-200, 1.1e-300) for name, n in counts.items()}
        document = self.document(arithmetic, longest)
        files = [(item.path, item.size, "link" if isinstance(item, LinkFile) else "write") for item in self.items]
        # A page with other cells than these is longer, but never twice as long.
        files += [(report.path, 2 * report.size, "write") for report in self.reports(document)]
        return [{"path": path, "bytes": size, "action": action} for path, size, action in sorted(files)]

    def fingerprint(self) -> str:
        """Identifies this bake's inputs."""
        inputs = {
            "version": ARITHMETIC_VERSION,
            "rule": self.rule,
            "name": self.name,
            "loras": [[lora.blake3, lora.stated, lora.scale] for lora in self.recorded],
            "base": [dataclasses.astuple(shard.record) for shard in self.base.shards],
            "small": {item.path: blake3(item.data).hexdigest() for item in self.small},
        }
        if self.quantised:
            inputs["quantised"] = [
                self.form,
                self.quantised,
                self.calibration and dataclasses.astuple(self.calibration),
            ]
        return blake3(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def record(self, arithmetic: Arithmetic, files: Mapping[str, FileRecord], changed: Iterable[str]) -> Bake:
        reports = [f"{self.folder}/{name}" for name in coverage.REPORT_NAMES]
        paths = [*(item.path for item in self.items), *reports]
        done = tuple(files[path] for path in sorted(paths))
        return dataclasses.replace(self._made_by(arithmetic), files=done, changed=tuple(sorted(changed)))

    def _made_by(self, arithmetic: Arithmetic) -> Bake:
        return dataclasses.replace(self.stated, kernel=arithmetic.kernel, device=arithmetic.device)

    def entries(self, shard: BaseShard) -> Iterator[ShardEntry]:
        """The new shard for ``shard``: its tensors in order, with a FusedTensor for each touched one."""
        source = shard.file.path
        for info in shard.file.tensors.values():
            entry, place = stored_tensor(info.name, info, source), Range(source, info.start, info.nbytes)
            if info.name in self.input_scales:
                coded = stored(info.name.removesuffix(".weight"), CODES[self.form], info.shape)
                specs = tuple(TensorSpec(*spec) for spec in coded)
                entry = ShardEntry(specs, FusedTensor(place, self.form, self.input_scales[info.name]))
            elif info.name in self.touched:
                entry = dataclasses.replace(entry, producer=FusedTensor(place))
            yield entry

    def _config(self, base: bytes) -> bytes:
        config, path = parse_json(base, CONFIG), self.overlay / TRANSFORMER / CONFIG
        if not isinstance(config, dict):
            raise changed_file(path, "a JSON object", type(config).__name__)
        return json_bytes({**config, CODED: {"quant_method": f"ltxpack-{self.form}"}})

    def _index(self) -> bytes:
        entries = [(shard.name, entry) for shard in self.base.shards for entry in self.entries(shard)]
        files = {tensor.name: name for name, entry in entries for tensor in entry.tensors}
        return index_bytes(files, sum(entry.nbytes for _, entry in entries))

    def _provenance(self, shard: BaseShard) -> dict[str, str]:
        loras = [{"name": lora.name, "blake3": lora.blake3, "strength": lora.stated} for lora in self.recorded]
        form = {"ltxpack_format": self.form} if self.quantised else {}
        return {
            "format": "pt",
            "ltxpack_base_blake3": shard.record.blake3,
            "ltxpack_loras": json.dumps(loras, sort_keys=True),
            "ltxpack_rule": self.rule,
            **form,
        }
