"""An overlay that exists already: compares it with a plan, and writes its damaged files again.

The comparison reads neither the sources nor the overlay completely. Names, sizes and the hashes or commits of the
sources must agree. For a local file, which has only a name and a size, it compares a sample of each tensor with the
overlay: training changes a tensor everywhere, so a sample shows it. Only verify looks for damage.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from blake3 import blake3

from ltxpack.errors import SourceError, quoted
from ltxpack.files.reader import Range
from ltxpack.files.tensorfile import read_tensorfile
from ltxpack.ltx23.releases import CHECKPOINT, LORA, PATTERNS, TEXT_ENCODER, UPSAMPLER
from ltxpack.ltx23.renames import CHECKPOINT_TABLES
from ltxpack.manifest import Manifest, Source, SourceFile
from ltxpack.materialize.access import WEIGHTS, Access, InputFile, InputFolder, hub_folder
from ltxpack.materialize.checkpoint import read_upsampler
from ltxpack.materialize.hub.client import Hub
from ltxpack.materialize.hub.errors import RevisionGoneError
from ltxpack.materialize.parts import read_parts
from ltxpack.materialize.plan import (
    LORA_FOLDER,
    METADATA,
    OverlayPlan,
    plan_checkpoint,
    plan_metadata,
    plan_model_index,
    plan_scheduler,
    plan_text_encoder,
    plan_upsampler,
)
from ltxpack.materialize.sources import open_source_folder, part_of, with_comfyui
from ltxpack.materialize.text_encoder import read_text_encoder
from ltxpack.repack.items import Cast, Copied, CopyFile, Item, Producer, WriteBytes, WriteShard, sources
from ltxpack.repack.verify import repair
from ltxpack.reporter import Reporter

SAMPLE_BYTES = 512
# Folder of an overlay -> the input behind its files.
_ROLES = {
    **dict.fromkeys((*CHECKPOINT_TABLES, METADATA.split("/")[0]), CHECKPOINT),
    "latent_upsampler": UPSAMPLER,
    LORA_FOLDER: LORA,
    "text_encoder": TEXT_ENCODER,
    "tokenizer": TEXT_ENCODER,
}


def differences(plan: OverlayPlan, manifest: Manifest, overlay: Path) -> Iterator[str]:
    """Differences of ``overlay`` from the plan, in words: cheap checks first, the others only if those find none."""
    if (most := manifest.source.max_shard_size) != plan.stated.source.max_shard_size:
        yield f"it was made with --max-shard-size {most}"
    made_from, wanted = (_contents(made.source) for made in (manifest, plan.stated))
    if made_from != wanted:
        other = next((file for file in wanted if file not in made_from), None)
        what = "other inputs" if other is None else f"another {other.role.replace('_', ' ')} than {other.name}"
        yield f"it was made from {what}"
    planned = {item.path: item for item in plan.items()}
    bakes = {record.path for bake in manifest.baked.values() for record in bake.files}
    records = {record.path: record for record in manifest.records() if record.path not in bakes}
    if METADATA not in records:  # an overlay of an earlier version
        del planned[METADATA]
    for path in sorted(planned.keys() ^ records.keys()):
        yield f"{path} {'would be new' if path in planned else 'would go'}"
    for path, item in planned.items():
        if records[path].size != item.size:
            yield f"{path} has {records[path].size} bytes instead of {item.size}"
        if isinstance(item, WriteBytes) and blake3(item.data).hexdigest() != records[path].blake3:
            yield f"{path} would have other content"
        if plan.copy and records[path].link is not None:
            yield f"{path} is a link, and --copy asks for copies"
        if not os.path.lexists(overlay / path) or (overlay / path).lstat().st_size != item.size:
            yield f"{path} was changed or removed"
    for item in planned.values():
        if not plan.unproven & sources([item]).keys():
            continue
        if not all(_same(sample, overlay / item.path, start) for sample, start in _samples(item)):
            yield f"{item.path} was made from another file of the same name and size"


def _contents(source: Source) -> list[SourceFile]:
    """The inputs by content: where a file with a hash was found does not matter, nor whether its release was known."""
    return [replace(file, repo=None, revision=None, release=None) if file.sha256 else file for file in source.files]


def _samples(item: Item) -> Iterator[tuple[Producer, int]]:
    """Producers of some bytes of every tensor, or of a whole small file, each with its place in the overlay's file."""
    places: list[tuple[Copied | Cast, int, int]] = []
    if isinstance(item, CopyFile):
        infos = read_tensorfile(item.source).tensors.values() if item.path.endswith(WEIGHTS) else ()
        yield Copied(Range(item.source, 0, min((info.start for info in infos), default=item.size))), 0
        places = [(Copied(Range(item.source, info.start, info.nbytes)), info.start, info.nbytes) for info in infos]
    elif isinstance(item, WriteShard):
        starts = itertools.accumulate((entry.nbytes for entry in item.entries), initial=len(item.header))
        pairs = zip(item.entries, starts, strict=False)
        places = [(made, at, entry.nbytes) for entry, at in pairs if isinstance(made := entry.producer, Copied | Cast)]
    for producer, written, size in places:
        path, start, nbytes = producer.source
        # A multiple of 8: no element is cut.
        middle = nbytes // 16 * 8 if nbytes > 2 * SAMPLE_BYTES else 0
        part = Range(path, start + middle, min(SAMPLE_BYTES, nbytes))
        yield replace(producer, source=part), written + middle * size // max(1, nbytes)


