"""``bake-lora``: finds the LoRAs, plans the bakes, streams the base once for all of them, publishes by rename.

Bakes start from the clean base, never from one another. Until all of a bake is on the disk nothing of it is at its
place; the manifest that names it is written last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltxpack.errors import AdapterError, DeviceError, OverlayError, UsageError, quoted
from ltxpack.lora_bake.adapter import Adapter, open_adapter
from ltxpack.lora_bake.base import BaseTransformer, read_base, refuse_links
from ltxpack.lora_bake.coverage import AppliedLora, BakeReport
from ltxpack.lora_bake.job import BAKES, UNKNOWN_HASH, Arithmetic, Job, baked_lora
from ltxpack.lora_bake.names import bake_name, check_bake_name, check_strength, format_strength
from ltxpack.lora_bake.reading import hash_adapter
from ltxpack.lora_bake.resolve import Found, find_lora, own_lora
from ltxpack.lora_bake.scan import scan
from ltxpack.ltx23.classes import DISTILLED
from ltxpack.manifest import Bake, Manifest, changed_file, read_manifest
from ltxpack.repack.lock import OverlayLock
from ltxpack.repack.staging import publish_bakes, recover
from ltxpack.repack.write import preflight
from ltxpack.reporter import Reporter

if TYPE_CHECKING:
    from ltxpack.lora_bake.work import BakeWork

RULES = ("fp32", "official")
DEVICES = ("auto", "cpu", "cuda")


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
        flags = [f"--strength {format_strength(strength)}" for strength in wanted.strengths or (1.0,)]
        flags += [f"--lora {quoted(wanted.lora)}"] if wanted.lora is not None else []
        flags += [f"--add {quoted(f'{file}={format_strength(strength)}')}" for file, strength in wanted.added]
        flags += [f"--rule {wanted.rule}"] if wanted.rule != "fp32" else []
        flags += [f"--name {quoted(wanted.name)}"] if wanted.name is not None else []
        flags += [f"--device {wanted.device}"] if wanted.device != "auto" else []
        flags += [flag for flag, on in (("--allow-unmatched", wanted.allow_unmatched), ("--force", wanted.force)) if on]
        return " ".join(["ltxpack bake-lora", quoted(wanted.overlay), *flags])


@dataclass(frozen=True)
class _Lora:
    """A LoRA that fits, by content; ``name`` is its part of a bake's name."""

    name: str
    adapter: Adapter
    digest: str


def plan_bake(options: BakeOptions, reporter: Reporter) -> dict[str, Any]:
    """What ``bake`` would write: every file with its size, ``write`` or ``link``. Nothing is written or fetched.

    ``total_bytes`` is the sum of all sizes, ``written_bytes`` without the links. Raises what ``bake`` raises before it
    writes; of a LoRA on the hub only the header is read, so what needs its content (NaN, other inputs) is not seen.
    """
    options = _checked(options)
    manifest = read_manifest(options.overlay)
    base = read_base(options.overlay, manifest)
    places = _find(options, manifest, reporter, headers_only=True)
    loras = [_fitted(place, base, options, manifest) for place in places]
    jobs = _jobs(options, base, loras)
    if all(place.path for place in places):
        jobs = [job for job in jobs if options.force or not _is_there(job, manifest.bakes.get(job.name))]
        _refuse_other_inputs(jobs, manifest, options)
    arithmetic = _arithmetic(options, [lora.adapter for lora in loras])
    files = [file for job in jobs for file in job.plan(arithmetic)]
    written = sum(file["bytes"] for file in files if file["action"] == "write")
    total = sum(file["bytes"] for file in files)
    return {"files": files, "missing": [], "total_bytes": total, "written_bytes": written}


