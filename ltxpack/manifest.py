"""The manifest (ltxpack.json): a frozen mirror of schemas/manifest.schema.json; read, validate, write.

It is the contract between the two halves. The reader does not trust it: it checks the schema, and that every path stays
inside the overlay and has an ending that an overlay may hold.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import stat
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from ltxpack.errors import OverlayError, SourceError, UsageError, one_line, quoted
from ltxpack.files import bounded_json
from ltxpack.files.tensorfile import MAX_INDEX_BYTES, open_source
from ltxpack.strength import BlockRun, Strength

if TYPE_CHECKING:
    import jsonschema

MANIFEST_NAME = "ltxpack.json"
FORMAT = 1
MAX_MANIFEST_BYTES = 16 * 1024 * 1024
# Four bakes of the 22B model make some 10,000 values and 150 containers, one for each file.
LIMITS = bounded_json.Limits(values=300_000, containers=20_000)
ALLOWED_ENDINGS = (".safetensors", ".json", ".jinja", ".txt", ".html")
BAKE_NAME = re.compile(r"[A-Za-z0-9._+-]+")
FULL_KIND, DISTILLED_KIND = "full", "distilled"
# The start of the name of a bake without LoRAs.
BASE_NAME = "base"
# The forms in which a bake stores its linears.
BF16, FP8, INT8 = FORMATS = ("bf16", "fp8", "int8")
# The arithmetic of fusing.
RULES = ("fp32", "official")
# The folders of bakes: transformers with LoRAs in them, and text encoders with their connectors.
BAKES, TEXT_ENCODERS = BAKED = ("bakes", "text_encoders")
RESERVED_BAKE_NAMES = frozenset({"auto", "base", ".", ".."})
# Fields that the first version did not know, and the values with which the file leaves them out.
LATER_FIELDS: dict[str, Any] = {
    "transformer_kind": None, "text_encoders": {}, "format": BF16, "quantised": (), "calibration": None, "blocks": (),
}  # fmt: skip


@dataclass(frozen=True)
class FileRecord:
    """One file of the overlay. ``link`` is None, ``"hard"``, or the relative target of a symlink."""

    path: str
    size: int
    blake3: str
    link: str | None = None

    @property
    def is_symlink(self) -> bool:
        """Whether the overlay holds a symlink at this path, and no bytes."""
        return self.link not in (None, "hard")


@dataclass(frozen=True)
class SourceFile:
    """An input file by name and content; ``release`` names the known release with this sha256."""

    role: str
    name: str
    size: int
    sha256: str | None = None
    release: str | None = None
    repo: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Source:
    """The inputs of the overlay and the largest size of its shards, for a repair."""

    repo: str | None
    revision: str | None
    files: tuple[SourceFile, ...]
    max_shard_size: int = 5_000_000_000


@dataclass(frozen=True)
class Component:
    """One diffusers-layout folder. ``cast`` lists tensors stored in another dtype than in the source."""

    library: str
    class_name: str
    files: tuple[FileRecord, ...]
    cast: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lora:
    """A LoRA file kept in the overlay."""

    name: str
    file: FileRecord


@dataclass(frozen=True)
class BakedLora:
    """One LoRA of a bake. ``scale`` is strength times alpha/rank if all targets have one value.

    ``blocks``: the blocks with another strength.
    """

    name: str
    file: str
    size: int
    blake3: str
    strength: float
    scale: float | None
    blocks: tuple[BlockRun, ...] = ()

    @property
    def applied(self) -> Strength:
        return Strength(self.strength, self.blocks)

    @property
    def stated(self) -> float | str:
        """The strength as other files state it: a number, or a text if it differs between blocks."""
        return str(self.applied) if self.blocks else self.strength

    @property
    def idle(self) -> bool:
        """Whether the LoRA adds nothing, because its strength is 0."""
        return self.applied.idle


@dataclass(frozen=True)
class Calibration:
    """The activations file behind a bake's input ``scales``, one for each quantised linear."""

    name: str
    blake3: str
    scales: tuple[float, ...]