def _same(sample: Producer, path: Path, start: int) -> bool:
    """Whether ``path`` holds the bytes of ``sample`` from ``start`` on."""
    [wanted] = sample.ranges
    try:
        with wanted.path.open("rb") as source, path.open("rb") as written:
            if os.path.sameopenfile(source.fileno(), written.fileno()):
                return True
            source.seek(wanted.start)
            written.seek(start)
            made = b"".join(sample.make(iter([memoryview(source.read(wanted.nbytes))])))
            return made == written.read(len(made))
    except OSError:
        return False


def restore_base(
    overlay: Path,
    manifest: Manifest,
    paths: Collection[str],
    reporter: Reporter,
    *,
    source: str | None = None,
    hub: Hub | None = None,
) -> None:
    """Write ``paths`` of ``overlay``, which belong to no bake, again from the inputs that the manifest records.

    ``source`` is a folder, file or repo to look in first, as for ``materialize``; other inputs come from the repo and
    revision that the manifest states for each, or from the newest one if that is gone. It fetches only the inputs of
    ``paths``. Raises LtxpackError: SourceError for an input that is not found, OverlayError if a result differs from
    the manifest.
    """
    access = Access(reporter, hub)
    folder, single = (None, None) if source is None else open_source_folder(source, None, access)
    found: dict[str, dict[str, InputFile]] = {}
    for role in sorted({_ROLES[place] for place in (path.split("/")[0] for path in paths) if place in _ROLES}):
        recorded = [file for file in manifest.source.files if file.role == role]
        if role == CHECKPOINT and single is not None and len(recorded) == 1:
            found[role] = {recorded[0].name: single}
        elif role == CHECKPOINT and len(recorded) > 1:  # in folders or repos of their own
            wider = with_comfyui(folder) if folder and folder.repo is None else folder
            each = (_find_recorded(role, [file], wider, access, overlay, paths) for file in recorded)
            found[role] = {name: file for one in each for name, file in one.items()}
        else:
            found[role] = _find_recorded(role, recorded, folder, access, overlay, paths)
    items = [item for item in _items_again(paths, manifest, found, access) if item.path in paths]
    lost = sorted(set(paths) - {item.path for item in items})
    if lost:
        problem = "the inputs do not make these files of the overlay"
        raise SourceError(problem, file=overlay, items=lost, next=_name_the_source(overlay))
    needed = sources(items)
    for file in (file for files in found.values() for file in files.values() if file.path in needed):
        access.fetch(file)
    linked = any(record.link == "hard" for record in replace(manifest, bakes={}).records())
    repair(items, overlay, manifest, reporter, copy=not linked)