def bake(options: BakeOptions, reporter: Reporter) -> list[BakeReport]:
    """Make the bakes; those that are there already, from the same inputs, are left alone and said to be.

    Raises UsageError, SourceError, FormatError, AdapterError (a LoRA that does not fit, or a result that overflows),
    OverlayError (in use, changed, exists from other inputs, no space) or DeviceError. The overlay stays valid.
    """
    options = _checked(options)
    with OverlayLock(options.overlay) if options.overlay.is_dir() else contextlib.nullcontext() as lock:
        read_manifest(options.overlay)
        assert lock is not None
        refuse_links(options.overlay, [options.overlay / BAKES])
        recover(options.overlay, reporter)
        manifest = read_manifest(options.overlay)
        base = read_base(options.overlay, manifest)
        found = _find(options, manifest, reporter)
        if all(place.own for place in found) and not options.force:
            known = [_fitted(place, base, options, manifest) for place in found]
            jobs = _jobs(options, base, known)
            if all(_is_there(job, manifest.bakes.get(job.name)) for job in jobs):
                return [_told(job, manifest.bakes[job.name]) for job in jobs]
        # Importing torch takes as long as reading a LoRA: on another thread, one hides the other.
        threading.Thread(target=importlib.import_module, args=("torch",)).start()
        loras = [_scanned(place, base, options, manifest, reporter) for place in found]
        jobs = _jobs(options, base, loras)
        new = [job for job in jobs if options.force or not _is_there(job, manifest.bakes.get(job.name))]
        _refuse_other_inputs(new, manifest, options)
        refuse_links(options.overlay, [options.overlay / job.folder for job in new])
        chosen = _arithmetic(options, [lora.adapter for lora in loras]) if new else None
        made = _make(new, chosen, reporter, lock) if chosen else {}
        return [made.get(job.name) or _told(job, manifest.bakes[job.name]) for job in jobs]


def _checked(options: BakeOptions) -> BakeOptions:
    """The options with everything wrong about them refused; equal strengths count once."""
    if not options.strengths:
        raise UsageError("needs a strength", next=options.command(strengths=(1.0,)))
    for value, known, flag in ((options.rule, RULES, "--rule"), (options.device, DEVICES, "--device")):
        if value not in known:
            raise UsageError(f"{flag} is unknown", expected=" or ".join(known), found=value)
    strengths = tuple(dict.fromkeys(check_strength(strength) for strength in options.strengths))
    added = tuple((file, check_strength(strength)) for file, strength in options.added)
    if options.name is not None:
        check_bake_name(options.name)
        if len(options.strengths) > 1:
            raise UsageError("--name goes with one strength", found=f"{len(options.strengths)} strengths")
    return dataclasses.replace(options, strengths=strengths, added=added)


def _find(options: BakeOptions, manifest: Manifest, reporter: Reporter, headers_only: bool = False) -> list[Found]:
    """The LoRAs in order of application: the added ones, then the main one."""
    places = [find_lora(text, reporter, headers_only=headers_only) for text, _ in options.added]
    added = [dataclasses.replace(place, added=True) for place in places]
    if options.lora is None:
        return [*added, own_lora(options.overlay, manifest)]
    return [*added, find_lora(options.lora, reporter, headers_only=headers_only)]


def _fitted(found: Found, base: BaseTransformer, options: BakeOptions, manifest: Manifest) -> _Lora:
    """The LoRA fitted, known by what the manifest says of the overlay's own, by hashing any other that is here."""
    adapter = found.adapter(base.shapes, options.allow_unmatched)
    if found.own:
        return _Lora(found.name, adapter, found.own.file.blake3)
    digest = hash_adapter(adapter.path, adapter.config) if found.path else UNKNOWN_HASH
    return _Lora(_name(found, manifest, digest, options), adapter, digest)


def _scanned(
    found: Found, base: BaseTransformer, options: BakeOptions, manifest: Manifest, reporter: Reporter
) -> _Lora:
    """The LoRA fitted, hashed and looked through for NaN. Raises OverlayError if the overlay's own has changed."""
    adapter = found.adapter(base.shapes, options.allow_unmatched)
    for warning in adapter.warnings:
        reporter.warn(f"{adapter.path.name}: {warning}")
    digest = scan(adapter, reporter)
    if found.own and digest != found.own.file.blake3:
        raise changed_file(options.overlay / found.own.file.path, f"blake3 {found.own.file.blake3}", f"blake3 {digest}")
    return _Lora(_name(found, manifest, digest, options), adapter, digest)