@dataclass(frozen=True)
class Bake:
    """A complete folder made from the clean base, a transformer or a text path; ``loras`` in order of application.

    ``format``: the form of the ``quantised`` linears, named without ``.weight``. Without a ``calibration`` all their
    input scales are 1.
    """

    loras: tuple[BakedLora, ...]
    rule: str
    kernel: str
    device: str
    files: tuple[FileRecord, ...]
    changed: tuple[str, ...]
    format: str = BF16
    quantised: tuple[str, ...] = ()
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Manifest:
    """The contents of an overlay. ``transformer_kind`` is None in an overlay of an earlier version.

    ``text_encoders``: bakes of the text encoder and the connectors.
    """

    model_version: str
    image_crf: int
    licence: str | None
    source: Source
    components: Mapping[str, Component]
    loras: tuple[Lora, ...]
    files: tuple[FileRecord, ...]
    bakes: Mapping[str, Bake] = field(default_factory=dict)
    format: int = FORMAT
    transformer_kind: str | None = None
    text_encoders: Mapping[str, Bake] = field(default_factory=dict)

    @property
    def baked(self) -> dict[str, Bake]:
        """Every bake by its folder."""
        places = ((BAKES, self.bakes), (TEXT_ENCODERS, self.text_encoders))
        return {f"{place}/{name}": bake for place, bakes in places for name, bake in bakes.items()}

    @property
    def distilled(self) -> bool:
        """Whether the base is a distilled transformer; the name of its file decides if the manifest does not say."""
        if self.transformer_kind is not None:
            return self.transformer_kind == DISTILLED_KIND
        bases = (file for file in self.source.files if file.role == "checkpoint")
        return any(DISTILLED_KIND in (file.release or file.name) for file in bases)

    def records(self) -> Iterator[FileRecord]:
        """Every file of the overlay except the manifest itself."""
        yield from self.files
        for component in self.components.values():
            yield from component.files
        for lora in self.loras:
            yield lora.file
        for bake in self.baked.values():
            yield from bake.files

    def lora(self, name: str) -> Lora | None:
        return next((lora for lora in self.loras if lora.name == name), None)

    def with_bake(self, folder: str, bake: Bake) -> Manifest:
        """This manifest with ``bake`` added or replaced, in ``folder`` or, if that is a plain name, in bakes/."""
        return self.with_baked({**self.baked, folder if "/" in folder else f"{BAKES}/{folder}": bake})

    def with_baked(self, found: Mapping[str, Bake]) -> Manifest:
        """This manifest with only the bakes ``found``, by folder."""
        of = {
            place: {f.rpartition("/")[2]: found[f] for f in sorted(found) if f.startswith(f"{place}/")}
            for place in BAKED
        }
        return dataclasses.replace(self, bakes=of[BAKES], text_encoders=of[TEXT_ENCODERS])

    def in_place(self, root: Path) -> tuple[Manifest, tuple[str, ...]]:
        """This manifest without the bakes whose folders in ``root`` were removed; and these folders.

        A bake takes 38 GB, and whoever removes its folder means to do without it.
        """
        removed = tuple(folder for folder in self.baked if not (root / folder).is_dir())
        return self.with_baked({at: bake for at, bake in self.baked.items() if at not in removed}), removed

    def dump(self) -> bytes:
        """The file's bytes: the same manifest always gives the same bytes."""
        document = dataclasses.asdict(self, dict_factory=_without_later_fields)
        return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()


def _without_later_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if name not in LATER_FIELDS or value != LATER_FIELDS[name]}


def usual_name(loras: Iterable[tuple[str, Strength]], form: str) -> str:
    """``distilled-0.5+style-0.8-fp8``: the main (last) LoRA, then the others in order, and the form."""
    parts = [f"{lora}-{strength.in_name}" for lora, strength in loras]
    return ("+".join([*parts[-1:], *parts[:-1]]) or BASE_NAME) + ("" if form == BF16 else f"-{form}")


