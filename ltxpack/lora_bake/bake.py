"""``bake-lora``: find the LoRAs, plan the bakes, run them in one pass over the base, publish by rename.

Bakes start from the clean base, never from another bake. A bake comes to its place only when all of it is on the disk;
the manifest that names it is written last. ``verify --repair`` makes a damaged bake again here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from ltxpack.activations import base_digest, calibrated
from ltxpack.errors import AdapterError, DeviceError, OverlayError, UsageError, listed, quoted
from ltxpack.imports import uncollected
from ltxpack.lora_bake.adapter import Adapter, AdapterFiles, LoraUse, open_adapter
from ltxpack.lora_bake.coverage import BakeReport, TargetStat, split_name
from ltxpack.lora_bake.find import FoundLora, find_loras, recorded_files, scan
from ltxpack.lora_bake.plan import Arithmetic, BakeOptions, BakePlan, Base, bake_name, quantised_linears, read_base
from ltxpack.ltx23.classes import DISTILLED
from ltxpack.ltx23.releases import RELEASES
from ltxpack.manifest import BAKED, BAKES, BF16, FP8, TEXT_ENCODERS, Bake, FileRecord, Manifest, read_manifest
from ltxpack.materialize import restore_base
from ltxpack.repack.items import Item, WriteShard
from ltxpack.repack.lock import WORK_FOLDER, OverlayLock, refuse_links
from ltxpack.repack.staging import Staging, find_place, publish_bakes, recover
from ltxpack.repack.verify import Fault, damaged, finish_killed, verify
from ltxpack.repack.write import WRITE_BUFFERS, ShardWriter, preflight, write_bytes, write_item
from ltxpack.reporter import Reporter
from ltxpack.strength import Strength


def plan_bake(options: BakeOptions, reporter: Reporter) -> dict[str, Any]:
    """The files that ``bake`` would make, with sizes, and whether it writes or links each. Writes and fetches nothing.

    ``total_bytes`` is the sum of all sizes, ``written_bytes`` the sum without links; both include an upper bound for
    each of the two reports. ``arithmetic`` says how ``bake`` would make the sums and how long the products take here.
    Raises the errors of ``bake``, but for faults in the content of a LoRA on the hub, of which it reads the header.
    """
    options = options.checked()
    wanted = _Wanted.find(options, reporter, headers_only=True)
    plans = wanted.plans()
    if all(lora.here for lora in wanted.loras):
        plans = wanted.new(plans)
    transformer = wanted.bases[BAKES].shapes
    adapters = [part for lora in wanted.loras if (part := lora.adapter.within(transformer)).targets]
    arithmetic = _arithmetic(options, adapters)
    files = [file for plan in plans for file in plan.files(arithmetic)]
    written = sum(file["bytes"] for file in files if file["action"] == "write")
    total = sum(file["bytes"] for file in files)
    plan: dict[str, Any] = {"files": files, "missing": [], "total_bytes": total, "written_bytes": written}
    if files:
        uses = zip(*(made.loras for made in plans if made.base.place == BAKES), strict=True)
        used = [of[0].adapter for of in uses if options.rule == "official" or not all(use.baked.idle for use in of)]
        plan["arithmetic"] = _time(arithmetic, used, len({made.recorded for made in plans}))
    return plan


def bake(options: BakeOptions, reporter: Reporter) -> list[BakeReport]:
    """Make the bakes; existing ones from the same inputs stay, unless ``force`` is set.

    Raises UsageError, SourceError, FormatError, AdapterError (a LoRA that does not fit, or a result that overflows),
    OverlayError (in use, changed, exists from other inputs, no space) or DeviceError. The overlay stays valid.
    """
    options = options.checked()
    read_manifest(options.overlay)
    with _locked(options.overlay, reporter) as lock:
        wanted = _Wanted.find(options, reporter)
        if all(lora.own for lora in wanted.loras) and not options.force:
            plans = wanted.plans()
            if all(map(wanted.is_there, plans)):
                return list(map(wanted.there_already, plans))
        torch = _torch_ahead()
        plans = wanted.plans(reporter)
        new = wanted.new(plans)
        torch.result()
        made: dict[str, BakeReport] = {}
        for place in BAKED:
            if group := [plan for plan in new if plan.base.place == place]:
                formats = options.formats if place == BAKES else (BF16,)
                adapters = [lora.adapter for lora in group[0].loras]
                arithmetic = _arithmetic(dataclasses.replace(options, formats=formats), adapters)
                made |= _run(group, arithmetic, reporter, lock)
        return [made.get(plan.folder) or wanted.there_already(plan) for plan in plans]


@dataclasses.dataclass(frozen=True)
class UnwrittenBake:
    """A bake whose weights go into a file of another kind."""

    plan: BakePlan
    options: BakeOptions

    @functools.cached_property
    def arithmetic(self) -> Arithmetic:
        """The arithmetic of this machine. Needs torch, unlike a plan."""
        return _arithmetic(self.options, [lora.adapter for lora in self.plan.loras])


def plan_unwritten(options: BakeOptions, reporter: Reporter, *, headers_only: bool = False) -> UnwrittenBake:
    """The one bake of ``options``, with its LoRAs read. Raises the errors of ``bake`` before it writes."""
    options = options.checked()
    wanted = _Wanted.find(options, reporter, headers_only)
    torch = None if headers_only else _torch_ahead()
    [plan] = wanted.plans(None if headers_only else reporter)
    if torch is not None:
        torch.result()
    return UnwrittenBake(plan, options)


def _torch_ahead() -> Future[ModuleType]:
    """Import torch on another thread: it takes as long as reading a LoRA, and both go on together.

    A caller waits for the result, and imports nothing meanwhile that torch imports too: if Ctrl-C comes while a thread
    waits for the import of another one, CPython may keep the lock of all imports for ever.
    """
    for needed in ("numpy", "tqdm"):
        importlib.import_module(needed)
    loader = ThreadPoolExecutor(1)
    torch = loader.submit(uncollected()(importlib.import_module), "torch")
    loader.shutdown(wait=False)
    return torch


def restore(overlay: Path, reporter: Reporter, *, source: str | None = None, loras: Sequence[str] = ()) -> list[Fault]:
    """Repair ``overlay`` and verify it again; returns the faults that are left. A stray file is never removed.

    It writes damaged files of the base again from the source: it looks for inputs in ``source`` first, then in the
    repos that the manifest states. It makes a damaged bake again, whole. ``loras`` name the LoRAs that bakes need and
    the overlay does not keep, as for ``bake-lora``; their content identifies them, not their name. Raises LtxpackError:
    SourceError if a needed LoRA is not given, OverlayError if the new base differs from the manifest.
    """
    read_manifest(overlay)  # what is no overlay is refused before anything there is touched
    finish_killed(overlay, reporter)
    faults = verify(overlay, reporter)
    manifest = read_manifest(overlay)
    paths = damaged(faults, manifest)
    if not paths:
        return faults
    find_place(overlay)
    bakes = {folder: paths & {record.path for record in bake.files} for folder, bake in manifest.baked.items()}
    if base := paths.difference(*bakes.values()):
        reporter.note(f"damaged files of the base, which are made again: {len(base)}")
        restore_base(overlay, manifest, base, reporter, source=source)
    if broken := {folder: len(files) for folder, files in bakes.items() if files}:
        files = recorded_files(overlay, manifest, list(broken), loras, reporter)
        for folder, count in broken.items():
            reporter.note(f"{folder}: {count} files are damaged; the bake is made again")
            remake(overlay, folder, files, reporter)
    return verify(overlay, reporter)


def remake(overlay: Path, folder: str, files: Mapping[str, AdapterFiles], reporter: Reporter) -> None:
    """Make the bake in ``folder`` again, whole, with the manifest's LoRAs, strengths, order, rule and form.

    ``files``: by the LoRAs' blake3. It uses the recorded kernel and device if this machine
    has them, so that the bytes are the same. Raises the errors of ``bake``, and OverlayError for a LoRA that changed.
    """
    with _locked(overlay, reporter) as lock:
        manifest = read_manifest(overlay)
        place, _, name = folder.rpartition("/")
        made, base = manifest.baked[folder], read_base(overlay, manifest, place)
        shapes = base.shapes
        # Baked with --text, a LoRA leaves nothing of the text path out.
        texts = {lora.blake3 for bake in manifest.text_encoders.values() for lora in bake.loras}
        if not texts.isdisjoint(lora.blake3 for lora in made.loras):
            shapes = {**read_base(overlay, manifest).shapes, **read_base(overlay, manifest, TEXT_ENCODERS).shapes}
        if made.quantised and not set(made.quantised) <= set(quantised_linears(base.shapes, (), "ltxpack --help")):
            again = f"ltxpack bake-lora {quoted(overlay)} --strength 1.0 --force"
            raise OverlayError(f"the bake {name} names linears that the base does not have", file=overlay, next=again)
        loras: list[LoraUse] = []
        for lora in made.loras:
            own = dataclasses.replace(files[lora.blake3], name=lora.name)
            adapter = open_adapter(own, shapes, allow_unmatched=True, rule=made.rule)
            scan(adapter, reporter, lora.blake3)
            loras.append(LoraUse(adapter.within(base.shapes), lora))
        arithmetic = Arithmetic(made.rule, made.kernel, made.device)
        if not _usable(arithmetic, made.rule, made.format):
            options = BakeOptions(overlay, (), rule=made.rule, formats=(made.format,))
            arithmetic = _arithmetic(options, [lora.adapter for lora in loras])
        form = (made.format, made.quantised, made.calibration)
        plan = BakePlan(name, tuple(loras), made.rule, base, overlay, *form)
        _run([plan], arithmetic, reporter, lock, repair=True)


@contextlib.contextmanager
def _locked(overlay: Path, reporter: Reporter) -> Iterator[OverlayLock]:
    """The lock of the overlay, after an interrupted publishing was finished or undone."""
    with OverlayLock(overlay, reporter) as lock:
        refuse_links(overlay / WORK_FOLDER, *(overlay / place for place in BAKED))
        recover(overlay, reporter)
        yield lock


# Plan


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What a command asks for: ``bases`` by the place of their bakes, ``loras`` in order of application."""

    options: BakeOptions
    manifest: Manifest
    bases: Mapping[str, Base]
    loras: Sequence[FoundLora]

    @classmethod
    def find(cls, options: BakeOptions, reporter: Reporter, headers_only: bool = False) -> _Wanted:
        manifest = read_manifest(options.overlay)
        places = BAKED if options.text else (BAKES,)
        bases = {place: read_base(options.overlay, manifest, place) for place in places}
        # Bases share no names.
        shapes = {name: shape for base in bases.values() for name, shape in base.shapes.items()}
        return cls(options, manifest, bases, find_loras(options, manifest, shapes, reporter, headers_only))

    def plans(self, reporter: Reporter | None = None) -> list[BakePlan]:
        """One plan per strength and format, and one per strength for the text path.

        With a ``reporter`` it reads the LoRAs' values, but none of the overlay's own LoRA at 0. Raises UsageError
        (unknown blocks), AdapterError (a method that the official rule does not know, a model that would be distilled
        twice, an activations file of another bake, a text path that no LoRA changes) and the errors of
        :meth:`.FoundLora.digest`.
        """
        options = self.options
        if options.rule == "official":
            _refuse_beyond_official([lora.adapter for lora in self.loras], options)
        if TEXT_ENCODERS in self.bases:
            _refuse_without_text(options, [lora.adapter for lora in self.loras], self.bases[TEXT_ENCODERS])
        _refuse_absent_blocks(options, self.bases[BAKES])
        linears = _linears_in_codes(options, self.bases[BAKES])
        unused = options.rule != "official" and all(Strength.of(by).idle for by in options.strengths)
        digests = [lora.digest(None if unused and lora.own else reporter) for lora in self.loras]
        named = [lora.named(digest, self.manifest, options) for lora, digest in zip(self.loras, digests, strict=True)]
        plans: dict[str, BakePlan] = {}
        for (place, base), strength in itertools.product(self.bases.items(), options.strengths):
            # Added LoRAs and the base may be alone, without a main LoRA.
            strengths = [*(value for _, value in options.added), strength][: len(named)]
            uses = tuple(
                LoraUse.of(part, base.strength(value), digest)
                for adapter, digest, value in zip(named, digests, strengths, strict=True)
                if (part := adapter.within(base.shapes)).targets
            )
            for form in options.formats if place == BAKES else (BF16,):
                name = options.name or bake_name([(use.baked.name, use.baked.applied) for use in uses], form)
                plan = BakePlan(name, uses, options.rule, base, options.overlay)
                if uses or not named:  # else the LoRAs change only the text path, or nothing of it
                    plans.setdefault(plan.folder, plan if form == BF16 else _quantised(plan, form, options, linears))
        _refuse_twice_distilled(plans.values(), self, reporter)
        return list(plans.values())

    def is_there(self, plan: BakePlan) -> bool:
        """Whether the overlay holds this bake, with files of the right sizes."""
        bake = self.manifest.baked.get(plan.folder)
        if bake is None or not plan.is_made_from(bake):
            return False
        paths = [(plan.overlay / record.path, record.size) for record in bake.files]
        return all(path.is_file() and path.stat().st_size == size for path, size in paths)

    def new(self, plans: Sequence[BakePlan]) -> list[BakePlan]:
        """The plans whose bakes do not exist, or all with ``force``. Raises OverlayError for a name that is taken."""
        new = [plan for plan in plans if self.options.force or not self.is_there(plan)]
        for plan in () if self.options.force else new:
            bake = self.manifest.baked.get(plan.folder)
            if bake is not None and not plan.is_made_from(bake):
                again = f"{self.options.command(force=True)} (replaces it; another --name keeps both)"
                raise OverlayError(
                    "exists already, made from other inputs", file=plan.overlay / plan.folder,
                    expected=_described(plan.stated), found=_described(bake), next=again,
                )  # fmt: skip
        return new

    def there_already(self, plan: BakePlan) -> BakeReport:
        bake = self.manifest.baked[plan.folder]
        document = {"bake": plan.name, "rule": bake.rule, "kernel": bake.kernel, "device": bake.device}
        return BakeReport(plan.name, plan.folder, False, {**document, "changed_tensors": len(bake.changed)})