def _name(found: Found, manifest: Manifest, digest: str, options: BakeOptions) -> str:
    """The distilled LoRA goes by that name wherever its file lies, and any other or added one by its file's stem.

    Raises UsageError for another whose file is called so: its bakes would take the names of the overlay's own.
    """
    own = manifest.lora(DISTILLED)
    if own is not None and own.file.blake3 == digest and not found.added:
        return DISTILLED
    names_bakes = not (found.own or found.added or options.name)
    if found.name == DISTILLED and names_bakes and digest != UNKNOWN_HASH:
        raise UsageError(
            f"a LoRA file called {DISTILLED} gives no name: {DISTILLED}-S are bakes of the overlay's own LoRA",
            file=found.path,
            expected="a file of another name, or --name",
            next="the same command with --name NAME, and one --strength at a time",
        )
    return found.name


def _jobs(options: BakeOptions, base: BaseTransformer, loras: Sequence[_Lora]) -> list[Job]:
    """One job per strength. Raises AdapterError for DoRA under the official rule."""
    if options.rule == "official":
        _refuse_dora(loras)
    *added, main = loras
    stack = [(lora, strength) for lora, (_, strength) in zip(added, options.added, strict=True)]
    jobs = []
    for strength in options.strengths:
        name = options.name or bake_name((main.name, strength), [(lora.name, value) for lora, value in stack])
        applied = tuple(
            AppliedLora(baked_lora(lora.adapter, lora.name, lora.digest, value, options.rule), lora.adapter)
            for lora, value in (*stack, (main, strength))
        )
        jobs.append(Job(check_bake_name(name), applied, options.rule, base, options.overlay))
    return jobs


def _refuse_dora(loras: Sequence[_Lora]) -> None:
    items = [
        f"{lora.adapter.path.name}: {target.weight}"
        for lora in loras
        for target in lora.adapter.targets.values()
        if target.magnitude is not None
    ]
    if items:
        raise AdapterError("the official rule has no DoRA", items=items, next="use --rule fp32")


def _is_there(job: Job, bake: Bake | None) -> bool:
    """Whether the overlay holds this very bake, whole as far as sizes tell."""
    if bake is None or (bake.loras, bake.rule) != (job.baked, job.rule):
        return False
    paths = [(job.overlay / record.path, record.size) for record in bake.files]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def _refuse_other_inputs(jobs: Sequence[Job], manifest: Manifest, options: BakeOptions) -> None:
    for job in jobs:
        bake = manifest.bakes.get(job.name)
        if bake is not None and (bake.loras, bake.rule) != (job.baked, job.rule) and not options.force:
            raise OverlayError(
                "exists already, made from other inputs",
                file=options.overlay / job.folder,
                expected=_described(job.rule, job.baked),
                found=_described(bake.rule, bake.loras),
                next=options.command(force=True),
            )


def _described(rule: str, loras: Sequence[Any]) -> str:
    stack = " + ".join(f"{lora.file} ({lora.blake3[:8]}) at {lora.strength:g}" for lora in loras)
    return f"{stack}, rule {rule}"


def _arithmetic(options: BakeOptions, adapters: Sequence[Adapter]) -> Arithmetic:
    """What is used here and now. Raises DeviceError."""
    import torch

    from ltxpack.lora_bake.fuse import choose_kernel

    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise DeviceError("there is no CUDA device", next=options.command(device="cpu"))
    device = "cuda" if available and options.device != "cpu" else "cpu"
    plain = all(adapter.plain_bf16 for adapter in adapters)
    return Arithmetic(options.rule, choose_kernel(options.rule, len(adapters), plain, device), device)


def remake(overlay: Path, name: str, files: Mapping[str, Path], reporter: Reporter) -> None:
    """Make the bake ``name`` again, whole, from the LoRAs, strengths, order and rule that the manifest records.

    ``files`` maps the LoRAs' blake3 to files or PEFT folders. The recorded kernel and device are used if this machine
    has them, so that the same bytes come out. Raises what ``bake`` raises, and OverlayError for a LoRA that changed.
    """
    with OverlayLock(overlay) as lock:
        refuse_links(overlay, [overlay / BAKES, overlay / BAKES / name])
        recover(overlay, reporter)
        manifest = read_manifest(overlay)
        recorded, base = manifest.bakes[name], read_base(overlay, manifest)
        loras = []
        for lora in recorded.loras:
            path = files[lora.blake3]
            adapter = open_adapter(path, base.shapes, name=lora.name, allow_unmatched=True)
            digest = scan(adapter, reporter)
            if digest != lora.blake3:
                raise changed_file(path, f"blake3 {lora.blake3}", f"blake3 {digest}")
            loras.append(AppliedLora(lora, adapter))
        from ltxpack.lora_bake.work import usable

        arithmetic = Arithmetic(recorded.rule, recorded.kernel, recorded.device)
        if not usable(arithmetic, recorded.rule):
            arithmetic = _arithmetic(BakeOptions(overlay, (), rule=recorded.rule), [lora.adapter for lora in loras])
        _make([Job(name, tuple(loras), recorded.rule, base, overlay)], arithmetic, reporter, lock)


