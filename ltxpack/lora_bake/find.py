"""Finds the LoRAs of a bake, fits them, and reads their bytes for the hash and for NaN.

A LoRA is the overlay's own, a file, a PEFT folder, or REPO/FILE on the hub. Needs no torch, so that torch can be
imported while the bytes are read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from blake3 import blake3

from ltxpack.errors import AdapterError, LtxpackError, OverlayError, SourceError, UsageError, listed, quoted
from ltxpack.files.foreign import refuse_unfinished
from ltxpack.files.reader import Range, RangeReader, hash_file
from ltxpack.files.tensorfile import TensorFile, TensorInfo, read_tensorfile
from ltxpack.files.typed import at_home, denied, similar_names, similar_paths
from ltxpack.lora_bake.adapter import Adapter, AdapterFiles, Shapes, fit_adapter, open_adapter, refuse_model
from ltxpack.lora_bake.plan import BakeOptions, lora_name
from ltxpack.ltx23.classes import DISTILLED
from ltxpack.ltx23.lora_facts import SUPPORTED_BASE, read_facts
from ltxpack.ltx23.lora_statements import PEFT_CONFIG, PEFT_WEIGHTS, configuration_among, configuration_beside
from ltxpack.manifest import BAKES, Lora, Manifest, changed_file
from ltxpack.materialize.access import WEIGHTS, Access, InputFile, InputFolder, hub_folder, hub_reference
from ltxpack.materialize.checkpoint import read_lora
from ltxpack.materialize.hub.errors import Reference
from ltxpack.reporter import Reporter

UNKNOWN_HASH = "0" * 64
BLOCK = 8 * 1024 * 1024
# The most files on the hub whose headers are fetched.
MOST_HEADERS = 10
EXPECTED = "a file, a folder with one LoRA, REPO/FILE on the hub, or the address of its page there"

# A value is NaN or infinite exactly if its bits without the sign are at least these; F8_E4M3 has no infinity, and one
# NaN per sign.
_NOT_FINITE: Mapping[str, tuple[type[np.unsignedinteger], int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E4M3": (np.uint8, 0x7F),
    "F8_E5M2": (np.uint8, 0x7C),
}
_CHECKED = 1 << 17  # elements checked together, which stay in a core's cache


@dataclass(frozen=True)
class FoundLora:
    """A LoRA that fits. ``own`` is the overlay's record of its own LoRA, else None.

    ``added``: a LoRA of ``--add``, stacked below another. ``here`` is False if only its header was fetched.
    """

    adapter: Adapter
    own: Lora | None = None
    added: bool = False
    here: bool = True

    def digest(self, reporter: Reporter | None) -> str:
        """The hash of its content, UNKNOWN_HASH if only its header is here. With a ``reporter`` it reads all values.

        Raises AdapterError for NaN, OverlayError if the overlay's own changed.
        """
        recorded = None if self.own is None else self.own.file.blake3
        if reporter is not None:
            return scan(self.adapter, reporter, recorded)
        return recorded or (hash_adapter(self.adapter.path, self.adapter.config) if self.here else UNKNOWN_HASH)

    def named(self, digest: str, manifest: Manifest, options: BakeOptions) -> Adapter:
        """The adapter by its part of a bake's name: ``distilled`` for the distilled LoRA, else its file's stem.

        Raises UsageError for another file with that name: its bakes would take the names of the overlay's own.
        """
        own = manifest.lora(DISTILLED)
        if own is not None and own.file.blake3 == digest and not self.added:
            return replace(self.adapter, name=DISTILLED)
        names_bakes = not (self.own or self.added or options.name)
        if self.adapter.name == DISTILLED and names_bakes and digest != UNKNOWN_HASH:
            raise UsageError(
                f"a LoRA file called {DISTILLED} gives no name: {DISTILLED}-S are bakes of the overlay's own LoRA",
                file=self.adapter.path,
                expected="a file of another name, or --name",
                next="the same command with --name NAME, and one --strength at a time",
            )
        return self.adapter


def find_loras(
    options: BakeOptions, manifest: Manifest, shapes: Shapes, reporter: Reporter, headers_only: bool = False
) -> list[FoundLora]:
    """The fitted LoRAs in order of application: the added ones, then the main one if there must be one.

    Raises LtxpackError.
    """
    access = Access(reporter)

    def named(typed: str, added: bool) -> FoundLora:
        """The LoRA that ``typed`` names; on the hub only its header, if that is enough."""
        place = locate(typed, access, lambda other: _command(options, typed, other))
        if headers_only and place.remote is not None and place.config is None:
            head = access.header(place.remote[0])
            refuse_model(head)
            facts = read_facts(head, None, None)
            adapter = fit_adapter(head, shapes, facts, place.name, options.allow_unmatched).by(options.rule)
            return FoundLora(adapter, None, added, here=False)
        _fetch(place, access)
        return FoundLora(open_adapter(place, shapes, options.allow_unmatched, options.rule), None, added)

    found = [named(typed, True) for typed, _ in options.added]
    if manifest.loras or not options.without_main:
        found.append(_own_lora(options, manifest, shapes) if options.lora is None else named(options.lora, False))
    for lora in found:
        _tell(lora.adapter, options, reporter)
    return found


def _tell(adapter: Adapter, options: BakeOptions, reporter: Reporter) -> None:
    """Notes and warnings of an adapter before the bake. Raises AdapterError for one of another model."""
    if adapter.foreign and not options.force:
        raise AdapterError(
            "says that it was made for another model", file=adapter.path, expected=SUPPORTED_BASE,
            found=adapter.foreign, next=f"{options.command(force=True)} (bakes it anyway)",
        )  # fmt: skip
    if adapter.foreign:
        reporter.warn(f"{adapter.path.name}: says that it was made for another model ({adapter.foreign})")
    dora = ["DoRA; the strength scales its direction, not its magnitudes"] if adapter.dora else []
    for note in (*adapter.notes, *dora):
        reporter.note(f"{adapter.path.name}: {note}")
    for warning in adapter.warnings:
        reporter.warn(f"{adapter.path.name}: {warning}")


def recorded_files(
    overlay: Path, manifest: Manifest, folders: Sequence[str], given: Sequence[str], reporter: Reporter
) -> dict[str, AdapterFiles]:
    """The LoRAs that the overlay keeps and those that ``given`` names, as for a bake, by blake3.

    Raises SourceError for a LoRA of the bakes in ``folders`` that is not among them.
    """

    def command(loras: Sequence[str], *more: str) -> str:
        flags = (f"--lora {quoted(lora)}" for lora in (*loras, *more))
        return " ".join([f"ltxpack verify {quoted(overlay)} --repair", *flags])

    access = Access(reporter)
    files: dict[str, AdapterFiles] = {}
    digests: dict[str, str] = {}
    for typed in given:
        place = locate(typed, access, partial(command, [one for one in given if one != typed]))
        _fetch(place, access)
        digests[typed] = hash_adapter(place.weights, place.config)
        files[digests[typed]] = place
    files |= {lora.file.blake3: AdapterFiles(lora.name, overlay / lora.file.path) for lora in manifest.loras}
    used = {lora.blake3 for bake in manifest.baked.values() for lora in bake.loras}
    unknown = [f"{typed} (blake3 {digest[:8]})" for typed, digest in digests.items() if digest not in used]
    for folder in folders:
        missing = {lora.blake3: lora for lora in manifest.baked[folder].loras if lora.blake3 not in files}.values()
        if not missing:
            continue
        problem = f"the LoRA of the bake {folder.removeprefix(f'{BAKES}/')} is needed to repair it"
        # The next command repeats the files that match: without them it would miss those instead.
        again = command([typed for typed, digest in digests.items() if digest in used])
        raise SourceError(
            f"{problem}, and a file given does not match" if unknown else problem,
            file=overlay,
            expected=", ".join(f"{lora.file} (blake3 {lora.blake3[:8]})" for lora in missing) if unknown else None,
            found=", ".join(unknown) if unknown else None,
            items=[f"{lora.file} (blake3 {lora.blake3})" for lora in missing],
            next=" ".join([again, *["--lora FILE"] * len(missing)]),
        )
    return files


def _fetch(place: AdapterFiles, access: Access) -> None:
    """Fetch files that are on the hub. Raises AdapterError for a model: before 29 GB of it are fetched."""
    if place.remote is not None:
        file, config = place.remote
        refuse_model(access.header(file))
        for needed in (config, file):
            if needed is not None:
                access.fetch(needed)


def _own_lora(options: BakeOptions, manifest: Manifest, shapes: Shapes) -> FoundLora:
    """The overlay's distilled LoRA. Raises OverlayError if it holds none."""
    overlay = options.overlay
    lora = manifest.lora(DISTILLED) or (manifest.loras[0] if len(manifest.loras) == 1 else None)
    if lora is None:
        names = [lora.name for lora in manifest.loras]
        raise OverlayError("holds no distilled LoRA", file=overlay, items=names, next=options.command(lora="FILE"))
    path = overlay / lora.file.path
    if not path.is_file() or path.stat().st_size != lora.file.size:
        problem = "is missing or has changed since the overlay was written"
        raise OverlayError(problem, file=path, next=f"ltxpack verify {quoted(overlay)}")
    # A file beside the overlay's own LoRA is not its configuration.
    return FoundLora(open_adapter(AdapterFiles(DISTILLED, path), shapes, options.allow_unmatched, options.rule), lora)