def _refuse_beyond_official(adapters: Sequence[Adapter], options: BakeOptions) -> None:
    beyond = [
        (f"{adapter.path.name}: {name}", method)
        for adapter in adapters
        for name, target in adapter.targets.items()
        if (method := target.beyond_official)
    ]
    if beyond:
        methods = ", ".join(dict.fromkeys(method for _, method in beyond))
        names = [name for name, _ in beyond]
        raise AdapterError(f"the official rule has no {methods}", items=names, next=options.command(rule="fp32"))


def _refuse_without_text(options: BakeOptions, adapters: Sequence[Adapter], base: Base) -> None:
    if not any(adapter.within(base.shapes).targets for adapter in adapters):
        files = [adapter.path.name for adapter in adapters]
        raise AdapterError("no LoRA changes the text path", items=files, next=options.command(text=False))


def _refuse_absent_blocks(options: BakeOptions, base: Base) -> None:
    given = [Strength.of(by) for by in (*options.strengths, *(by for _, by in options.added))]
    there = {block for block, _ in map(split_name, base.shapes) if block is not None}
    count, last = max(there, default=-1) + 1, max((run.last for by in given for run in by.blocks), default=-1)
    if last >= count:
        within = options.with_strengths(lambda by: Strength.of(by).within(count))
        raise UsageError(
            "a strength names a block that is not there", file=options.overlay, expected=f"blocks 0 to {count - 1}",
            found=last, next=within.command(),
        )  # fmt: skip


