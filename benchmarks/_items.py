"""What the offline benchmark measures: commands, what each reads cold, and what it is held against."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from _checkpoint import Source
from _measure import Item, files_under

from ltxpack.manifest import MANIFEST_NAME

LTXPACK = (sys.executable, "-m", "ltxpack")
RIVALS = (sys.executable, str(Path(__file__).with_name("_rivals.py")))
STRENGTHS = (0.5, 0.25)
EXPORTED = ("transformer", "connectors", "vae", "audio_vae", "vocoder")
FP8_EXPORT = "export fp8"


class Places:
    """The folders of a run. ``work`` is emptied before every item, so that never more than one result is there."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.work = scratch / "work"
        self.overlay = scratch / "overlay"
        self.cp = f"cp{_no_reflink(scratch)}"
        self._manifest = b""

    def clear(self) -> None:
        """An empty ``work``."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()

    def keep_overlay(self) -> None:
        """What ``materialize`` made last, in ``work``, becomes ``overlay``."""
        (self.work / "out").rename(self.overlay)
        self._manifest = (self.overlay / MANIFEST_NAME).read_bytes()

    def unbake(self) -> None:
        """``overlay`` as it was before any bake, and an empty ``work``."""
        self.clear()
        shutil.rmtree(self.overlay / "bakes", ignore_errors=True)
        (self.overlay / MANIFEST_NAME).write_bytes(self._manifest)

    def shell(self, script: str, *arguments: Path) -> tuple[str, ...]:
        """A command that runs ``script`` with ``$CP``."""
        return ("sh", "-ec", f'CP="{self.cp}"; {script}', "sh", *map(str, arguments))


def copy_items(places: Places, source: Source) -> list[Item]:
    """cp and fsync, ours, and loading and saving, of the same checkpoint."""
    checkpoint, target = source.checkpoint, places.work / "copy.safetensors"
    size = checkpoint.stat().st_size

    def item(key: str, label: str, command: Sequence[str]) -> Item:
        floor = None if key == "cp" else "cp"
        return Item(key, label, tuple(command), (checkpoint,), size, places.clear, floor)

    # Ours last and cp next to it: what the last of ours made is kept.
    return [
        item("load-all", "load_file + save_file, all read", [*RIVALS, "load-all-save", str(checkpoint), str(target)]),
        item("mapped", "load_file + save_file, mapped", [*RIVALS, "load-save", str(checkpoint), str(target)]),
        item("cp", "cp and fsync", places.shell('$CP "$1" "$2"; sync "$2"', checkpoint, target)),
        item("ours", "ltxpack materialize", [*LTXPACK, "materialize", str(source.folder), str(places.work / "out")]),
    ]


def verify_items(places: Places) -> list[Item]:
    """Reading every file, and verifying it."""
    files = files_under(places.overlay)
    size = sum(path.stat().st_size for path in files)
    read = Item("cat", "cat > /dev/null", places.shell('cat "$@" > /dev/null', *files), files, size, places.clear)
    command = (*LTXPACK, "verify", str(places.overlay))
    return [read, Item("verify", "ltxpack verify", command, files, size, places.clear, "cat")]


def export_items(places: Places) -> list[Item]:
    """Copying the files that an export reads, and exporting."""
    files = tuple(path for part in EXPORTED for path in files_under(places.overlay / part))
    size = sum(path.stat().st_size for path in files)
    folders = [places.overlay / part for part in EXPORTED]
    copy = places.shell('for part in "$@"; do $CP -r "$part" .; done; sync ./*/*', *folders)
    copy = ("env", "-C", str(places.work), *copy)
    command = (*LTXPACK, "export", str(places.overlay), "-o", str(places.work / "one.safetensors"))
    return [
        Item("export floor", "cp and fsync", copy, files, size, places.clear),
        Item("export", "ltxpack export, read back", command, files, size, places.clear, "export floor"),
    ]


def export_fp8_items(places: Places, lora: Path) -> list[Item]:
    """Reading base and LoRA and writing as much as the result, and an fp8 file with the LoRA made on the way."""
    files = tuple(path for part in EXPORTED for path in files_under(places.overlay / part))
    output = places.work / "one.safetensors"
    command = [*LTXPACK, "export", str(places.overlay), "-o", str(output), "--format", "fp8", "--keep-blocks", "none"]
    command += ["--strength", str(STRENGTHS[0]), "--lora", str(lora)]
    plan = json.loads(subprocess.run([*command, "--plan", "--json"], check=True, capture_output=True).stdout)
    size = plan["total_bytes"]
    floor = places.shell(
        'out=$1; size=$2; shift 2; cat "$@" | { head -c "$size" > "$out"; cat > /dev/null; }; sync "$out"',
        output, Path(str(size)), *files, lora,
    )  # fmt: skip
    return [
        Item(
            "fp8 floor", "cat of base and LoRA, so much of it written, fsync", floor, (*files, lora), size, places.clear
        ),
        Item(
            FP8_EXPORT,
            "ltxpack export, fp8 on the way",
            tuple(command),
            (*files, lora),
            size,
            places.clear,
            "fp8 floor",
        ),
    ]


def bake_items(places: Places, lora: Path) -> list[Item]:
    """What reading and writing alone takes, for one and two strengths; ours; diffusers; the official rule."""
    base = files_under(places.overlay / "transformer")
    size = sum(path.stat().st_size for path in base)
    cold = (*base, lora)
    folder, target = places.overlay / "transformer", places.work
    once = '$CP -r "$1" "$2/a"; cat "$3" > /dev/null; '

    def item(key: str, label: str, command: Sequence[str], floor: str | None, results: int = 1, every: int = 1) -> Item:
        return Item(key, label, tuple(command), cold, results * size, places.unbake, floor, every)

    one, two = bake_command(places.overlay, lora, 1), bake_command(places.overlay, lora, 2)
    fused = [*RIVALS, "diffusers", str(folder), str(lora), str(STRENGTHS[0]), str(target / "fused")]
    floor_1 = places.shell(f'{once} sync "$2"/a/*', folder, target, lora)
    floor_2 = places.shell(f'{once} $CP -r "$1" "$2/b"; sync "$2"/[ab]/*', folder, target, lora)
    return [
        item("floor 1", "cp of the base and fsync, read of the LoRA", floor_1, None),
        item("ours 1", "ltxpack bake-lora, one strength", one, "floor 1"),
        item("floor 2", "cp of the base twice and fsync, read of the LoRA", floor_2, None, 2),
        item("ours 2", "ltxpack bake-lora, two strengths", two, "floor 2", 2),
        # Every second round is enough to see by how much it is slower.
        item("diffusers", "diffusers load, fuse_lora, save (PEFT)", fused, "floor 1", every=2),
        item("official", "ltxpack bake-lora --rule official", [*one, "--rule", "official"], "floor 1"),
    ]


def one_strength_items(places: Places, lora: Path, of: str) -> list[Item]:
    """The first two of :func:`bake_items`, the floor and ours, keys and labels followed by ``of``."""
    floor, ours = bake_items(places, lora)[:2]
    floor = replace(floor, key=floor.key + of, label=floor.label + of)
    return [floor, replace(ours, key=ours.key + of, label=ours.label + of, floor=floor.key)]


def bake_command(overlay: Path, lora: Path, strengths: int) -> list[str]:
    """The command line of a bake on the processor."""
    flags = [part for strength in STRENGTHS[:strengths] for part in ("--strength", str(strength))]
    return [*LTXPACK, "bake-lora", str(overlay), "--lora", str(lora), *flags, "--device", "cpu"]


def _no_reflink(folder: Path) -> str:
    """`` --reflink=never`` where a plain cp would share the blocks instead of copying them."""
    first, second = folder / "reflink-1", folder / "reflink-2"
    first.write_bytes(bytes(1 << 16))
    shared = subprocess.run(["cp", "--reflink=always", first, second], capture_output=True, check=False)
    first.unlink()
    second.unlink(missing_ok=True)
    return " --reflink=never" if shared.returncode == 0 else ""