def is_overlay(folder: Path) -> bool:
    return (folder / MANIFEST_NAME).is_file()


def read_manifest(overlay: Path) -> Manifest:
    """The validated manifest of ``overlay``. Raises OverlayError naming the fault."""
    path = overlay / MANIFEST_NAME
    remake = f"ltxpack materialize SOURCE {quoted(overlay)}"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError
        if status.st_size > MAX_MANIFEST_BYTES:
            most = f"at most {MAX_MANIFEST_BYTES} bytes"
            raise OverlayError("too large", file=path, expected=most, found=status.st_size, next=f"{remake} --force")
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        expected = f"a folder with {MANIFEST_NAME}"
        raise OverlayError("is not an overlay", file=overlay, expected=expected, next=remake) from None
    except OSError as error:
        # The folder too: its permissions may forbid reading the file.
        look = f"ls -ld {quoted(overlay)} {quoted(path)}"
        raise OverlayError(f"cannot be read: {error.strerror or error}", file=path, next=look) from None
    return parse_manifest(data, path)


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """Manifest from JSON; ``path`` is only named in errors. Raises OverlayError."""
    try:
        return _parsed(data)
    except OverlayError as fault:
        remake = f"ltxpack materialize SOURCE {quoted(path.parent)} --force"
        expected, found = fault.expected, fault.found
        raise OverlayError(fault.problem, file=path, expected=expected, found=found, next=remake) from None


@functools.lru_cache(maxsize=4)
def _parsed(data: bytes) -> Manifest:
    """Manifest from JSON. A command reads the same one several times, and most of that time is the validator's."""
    try:
        document = bounded_json.parse(data, LIMITS)
    except bounded_json.JsonFault as error:
        raise OverlayError(str(error)) from None
    if isinstance(document, dict) and document.get("format") not in (None, FORMAT):
        problem = "was written by another version of ltxpack"
        raise OverlayError(problem, expected=f"format {FORMAT}", found=document["format"])
    fault = next(iter(_validator().iter_errors(document)), None)
    if fault is not None:
        where = "/".join(str(part) for part in fault.absolute_path) or "(top)"
        raise OverlayError(f"does not fit its schema at {where}: {fault.message[:300]}")
    manifest: Manifest = _build(Manifest, document)
    for problem, found in _faults(manifest):
        raise OverlayError(problem, found=found)
    return manifest


def printed_name(path: Path) -> str:
    """The name of a file outside the overlay as the manifest records it: printable, and the same in every locale."""
    return one_line(os.fsencode(path.name).decode("utf-8", "surrogateescape"))


def checked_bytes(manifest: Manifest, overlay: Path) -> bytes:
    """The file's bytes, if the next command can read them. Raises OverlayError before anything is replaced."""
    data = manifest.dump()
    try:
        if len(data) > MAX_MANIFEST_BYTES:
            raise OverlayError(f"is larger than {MAX_MANIFEST_BYTES} bytes", found=f"{len(data)} bytes")
        _parsed(data)
    except OverlayError as fault:
        problem = f"would get a {MANIFEST_NAME} that ltxpack cannot read: it {fault.problem}"
        advice = "make this in a new overlay; if that fails too, report it with this message"
        raise OverlayError(problem, file=overlay, found=fault.found, next=advice) from None
    return data


def changed_file(path: Path, expected: object, found: object) -> OverlayError:
    """The error for a file of an overlay that differs from the manifest."""
    problem = "has changed since the overlay was written"
    overlay = next((folder for folder in path.parents if is_overlay(folder)), path.parent)
    return OverlayError(problem, file=path, expected=expected, found=found, next=f"ltxpack verify {quoted(overlay)}")


