"""Verification finds each kind of fault, all at once; repair brings back what can be, and touches nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from repack_support import bake, materialize, plan
from support import Notes, tree

from ltxpack.errors import OverlayError
from ltxpack.manifest import MANIFEST_NAME, FileRecord, Manifest, read_manifest
from ltxpack.repack.items import Item
from ltxpack.repack.verify import Fault, damaged, repair, verify
from ltxpack.reporter import SilentReporter

SILENT = SilentReporter()
SHARD = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
SECOND = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
LORA = "loras/lora.safetensors"


@pytest.fixture
def overlay(source: Path, tmp_path: Path) -> Path:
    """An overlay with one bake: a file of its own and a link to a shard of the transformer."""
    target = tmp_path / "home/out"
    manifest = materialize(source, target)
    assert {SHARD, SECOND, INDEX, LORA} <= {record.path for record in manifest.records()}
    bake(target, ("b",), b"{}")
    assert verify(target, SILENT) == []
    return target


def rewrite(path: Path, change: Callable[[bytearray], None]) -> None:
    """Change a file as another program would: a new file in its place."""
    data = bytearray(path.read_bytes())
    change(data)
    path.unlink()
    path.write_bytes(data)


def flip(data: bytearray) -> None:
    data[-1] ^= 1


def replace(path: Path, make: Callable[..., object], *arguments: object) -> None:
    path.unlink()
    make(path, *arguments)


def link_whole_folder(overlay: Path) -> None:
    (overlay / "transformer").rename(overlay.parent / "elsewhere")
    (overlay / "transformer").symlink_to("../elsewhere")


def change_source(overlay: Path) -> None:
    with (overlay.parent.parent / "source/lora.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read()
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


BAKED = f"bakes/b/{Path(SECOND).name}"
FAULTS: dict[str, tuple[Callable[[Path], object], dict[str, str]]] = {
    "a flipped bit": (lambda out: rewrite(out / SHARD, flip), {SHARD: "content differs"}),
    "cut short": (lambda out: os.truncate(out / SHARD, 50), {SHARD: "size differs"}),
    "grown": (lambda out: rewrite(out / INDEX, lambda data: data.extend(b" ")), {INDEX: "size differs"}),
    "missing": (lambda out: (out / INDEX).unlink(), {INDEX: "is missing"}),
    "a shard gone": (lambda out: (out / SECOND).unlink(), {SECOND: "is missing"}),
    "a shard behind a link cut short": (lambda out: os.truncate(out / SECOND, 50), {SECOND: "size differs"}),
    "a hard link replaced by another file": (lambda out: rewrite(out / LORA, flip), {LORA: "content differs"}),
    "the source of a hard link changed": (change_source, {LORA: "the source file it is hard-linked to was changed"}),
    "replaced by a link": (lambda out: replace(out / SHARD, Path.symlink_to, "/etc/hostname"), {SHARD: "was replaced"}),
    "replaced by a folder": (lambda out: replace(out / SHARD, Path.mkdir), {SHARD: "was replaced"}),
    "a link replaced by another file": (lambda out: rewrite(out / BAKED, flip), {BAKED: "content differs"}),
    "a link replaced by the file": (lambda out: rewrite(out / BAKED, lambda data: None), {}),
    "a link replaced by a folder": (lambda out: replace(out / BAKED, Path.mkdir), {BAKED: "was replaced"}),
    "a link that leads elsewhere": (
        lambda out: replace(out / BAKED, Path.symlink_to, f"../../{SHARD}"),
        {BAKED: "links elsewhere"},
    ),
    "a folder replaced by a link": (
        link_whole_folder,
        {
            **dict.fromkeys((SHARD, SECOND, INDEX, "transformer/config.json"), "is in a folder that was replaced"),
            "transformer": "is not in the manifest",
        },
    ),
    "a stray shard": (
        lambda out: (out / "transformer/model-00003.safetensors").write_bytes(b"x"),
        {"transformer/model-00003.safetensors": "is not in the manifest"},
    ),
    "a stray link to a folder": (
        lambda out: (out / "more").symlink_to("transformer"),
        {"more": "is not in the manifest"},
    ),
    "two at once": (
        lambda out: (rewrite(out / SHARD, flip), (out / LORA).unlink()),
        {SHARD: "content differs", LORA: "is missing"},
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_each_kind_of_fault_is_found_and_no_other(case: str, overlay: Path) -> None:
    change, expected = FAULTS[case]
    change(overlay)
    found = {fault.path: fault.problem for fault in verify(overlay, SILENT)}
    assert found.keys() == expected.keys()
    for path, problem in expected.items():
        assert problem in found[path] and ("hard-linked" in found[path]) == ("hard-linked" in problem)


def resealed(overlay: Path, path: str) -> None:
    """Make the manifest agree with the file as it is now, as someone editing both by hand would."""
    data = (overlay / path).read_bytes()
    record = FileRecord(path, len(data), blake3(data).hexdigest())
    document = json.loads((overlay / MANIFEST_NAME).read_bytes())
    for component in document["components"].values():
        component["files"] = [
            dataclasses.asdict(record) if entry["path"] == path else entry for entry in component["files"]
        ]
    (overlay / MANIFEST_NAME).write_text(json.dumps(document))


def forged(overlay: Path, path: str, data: bytes) -> dict[str, Fault]:
    """The faults, by path, of an overlay with ``data`` at ``path`` and in its manifest."""
    (overlay / path).write_bytes(data)
    resealed(overlay, path)
    return {fault.path: fault for fault in verify(overlay, SILENT)}


def test_content_that_the_manifest_agrees_with_and_that_does_not_fit(overlay: Path) -> None:
    document = json.loads((overlay / INDEX).read_bytes())
    sound, first = json.dumps(document).encode(), next(iter(document["weight_map"]))
    document["weight_map"][first] = Path(SECOND).name
    problem = f"does not fit its shards: 1 tensors, the first {first}"
    assert forged(overlay, INDEX, json.dumps(document).encode()) == {
        INDEX: Fault(INDEX, problem, Path(SHARD).name, Path(SECOND).name)
    }
    document["weight_map"][first] = "../x.safetensors"
    found = forged(overlay, INDEX, json.dumps(document).encode())
    assert found.keys() == {INDEX} and "names a shard that is not a plain" in found[INDEX].problem
    assert forged(overlay, INDEX, sound) == {}
    found = forged(overlay, SECOND, (overlay / SHARD).read_bytes())
    assert "is in another shard too" in found[SECOND].problem
    assert "links to other content" in found[BAKED].problem
    assert "is not a safetensors file" in forged(overlay, SECOND, b"PK\x03\x04" + bytes(100))[SECOND].problem


def test_unfinished_work_is_told_and_is_no_fault(overlay: Path, listener: Notes) -> None:
    (overlay / ".ltxpack/x.partial/files").mkdir(parents=True)
    (overlay / ".ltxpack/x.partial/files/a.safetensors").write_bytes(b"x")
    (overlay.parent / ".out.partial").mkdir()
    assert verify(overlay, listener) == []
    assert len(listener.notes) == 2
    (overlay / "transformer/.ltxpack").mkdir()
    (overlay / "transformer/.ltxpack/a.safetensors").write_bytes(b"x")
    assert verify(overlay, listener) == []
    assert listener.notes[-1] == "not the overlay's, and no damage: transformer/.ltxpack"


def test_files_of_systems_are_told_in_one_line_and_are_no_fault(overlay: Path, listener: Notes) -> None:
    for name in (".DS_Store", "transformer/._config.json", f"bakes/b/._{Path(SECOND).name}", ".git/config"):
        (overlay / name).parent.mkdir(exist_ok=True)
        (overlay / name).write_bytes(b"\0\5\x16\7")
    (overlay / "lost+found").mkdir(mode=0)
    (overlay / "notes.txt").write_bytes(b"the user's")
    assert [fault.path for fault in verify(overlay, listener)] == ["notes.txt"]
    names = f".DS_Store, .git, bakes/b/._{Path(SECOND).name}, transformer/._config.json"
    assert listener.notes == [f"not the overlay's, and no damage: {names}"]
    for number in range(20):
        (overlay / f"loras/._{number}.safetensors").write_bytes(b"x")
    assert len(verify(overlay, listener)) == 1
    assert listener.notes[-1].endswith(" and 14 more")


def test_progress_is_that_of_the_bytes_read(overlay: Path, listener: Notes) -> None:
    verify(overlay, listener)
    records = read_manifest(overlay).records()
    total = sum(record.size for record in records if record.path != BAKED)
    assert [phase[1:] for phase in listener.phases] == [["B", total, total]]


def mend(overlay: Path, items: list[Item]) -> tuple[list[str], Manifest]:
    manifest = read_manifest(overlay)
    paths = damaged(verify(overlay, SILENT), manifest)
    wanted = [item for item in items if item.path in paths]
    return [item.path for item in wanted], repair(wanted, overlay, manifest, SILENT)


@pytest.mark.parametrize("case", ["a flipped bit", "cut short", "grown", "missing", "a shard gone", "two at once",
                                  "replaced by a link"])  # fmt: skip
def test_repair_writes_only_what_is_damaged(case: str, overlay: Path, source: Path) -> None:
    before = tree(overlay)
    change, expected = FAULTS[case]
    change(overlay)
    inodes = {path: (overlay / path).lstat().st_ino for path in before if path not in expected}
    items = plan(source)
    repaired, _ = mend(overlay, items)
    assert repaired == [item.path for item in items if item.path in expected], "in the order of the plan"
    assert {*repaired, BAKED} >= expected.keys()
    assert tree(overlay) == before
    assert verify(overlay, SILENT) == []
    assert {path: (overlay / path).lstat().st_ino for path in inodes} == inodes
    assert [path.name for path in overlay.parent.iterdir()] == ["out"]


def test_repair_from_another_source_changes_nothing(overlay: Path, source: Path) -> None:
    change_source(overlay)
    before = tree(overlay)
    with pytest.raises(OverlayError, match="cannot be repaired: the source is not the one"):
        mend(overlay, plan(source))
    assert tree(overlay) == before


def test_repair_tells_the_manifest_when_a_link_became_a_copy(
    overlay: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (overlay / LORA).unlink()
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    _, manifest = mend(overlay, plan(source))
    assert manifest.loras[0].file.link is None
    assert read_manifest(overlay) == manifest
    assert verify(overlay, SILENT) == []


def test_repair_leaves_stray_files_and_folders_behind_links_alone(overlay: Path, source: Path) -> None:
    (overlay / "mine.txt").write_bytes(b"x")
    link_whole_folder(overlay)
    elsewhere = tree(overlay.parent / "elsewhere")
    with pytest.raises(OverlayError, match="is a link where only a folder may be"):
        mend(overlay, plan(source))
    assert tree(overlay.parent / "elsewhere") == elsewhere
    assert (overlay / "mine.txt").read_bytes() == b"x"