def _items_again(
    paths: Collection[str], manifest: Manifest, found: Mapping[str, Mapping[str, InputFile]], access: Access
) -> Iterator[Item]:
    """The plan's items for ``paths``, and others from the same inputs. ``found``: role -> name -> file."""
    limit = manifest.source.max_shard_size
    if files := found.get(CHECKPOINT):
        checkpoint = read_parts([part_of(file, access) for file in files.values()])
        yield plan_metadata(checkpoint)
        for component in plan_checkpoint(checkpoint, limit):
            yield from component.items
    for file in found.get(UPSAMPLER, {}).values():
        yield from plan_upsampler(read_upsampler(access.header(file), None, file.label), file, limit).items
    yield from plan_scheduler(manifest.distilled).items
    yield plan_model_index()
    texts = found.get(TEXT_ENCODER, {})
    of_text = manifest.components[TEXT_ENCODER].files if texts else ()
    sizes = {record.path.rpartition("/")[2]: record.size for record in of_text}
    as_they_are = all(name in texts and texts[name].size == size for name, size in sizes.items())
    if texts and not as_they_are:
        encoder = read_text_encoder(InputFolder("the text encoder", texts), access, None)
        yield from plan_text_encoder(encoder, limit)[0].items
    for path in sorted(paths):
        place, _, name = path.rpartition("/")
        role = _ROLES.get(place)
        if role in (LORA, TEXT_ENCODER) and name in found[role] and (place != TEXT_ENCODER or as_they_are):
            yield CopyFile(path, found[role][name].path, found[role][name].size)


def _find_recorded(
    role: str,
    recorded: Sequence[SourceFile],
    folder: InputFolder | None,
    access: Access,
    overlay: Path,
    paths: Collection[str],
) -> dict[str, InputFile]:
    """The inputs of ``role`` by recorded name: in ``folder`` if given, else on the hub. Raises SourceError."""
    if not recorded:
        raise SourceError(f"was made without a {role}", file=overlay)
    first = recorded[0]
    found = _all_of(recorded, folder) or _renamed(role, recorded, folder) if folder else None
    if found is None and first.repo is not None:
        try:
            folder = hub_folder(first.repo, first.revision, access)
        except RevisionGoneError:
            folder = hub_folder(first.repo, None, access)
        found = _all_of(recorded, folder)
    if found is not None:
        return found
    files = [f"{file.name}, {file.size} bytes" for file in recorded]
    refused = functools.partial(SourceError, next=_name_the_source(overlay))
    if folder is None:
        problem, expected = "was made from local files; a repair needs to know where they are", ", ".join(files)
        raise refused(problem, file=overlay, expected=f"the {role}: {expected}", items=sorted(paths))
    raise refused(f"does not hold the {role} that the overlay was made from", file=folder.label, items=files)


def _name_the_source(overlay: Path) -> str:
    return f"ltxpack verify {quoted(overlay)} --repair --source FOLDER"


def _all_of(recorded: Collection[SourceFile], folder: InputFolder) -> dict[str, InputFile] | None:
    """The recorded files, if one folder within ``folder`` holds them all: by name, size, and hash if both are known."""
    for inner in sorted({name.rpartition("/")[0] for name in folder.files}):
        prefix = f"{inner}/" if inner else ""
        found = {file.name: folder.files.get(prefix + file.name) for file in recorded}
        if all(_is_recorded(found[file.name], file) for file in recorded):
            return {name: file for name, file in found.items() if file is not None}
    return None


def _renamed(role: str, recorded: Sequence[SourceFile], folder: InputFolder) -> dict[str, InputFile] | None:
    """The one recorded file under another name: the only one of its size, or of several the one with a usual name."""
    same = [file for file in folder.files.values() if _is_recorded(file, recorded[0])]
    usual = [file for file in same if fnmatch.fnmatchcase(file.name.lower(), PATTERNS.get(role, "*"))]
    found = same if len(same) == 1 else usual
    return {recorded[0].name: found[0]} if len(recorded) == len(found) == 1 else None


def _is_recorded(file: InputFile | None, recorded: SourceFile) -> bool:
    known = file is not None and None not in (file.sha256, recorded.sha256)
    return file is not None and file.size == recorded.size and (not known or file.sha256 == recorded.sha256)