def _command(options: BakeOptions, typed: str, other: str) -> str:
    added = tuple((other if file == typed else file, strength) for file, strength in options.added)
    return options.command(added=added, lora=other if options.lora == typed else options.lora)


# Where a LoRA is


def locate(typed: str, access: Access, again: Callable[[str], str]) -> AdapterFiles:
    """The LoRA that ``typed`` names; a path that exists wins over the hub. ``again``: the command that names another.

    Raises SourceError, with similar names, or for half a download; UsageError for a text that names no place.
    """
    path = at_home(typed)
    if os.path.exists(path):  # noqa: PTH110 (a Path raises for a name that is too long)
        return _here(path, again)
    reference = hub_reference(typed)
    if reference is None:
        similar = similar_paths(path)
        advice = again(similar[0]) if similar else None
        raise SourceError(denied(path) or "no such LoRA", file=typed, expected=EXPECTED, items=similar, next=advice)
    return _on_hub(reference, typed, access, again)


def _here(path: Path, again: Callable[[str], str]) -> AdapterFiles:
    if problem := denied(path):
        raise SourceError(problem, file=path)
    if path.is_dir() and not (path / PEFT_WEIGHTS).is_file():
        only = _only_one(path, again)
        found = _here(only, again)
        return replace(found, name=lora_name(only.resolve().parent.name)) if only.name == PEFT_WEIGHTS else found
    weights = path / PEFT_WEIGHTS if path.is_dir() else path
    config = configuration_beside(weights)
    if path.is_dir() and config is None:
        raise SourceError("is a PEFT folder without its configuration", file=path, expected=PEFT_CONFIG)
    refuse_unfinished(weights)
    name = path.resolve().name if path.is_dir() else path.stem
    return AdapterFiles(lora_name(name), weights, config)