def recorded_bytes(overlay: Path, record: FileRecord) -> bytes:
    """The bytes of a small file of ``overlay``. Raises OverlayError if they differ from the manifest."""
    path = overlay / record.path
    if record.size > MAX_INDEX_BYTES:
        raise changed_file(path, f"at most {MAX_INDEX_BYTES} bytes", f"{record.size} bytes")
    try:
        with open_source(path) as file:
            data = file.read(record.size + 1)
    except SourceError as error:
        raise changed_file(path, f"{record.size} bytes", error.problem) from None
    if len(data) != record.size or (digest := blake3(data).hexdigest()) != record.blake3:
        found = f"blake3 {digest}" if len(data) == record.size else "other bytes"
        raise changed_file(path, f"blake3 {record.blake3}", found)
    return data


def safe_relative_path(path: str) -> bool:
    """Whether ``path`` names a file strictly inside a folder: relative, normal, printable, no ``..``."""
    plain = path.isprintable() and "\\" not in path
    return plain and all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in path.split("/"))


@functools.cache
def load_schema(name: str) -> str:
    """The text of ``schemas/<name>.schema.json``: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).parent
    for folder in (package / "schemas", package.parent / "schemas"):
        path = folder / f"{name}.schema.json"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise OverlayError(f"schema {name} is missing from this installation", next="pip install --force-reinstall ltxpack")


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    """The schema's validator. Unlike in plain JSON Schema, 1.0 is not an integer."""
    import jsonschema

    plain = jsonschema.Draft202012Validator
    whole = plain.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    strict: type[jsonschema.Draft202012Validator]
    strict = jsonschema.validators.extend(plain, type_checker=whole)  # type: ignore[no-untyped-call]
    return strict(json.loads(load_schema("manifest")))


def _faults(manifest: Manifest) -> Iterator[tuple[str, str | None]]:
    """Problem and place of what the schema does not see: paths out of the overlay, fields that contradict others."""
    seen = {MANIFEST_NAME}
    for record in manifest.records():
        if not safe_relative_path(record.path) or not record.path.endswith(ALLOWED_ENDINGS):
            yield "names a file that an overlay may not hold", record.path
        if record.path in seen:
            yield "names a file twice", record.path
        seen.add(record.path)
        if record.is_symlink and not _link_stays_inside(record):
            yield "names a link that leaves the overlay", record.link
    for name, bake in manifest.baked.items():
        scales = len(bake.quantised) if bake.calibration is None else len(bake.calibration.scales)
        if scales != len(bake.quantised) or (bake.format == BF16) != (not bake.quantised):
            yield f"has a form, quantised linears and input scales of the bake {name} that do not go together", None
        if not all(_is_sound(lora.applied) for lora in bake.loras):
            yield f"has strengths of the bake {name} that are too large, overlap or are out of order", None


def _is_sound(strength: Strength) -> bool:
    try:
        return Strength.of(strength) == strength and all(run.first <= run.last for run in strength.blocks)
    except UsageError:
        return False


def _link_stays_inside(record: FileRecord) -> bool:
    assert record.link is not None
    target = os.path.normpath(PurePosixPath(record.path).parent / record.link)
    return not record.link.startswith("/") and record.link.isprintable() and safe_relative_path(target)


@functools.cache
def _fields(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _build(kind: Any, value: Any) -> Any:
    """``value``, already valid against the schema, as ``kind``: nested dataclasses, tuples and mappings."""
    origin = typing.get_origin(kind)
    if origin is types.UnionType and value is not None:
        return _build(typing.get_args(kind)[0], value)
    if dataclasses.is_dataclass(kind):
        fields = _fields(kind)  # type: ignore[arg-type]
        return kind(**{name: _build(fields[name], item) for name, item in value.items()})  # type: ignore[operator]
    if origin is tuple:
        return tuple(_build(typing.get_args(kind)[0], item) for item in value)
    if origin is not None and origin is not types.UnionType:
        return {key: _build(typing.get_args(kind)[1], item) for key, item in value.items()}
    return value
