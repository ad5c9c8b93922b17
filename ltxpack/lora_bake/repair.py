"""``verify --repair``: damaged files of the base come from the source again, a damaged bake is made again, whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ltxpack.errors import SourceError, quoted
from ltxpack.lora_bake.adapter import adapter_files
from ltxpack.lora_bake.bake import remake
from ltxpack.lora_bake.reading import hash_adapter
from ltxpack.manifest import Manifest, read_manifest
from ltxpack.materialize import restore_base
from ltxpack.repack.verify import Fault, damaged, verify
from ltxpack.reporter import Reporter


def restore(overlay: Path, reporter: Reporter, *, source: str | None = None, loras: Sequence[Path] = ()) -> list[Fault]:
    """Repair ``overlay`` and verify it again; returns the faults that are left. A stray file is never removed.

    ``source`` is where inputs are looked for first; the others come from the repos that the manifest states.
    ``loras`` are files or PEFT folders of LoRAs that bakes need and the overlay does not keep; their content tells
    which is which, not their name. Raises LtxpackError: SourceError if a file is needed and not given, OverlayError
    if the base comes out other than the manifest says.
    """
    faults = verify(overlay, reporter)
    manifest = read_manifest(overlay)
    paths = damaged(faults, manifest)
    if not paths:
        return faults
    of_bakes = {record.path for bake in manifest.bakes.values() for record in bake.files}
    if base := paths - of_bakes:
        reporter.note(f"{len(base)} files of the base are damaged; they are made again")
        restore_base(overlay, manifest, base, reporter, source=source)
    for name, bake in manifest.bakes.items():
        count = len(paths & {record.path for record in bake.files})
        if count:
            files = _lora_files(overlay, manifest, name, loras)
            reporter.note(f"bakes/{name}: {count} files are damaged; the bake is made again")
            remake(overlay, name, files, reporter)
    return verify(overlay, reporter)


def _lora_files(overlay: Path, manifest: Manifest, name: str, given: Sequence[Path]) -> dict[str, Path]:
    """blake3 -> file for the LoRAs of the bake ``name``. Raises SourceError if one is neither kept nor given."""
    bake = manifest.bakes[name]
    digests = {path: hash_adapter(*adapter_files(path)) for path in given}
    files = {digest: path for path, digest in digests.items()}
    files |= {lora.file.blake3: overlay / lora.file.path for lora in manifest.loras}
    if any(lora.blake3 not in files for lora in bake.loras):
        raise _missing(overlay, manifest, name, files, digests)
    return files


def _missing(
    overlay: Path, manifest: Manifest, name: str, files: Mapping[str, Path], given: Mapping[Path, str]
) -> SourceError:
    """The error for LoRAs that are not at hand; it names beside them every given file that no bake was made from."""
    missing = {lora.blake3: lora for lora in manifest.bakes[name].loras if lora.blake3 not in files}.values()
    used = {lora.blake3 for bake in manifest.bakes.values() for lora in bake.loras}
    others = [f"{path} (blake3 {digest[:8]})" for path, digest in given.items() if digest not in used]
    problem = f"the LoRA of the bake {name} is needed to repair it"
    # The files that do match are part of the next command: without them it would miss those instead.
    flags = [f"--lora {quoted(path)}" for path, digest in given.items() if digest in used]
    return SourceError(
        f"{problem}, and a file given does not match" if others else problem,
        file=overlay,
        expected=", ".join(f"{lora.file} (blake3 {lora.blake3[:8]})" for lora in missing) if others else None,
        found=", ".join(others) if others else None,
        items=[f"{lora.file} (blake3 {lora.blake3})" for lora in missing],
        next=" ".join([f"ltxpack verify {quoted(overlay)} --repair", *flags, *["--lora FILE"] * len(missing)]),
    )