def _only_one(folder: Path, again: Callable[[str], str]) -> Path:
    """The only LoRA in ``folder``, or in its subfolders if it holds no weights itself."""
    for pattern in ("*", "*/*"):
        files = sorted(path for path in folder.glob(pattern) if path.name.lower().endswith(WEIGHTS) and path.is_file())
        if files:
            break
    loras = [path for path in files if _is_lora(partial(read_tensorfile, path))]
    if len(loras) == 1:
        return loras[0]
    if not files:
        raise SourceError("is a folder without a LoRA", file=folder, expected=f"a {WEIGHTS} file in it")
    problem = "is a folder with several LoRAs" if loras else "is a folder whose files are no LoRAs"
    raise SourceError(problem, file=folder, items=loras or files, next=again(str(loras[0])) if loras else None)


def _is_lora(header: Callable[[], TensorFile]) -> bool:
    with contextlib.suppress(LtxpackError):
        return read_lora(header()).is_lora
    return False


def _on_hub(reference: Reference, typed: str, access: Access, again: Callable[[str], str]) -> AdapterFiles:
    """The named file, the adapter in a folder of the repo, or the only LoRA there."""
    repo, member = hub_folder(reference.repo, reference.revision, access, at_home(typed)), reference.file
    start = reference.repo if reference.revision is None else f"{reference.repo}@{reference.revision}"
    names = [name for name in sorted(repo.files) if name.endswith(WEIGHTS)]
    found = repo if member is None else repo.find(member)
    if isinstance(found, InputFolder):
        loras = _loras(found.files, access)
        if len(loras) != 1:
            listed = [file.member for file in loras] or names
            problem = "names a repo or folder with several or no LoRA files"
            advice = again(f"{start}/{listed[0]}") if loras else None
            raise SourceError(problem, file=typed, items=listed, next=advice)
        [found] = loras
    if found is None or found.member not in names:
        if member in access.listed(reference.repo, reference.revision):
            raise SourceError("is not a .safetensors file", file=typed)
        close = similar_names(member or "", names)
        advice = again(f"{start}/{close[0]}") if close else None
        raise SourceError(f"is not in {reference.repo}", file=member or typed, items=close or names, next=advice)
    config = repo.files.get(configuration_among(repo.files, found.member))
    # All PEFT files have the same name, so the folder or repo names the LoRA.
    label = PurePosixPath(found.label)
    name = lora_name(label.parent.name if label.name == PEFT_WEIGHTS else label.stem)
    return AdapterFiles(name, found.path, None if config is None else config.path, (found, config))


def _loras(files: Mapping[str, InputFile], access: Access) -> list[InputFile]:
    """The possible files of a folder: PEFT's, the only one, else those whose headers are those of LoRAs."""
    weights = {name: file for name, file in files.items() if name.endswith(WEIGHTS)}
    if PEFT_WEIGHTS in weights:
        return [weights[PEFT_WEIGHTS]]
    own = [file for name, file in weights.items() if "/" not in name] or list(weights.values())
    if not 1 < len(own) <= MOST_HEADERS:
        return own
    return [file for file in own if _is_lora(partial(access.header, file))]