def _make(jobs: Sequence[Job], chosen: Arithmetic, reporter: Reporter, lock: OverlayLock) -> dict[str, BakeReport]:
    """Write, publish and enter the manifest. What is complete is kept if it fails, unless the LoRA is at fault."""
    import torch

    from ltxpack.lora_bake.work import BakeWork

    overlay, adapters = jobs[0].overlay, [lora.adapter for lora in jobs[0].loras]
    _tell(jobs, adapters, reporter)
    with contextlib.ExitStack() as stack:
        works = [stack.enter_context(BakeWork(job, chosen, overlay, reporter, lock)) for job in jobs]
        items = [item for work in works for item in work.missing_items()]
        preflight(items, overlay, copy=False)
        reporter.begin(f"bake {', '.join(job.name for job in jobs)}", sum(item.size for item in items), "B")
        try:
            _write(works, adapters, overlay, reporter)
        except AdapterError:
            for work in works:
                work.discard()
            raise
        except torch.OutOfMemoryError:
            raise DeviceError(
                f"too little memory on {chosen.device}", next="free memory on the device, or bake with --device cpu"
            ) from None
        bakes = {work.job.name: work.finish() for work in works}
        reporter.end()
        manifest = read_manifest(overlay)
        for name, (record, _) in bakes.items():
            manifest = manifest.with_bake(name, record)
        for work in works:
            work.clear()
        publish_bakes([work.staging for work in works], manifest)
        return {
            work.job.name: BakeReport(work.job.name, work.job.folder, True, bakes[work.job.name][1]) for work in works
        }


def _write(works: Sequence[BakeWork], adapters: Sequence[Adapter], overlay: Path, reporter: Reporter) -> None:
    """All shards that are not done, shard after shard, each read once for all bakes with the same arithmetic."""
    from ltxpack.lora_bake.factors import FactorReader
    from ltxpack.lora_bake.stream import Engine

    for work in works:
        work.write_small()
    for arithmetic in dict.fromkeys(work.arithmetic for work in works):
        same = [work for work in works if work.arithmetic == arithmetic]
        with contextlib.ExitStack() as stack:
            readers = [stack.enter_context(FactorReader(adapter)) for adapter in adapters]
            engine = stack.enter_context(Engine(overlay, readers, arithmetic, reporter))
            for shard in same[0].job.base.shards:
                outputs = {work: output for work in same if (output := work.output(shard)) is not None}
                if outputs:
                    records = engine.fuse_shard(shard, list(outputs.values()))
                    for (work, output), record in zip(outputs.items(), records, strict=True):
                        work.record(record, output)


def _tell(jobs: Sequence[Job], adapters: Sequence[Adapter], reporter: Reporter) -> None:
    """What a user might not expect of these LoRAs under this rule."""
    for adapter in adapters:
        targets = adapter.targets.values()
        scaled = sum(target.factor != 1.0 for target in targets)
        if jobs[0].rule == "official" and scaled:
            reporter.warn(
                f"{adapter.path.name}: alpha differs from rank in {scaled} targets; the official rule ignores "
                "alpha and uses the strength alone"
            )
        if any(target.magnitude is not None for target in targets):
            reporter.note(f"{adapter.path.name}: DoRA; the strength scales its direction, not its magnitudes")


def _told(job: Job, bake: Bake) -> BakeReport:
    """The report of a bake that is there already."""
    document = {
        "bake": job.name,
        "rule": bake.rule,
        "kernel": bake.kernel,
        "device": bake.device,
        "changed_tensors": len(bake.changed),
    }
    return BakeReport(job.name, job.folder, False, document)
