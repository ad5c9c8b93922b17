"""Finds the LoRAs of a bake, fits them, and reads their bytes for the hash and for NaN.

A LoRA is the overlay's own, a file, a PEFT folder, or REPO/FILE on the hub. Needs no torch, so that torch can be
imported while the bytes are read.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from blake3 import blake3

from ltxpack.errors import AdapterError, OverlayError, SourceError, UsageError, listed, quoted
from ltxpack.files.reader import Range, RangeReader, hash_file
from ltxpack.files.tensorfile import TensorInfo, read_tensorfile
from ltxpack.lora_bake.adapter import (
    Adapter,
    AdapterFiles,
    Shapes,
    fit_adapter,
    open_adapter,
    refuse_model,
)
from ltxpack.lora_bake.locate import Located, locate
from ltxpack.lora_bake.plan import BakeOptions
from ltxpack.ltx23.classes import DISTILLED
from ltxpack.ltx23.lora_bases import SUPPORTED_BASE
from ltxpack.ltx23.lora_facts import read_facts
from ltxpack.manifest import BAKES, Lora, Manifest, changed_file
from ltxpack.materialize.access import Access
from ltxpack.reporter import Reporter

UNKNOWN_HASH = "0" * 64
BLOCK = 8 * 1024 * 1024

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
    """The fitted LoRAs in order of application: the added ones, then the main one; none for the base alone.

    Raises LtxpackError.
    """
    found = [_locate(text, shapes, options, True, reporter, headers_only) for text, _ in options.added]
    if options.base_alone and not manifest.loras:
        return []
    if options.lora is None:
        found.append(_own_lora(options, manifest, shapes))
    else:
        found.append(_locate(options.lora, shapes, options, False, reporter, headers_only))
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
    for note in adapter.notes if options.rule != "official" else ():  # it ignores alpha, and warns if that matters
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
        found = _fetched(
            locate(typed, access, functools.partial(command, [one for one in given if one != typed])), access
        )
        digests[typed] = hash_adapter(*found)
        files[digests[typed]] = found
    files |= {lora.file.blake3: (overlay / lora.file.path, None) for lora in manifest.loras}
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


def _fetched(place: Located, access: Access) -> AdapterFiles:
    """The files of ``place``, on this machine. Raises AdapterError for a model: before 29 GB of it are fetched."""
    if place.remote is not None:
        file, config = place.remote
        refuse_model(access.header(file))
        for needed in (config, file):
            if needed is not None:
                access.fetch(needed)
    return place.weights, place.config


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
    adapter = open_adapter(path, shapes, name=DISTILLED, allow_unmatched=options.allow_unmatched, files=(path, None))
    return FoundLora(adapter, lora)


def _locate(
    text: str, shapes: Shapes, options: BakeOptions, added: bool, reporter: Reporter, headers_only: bool
) -> FoundLora:
    access = Access(reporter)
    place = locate(text, access, lambda other: _command(options, text, other))
    if headers_only and place.remote is not None and place.config is None:
        head = access.header(place.remote[0])
        refuse_model(head)
        adapter = fit_adapter(head, shapes, read_facts(head, None, None), options.allow_unmatched)
        return FoundLora(replace(adapter, name=place.name), None, added, False)
    files, skip = _fetched(place, access), options.allow_unmatched
    adapter = open_adapter(place.weights, shapes, name=place.name, allow_unmatched=skip, files=files)
    return FoundLora(adapter, None, added)


def _command(options: BakeOptions, typed: str, other: str) -> str:
    added = tuple((other if file == typed else file, strength) for file, strength in options.added)
    return options.command(added=added, lora=other if options.lora == typed else options.lora)


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
    """Warn of targets that change nothing. ``order``: all tensors in the order of the file."""
    targets, name = adapter.targets, adapter.path.name
    idle = [weight for weight, target in targets.items() if target.is_idle(zero)]
    if not zero or not idle:
        return
    tail = len(order) - max((i + 1 for i, factor in enumerate(order) if factor not in zero), default=0)
    # Training starts only one factor of a pair from zeros.
    lost = any({info.name for info in targets[weight].tensors.values()}.issubset(zero) for weight in idle)
    half = f"; its last {tail} tensors are all zero, as in half a download" if lost and tail else ""
    if len(idle) == len(targets):
        reporter.warn(f"{name}: changes nothing: all {len(targets)} targets have a factor of zeros{half}")
    else:
        share = f"{len(idle)} of {len(targets)} targets"
        reporter.warn(f"{name}: {share} have a factor of zeros and change nothing: {listed(idle)}{half}")


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