def _linears_in_codes(options: BakeOptions, base: Base) -> tuple[str, ...]:
    """The linears that fp8 and int8 store in codes. Raises UsageError for blocks to keep that are not there."""
    if options.formats == (BF16,):
        return ()
    return quantised_linears(base.shapes, options.keep_blocks, options.command(keep_blocks=()))


def _refuse_twice_distilled(plans: Iterable[BakePlan], wanted: _Wanted, reporter: Reporter | None) -> None:
    """With ``force`` it warns."""
    options, uses = wanted.options, [use for plan in plans for use in plan.loras]
    sizes = {release.size for release in RELEASES if "distilled-lora" in release.name}
    named = [use for use in uses if DISTILLED in use.baked.name.lower() or use.adapter.size in sizes]
    twice = list(dict.fromkeys(use.baked.file for use in named if not use.baked.idle))
    if not twice or not wanted.manifest.distilled:
        return
    if not options.force:
        raise AdapterError(
            "the base is a distilled one: with a distilled LoRA it would be distilled twice", file=options.overlay,
            items=twice, next=options.command(force=True),
        )  # fmt: skip
    if reporter is not None:
        reporter.warn(f"{options.overlay}: the base is a distilled one; with {listed(twice)} it is distilled twice")


def _quantised(plan: BakePlan, form: str, options: BakeOptions, linears: tuple[str, ...]) -> BakePlan:
    """``plan`` with the ``linears`` stored in codes of ``form``, and for fp8 the scales of their inputs."""
    calibration = None
    if form == FP8 and options.activations is not None:
        loras = tuple((lora.blake3, lora.stated) for lora in plan.recorded if not lora.idle)
        bf16 = bake_name([(lora.name, lora.applied) for lora in plan.recorded]) if loras else "base"
        run = f"ltxpack run {quoted(plan.overlay)} --save-activations FILE --prompt TEXT"
        record = f"{run} (with {bf16} in the stage it is meant for)"
        shards = [shard.record for shard in plan.base.shards]
        calibration = calibrated(options.activations, loras, base_digest(shards), linears, record)
    return dataclasses.replace(plan, form=form, quantised=linears, calibration=calibration)