# The bytes


def hash_adapter(weights: Path, config: Path | None) -> str:
    """blake3 of the weights, and of a PEFT configuration if there is one. Raises SourceError or FormatError."""
    return _with_config(hash_file(weights), config)


def scan(adapter: Adapter, reporter: Reporter, recorded: str | None = None) -> str:
    """The adapter's hash as in :func:`hash_adapter`, with a check of every factor.

    Warns of targets whose tensors are zero. Raises AdapterError listing the tensors that hold NaN or infinity,
    OverlayError for another hash than ``recorded``.
    """
    parts, hasher = list(_parts(adapter)), blake3()
    largest: dict[str, int] = {}
    bad: dict[str, None] = {}
    reporter.begin(f"read {adapter.path.name}", adapter.size, "B")
    # Through the page cache: the bake reads the factors again.
    with RangeReader([part for part, _ in parts], direct=False) as reader:
        for (_, factor), data in zip(parts, reader, strict=True):
            hasher.update(data)
            reporter.advance(len(data))
            if factor is not None:
                bits = largest_bits(data, factor.dtype)
                largest[factor.name] = max(bits, largest.get(factor.name, 0))
                if bits >= _NOT_FINITE[factor.dtype][1]:
                    bad[factor.name] = None
    reporter.end()
    if bad:
        raise AdapterError(f"holds NaN or infinity in {len(bad)} tensors", file=adapter.path, items=list(bad))
    digest = _with_config(hasher.hexdigest(), adapter.config)
    if recorded not in (None, digest):
        raise changed_file(adapter.path, f"blake3 {recorded}", f"blake3 {digest}")
    _tell_zeros(adapter, [name for name, bits in largest.items() if bits == 0], list(largest), reporter)
    return digest


def _tell_zeros(adapter: Adapter, zero: Collection[str], order: Sequence[str], reporter: Reporter) -> None:
    """Warn of targets that change nothing or erase a weight. ``order``: all tensors in the order of the file."""
    targets, name = adapter.targets, adapter.path.name
    idle = [weight for weight, target in targets.items() if target.is_idle(zero)]
    erased = [weight for weight, target in targets.items() if target.erases(zero)]
    if not zero or not (idle or erased):
        return
    tail = len(order) - max((i + 1 for i, factor in enumerate(order) if factor not in zero), default=0)
    # Training starts only one factor of a pair from zeros.
    lost = any({info.name for info in targets[weight].tensors.values()}.issubset(zero) for weight in (*idle, *erased))
    half = f"; its last {tail} tensors are all zero, as in half a download" if lost and tail else ""
    if len(idle) == len(targets):
        reporter.warn(f"{name}: changes nothing: all {len(targets)} targets have a factor of zeros{half}")
    elif idle:
        share = f"{len(idle)} of {len(targets)} targets"
        reporter.warn(f"{name}: {share} have a factor of zeros and change nothing: {listed(idle)}{half}")
    if erased:
        share = f"{len(erased)} of {len(targets)} targets make their weights zero"
        reporter.warn(f"{name}: {share}, by a magnitude or a new weight of zeros: {listed(erased)}{half}")


def _parts(adapter: Adapter) -> Iterator[tuple[Range, TensorInfo | None]]:
    """All bytes of an adapter's file in order, BLOCK at a time; for a factor's bytes also the factor."""
    wanted = {info.name for target in adapter.targets.values() for info in target.tensors.values()}
    factors = [info for info in read_tensorfile(adapter.path).tensors.values() if info.name in wanted]
    ends = [end for info in factors for end in ((info.start, None), (info.start + info.nbytes, info))]
    position = 0
    for end, factor in (*ends, (adapter.size, None)):
        for start in range(position, end, BLOCK):
            yield Range(adapter.path, start, min(BLOCK, end - start)), factor
        position = end


def largest_bits(data: memoryview, dtype: str) -> int:
    """The bits of the largest absolute value in ``data``: 0 if all are zero. Bits without sign order as values do."""
    kind, _ = _NOT_FINITE[dtype]
    bits, mask = np.frombuffer(data, kind), kind(np.iinfo(kind).max >> 1)
    unsigned = np.empty(min(_CHECKED, bits.size), kind)
    parts = (bits[start : start + _CHECKED] for start in range(0, bits.size, _CHECKED))
    return max((int(np.bitwise_and(part, mask, out=unsigned[: part.size]).max()) for part in parts), default=0)


def _with_config(digest: str, config: Path | None) -> str:
    """The hash with a PEFT configuration included, because it determines the scale."""
    return digest if config is None else hash_file(config, before=bytes.fromhex(digest))