def _described(bake: Bake) -> str:
    stack = " + ".join(f"{lora.file} ({lora.blake3[:8]}) at {lora.applied}" for lora in bake.loras) or "the base"
    if bake.format == BF16:
        return f"{stack}, rule {bake.rule}"
    calibrated = "" if bake.calibration is None else f" calibrated by {bake.calibration.name}"
    return f"{stack}, rule {bake.rule}, {len(bake.quantised)} linears in {bake.format}{calibrated}"


# Run


def _arithmetic(options: BakeOptions, adapters: Sequence[Adapter]) -> Arithmetic:
    """The arithmetic of this machine. Raises DeviceError."""
    import torch

    from ltxpack.lora_bake.fuse import choose_kernel

    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise DeviceError("there is no CUDA device", next=options.command(device="cpu"))
    device = "cuda" if available and options.device != "cpu" else "cpu"
    plain = bool(adapters) and all(adapter.plain_bf16 for adapter in adapters)
    flop = sum(adapter.flop for adapter in adapters)
    kernel = choose_kernel(options.rule, len(adapters), plain, device, flop, codes=options.formats != (BF16,))
    return Arithmetic(options.rule, kernel, device)


def _time(arithmetic: Arithmetic, adapters: Sequence[Adapter], strengths: int) -> dict[str, Any]:
    """The arithmetic, and the time of the LoRAs' products on this processor."""
    from ltxpack.lora_bake.fuse import products_per_second

    # The kernels fp32 and fp32-bf16 make one product for all strengths.
    flop = sum(adapter.flop for adapter in adapters) * (1 if arithmetic.kernel.startswith("fp32") else strengths)
    rate = products_per_second(arithmetic.kernel, arithmetic.device)
    return {**dataclasses.asdict(arithmetic), "flop": flop, "flop_per_second": rate, "seconds": flop / rate}


def _usable(arithmetic: Arithmetic, rule: str, form: str) -> bool:
    """Whether a recorded arithmetic makes bakes by ``rule`` in ``form``, and this machine has its device and kernel."""
    import torch

    from ltxpack.lora_bake.fuse import has_kernel

    here = arithmetic.device == "cpu" or (arithmetic.device == "cuda" and torch.cuda.is_available())
    return arithmetic.rule == rule and here and has_kernel(arithmetic.kernel, arithmetic.device, rule, form != BF16)


def _run(
    plans: Sequence[BakePlan], chosen: Arithmetic, reporter: Reporter, lock: OverlayLock, *, repair: bool = False
) -> dict[str, BakeReport]:
    """Write and publish the bakes, and add them to the manifest. A failure keeps complete files, a bad LoRA none."""
    import torch

    from ltxpack.lora_bake.trial import settled

    adapters = settled(plans, reporter)
    with contextlib.ExitStack() as stack:
        bakes = [stack.enter_context(StagedBake(plan, chosen, reporter, lock)) for plan in plans]
        items = [item for bake in bakes for item in bake.missing_items()]
        preflight(items, bakes[0].root, copy=False)
        reporter.begin(f"bake {', '.join(plan.name for plan in plans)}", sum(item.size for item in items), "B")
        try:
            _write(bakes, adapters, plans[0].base, reporter)
        except AdapterError:
            for bake in bakes:
                bake.discard()
            raise
        except torch.OutOfMemoryError:
            problem = f"too little memory on {chosen.device}"
            raise DeviceError(problem, next="free memory on the device, or bake with --device cpu") from None
        manifest = read_manifest(plans[0].overlay)
        reports = {}
        for bake in bakes:
            record, document = bake.finish()
            manifest = manifest.with_bake(bake.plan.folder, record)
            reports[bake.plan.folder] = BakeReport(bake.plan.name, bake.plan.folder, True, document)
        reporter.end()
        publish_bakes(bakes, manifest, repair=repair)
    return reports


def _write(bakes: Sequence[StagedBake], adapters: Sequence[Adapter], base: Base, reporter: Reporter) -> None:
    """Write all missing items. Bakes with the same arithmetic share one read of each shard."""
    from ltxpack.lora_bake.stream import Engine, ShardOutput

    for bake in bakes:
        for item in bake.missing_items():
            if not isinstance(item, WriteShard):
                bake.record(write_item(item, bake.root, bake.plan.overlay, copy=False, reporter=reporter))
    for arithmetic in dict.fromkeys(bake.arithmetic for bake in bakes):
        with Engine(adapters, arithmetic, reporter) as engine:
            for shard in base.shards:
                shards = ((bake, bake.plan.shards.get(shard.name)) for bake in bakes if bake.arithmetic == arithmetic)
                left = {bake: item for bake, item in shards if item is not None and item.path not in bake.done}
                with contextlib.ExitStack() as stack:
                    outputs = [
                        ShardOutput(item.path, item.entries, bake.plan.strengths_in, stack.enter_context(writer))
                        for (bake, item), writer in zip(left.items(), _writers(left, reporter), strict=True)
                    ]
                    records = engine.fuse_shard(shard, outputs) if outputs else []
                for bake, output, record in zip(left, outputs, records, strict=True):
                    bake.record_shard(record, output.stats)


def _writers(items: Mapping[StagedBake, WriteShard], reporter: Reporter) -> Iterator[ShardWriter]:
    # The more bakes share the disk, the fewer write buffers each has.
    buffers = max(2, WRITE_BUFFERS + 1 - len(items))
    for bake, item in items.items():
        reporter.advance(len(item.header))
        yield ShardWriter(bake.root, item.path, item.header, item.size, buffers=buffers)


class StagedBake(Staging):
    """A plan's staging folder, whose complete files stay for the next run.

    The journal holds the measurements of each shard and the chosen arithmetic, with which a stopped bake goes on.
    """

    def __init__(self, plan: BakePlan, chosen: Arithmetic, reporter: Reporter, lock: OverlayLock) -> None:
        """Uses ``chosen`` unless an earlier run of the same plan began with another arithmetic."""
        super().__init__(lock, plan.fingerprint(), reporter, folder=plan.folder, force=True)
        self.plan = plan
        self.arithmetic = chosen
        self._stats: dict[str, TargetStat] = {}

    def __enter__(self) -> Self:
        super().__enter__()
        for item in self.plan.shards.values():
            if item.path in self.done and not self._take_over(item):
                del self._journal.records[item.path]
        return self

    def missing_items(self) -> list[Item]:
        """The items that are not complete, without the reports."""
        return [item for item in self.plan.items if item.path not in self.done]

    def record_shard(self, record: FileRecord, stats: Mapping[str, TargetStat]) -> None:
        self._stats |= stats
        self.record(record, [dataclasses.astuple(self.arithmetic), [(name, *stat) for name, stat in stats.items()]])

    def finish(self) -> tuple[Bake, dict[str, Any]]:
        """Write the reports; returns the manifest's entry and the report's document."""
        document = self.plan.document(self.arithmetic, self._stats)
        for item in self.plan.reports(document):
            self.record(write_bytes(item, self.root))
        changed = (name for name, target in document["targets"].items() if target["changed"])
        return self.plan.record(self.arithmetic, self.done, changed), document

    def discard(self) -> None:
        """Remove the written files: the same inputs would fail again."""
        shutil.rmtree(self.work, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.work.parent.rmdir()

    def _take_over(self, item: WriteShard) -> bool:
        """Take the measurements of an earlier run of this plan; returns False for an unsound note."""
        try:
            chosen, measured = self._journal.notes[item.path]
            arithmetic = Arithmetic(*chosen)
            stats = {
                str(name): TargetStat(float(base), float(delta), int(elements), int(changed), *map(float, rounding))
                for name, base, delta, elements, changed, *rounding in measured
            }
        except (KeyError, TypeError, ValueError):
            return False
        fused = {tensor.name for tensor in item.tensors if tensor.nbytes and tensor.name in self.plan.touched}
        known = arithmetic == self.arithmetic if self._stats else _usable(arithmetic, self.plan.rule, self.plan.form)
        if sound := known and stats.keys() == fused:
            self.arithmetic = arithmetic
            self._stats |= stats
        return sound
