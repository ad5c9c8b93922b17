"""Stop at any change of the disk and go on: the same bytes in the end, nothing wrong to be seen in between."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from repack_support import Dead, bake, dying_at, make_source, materialize, plan
from support import Notes, tree
from test_range_engine import fill_disk

from ltxpack.errors import FormatError, OverlayError, SourceError
from ltxpack.files.publish import BYTES_PER_FILE
from ltxpack.manifest import MANIFEST_NAME, FileRecord, read_manifest
from ltxpack.repack import staging as staging_module
from ltxpack.repack import write as execute_module
from ltxpack.repack.items import CopyFile, WriteBytes, WriteShard, fingerprint
from ltxpack.repack.lock import OverlayLock
from ltxpack.repack.staging import Journal, Staging, recover, unfinished
from ltxpack.repack.verify import verify
from ltxpack.repack.write import execute, preflight, write_shard
from ltxpack.reporter import SilentReporter

SILENT = SilentReporter()


def changes_of(work: Callable[..., object], *arguments: Any, dying: int) -> int:
    """How often ``work`` changes the disk on a machine that dies at the change ``dying``; 0 if it does die."""
    with contextlib.suppress(Dead), dying_at(dying) as count:
        work(*arguments)
        return count()
    return 0


def die_again(chance: random.Random, work: Callable[..., object], *arguments: Any) -> None:
    """Attempt ``work`` some times on a machine that dies soon, a little later each time."""
    for life in range(chance.randint(0, 3)):
        with contextlib.suppress(Dead), dying_at(chance.randint(1, 10 + 20 * life)):
            work(*arguments)


@pytest.fixture
def tmp_path(memory: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """The overlay as it is when nothing goes wrong."""
    materialize(source, tmp_path / "undisturbed/out")
    return tree(tmp_path / "undisturbed/out")


def test_an_undisturbed_run_leaves_the_overlay_and_nothing_else(source: Path, tmp_path: Path) -> None:
    manifest = materialize(source, tmp_path / "a/out", copy=True)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert set(tree(tmp_path / "a/out")) == {record.path for record in manifest.records()} | {MANIFEST_NAME}
    assert read_manifest(tmp_path / "a/out") == manifest
    assert verify(tmp_path / "a/out", SILENT) == []
    materialize(source, tmp_path / "b/out", copy=True)
    assert tree(tmp_path / "a/out") == tree(tmp_path / "b/out")


@pytest.fixture(params=["one filesystem", "two filesystems"])
def disks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two filesystems nothing can be renamed out of a staging folder or into one."""

    def crossing(real: Callable[..., None]) -> Callable[..., None]:
        def renamed(source: Any, target: Any) -> None:
            if (f".partial{os.sep}files" in str(source)) != (f".partial{os.sep}files" in str(target)):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
            real(source, target)

        return renamed

    for name in ("rename", "replace") if request.param == "two filesystems" else ():
        monkeypatch.setattr(os, name, crossing(getattr(os, name)))


def seen(target: Path) -> dict[str, bytes]:
    """The files of an overlay without begun work and the trials of those who died."""
    hidden = {path for path in tree(target) if path.startswith(".ltxpack/") or path.endswith(".trial")}
    return {path: content for path, content in tree(target).items() if path not in hidden}


@pytest.mark.usefixtures("disks")
@pytest.mark.parametrize("there", [False, True], ids=["a new folder", "an empty folder"])
def test_dying_at_every_change_of_the_disk(there: bool, source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    chance = random.Random(3)
    for change in itertools.count(1):
        target = tmp_path / str(change) / "out"
        target.parent.mkdir()
        if there:
            target.mkdir()
        if count := changes_of(materialize, source, target, dying=change):
            break
        assert MANIFEST_NAME not in seen(target) or seen(target) == whole
        if MANIFEST_NAME not in seen(target):
            die_again(chance, remade, source, target)
            remade(source, target)
        else:
            recovered(target)
            assert not unfinished(target)
        assert tree(target) == whole
        assert {path.name for path in target.parent.iterdir()} == {"out"}
    assert change == count + 1 > 60


def test_what_is_complete_is_not_written_again(
    source: Path, tmp_path: Path, listener: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = plan(source)
    shards = [item for item in items if isinstance(item, WriteShard)]
    written: list[str] = []

    def noted(item: WriteShard, *rest: object, **more: object) -> FileRecord:
        if item is shards[-1]:
            raise KeyboardInterrupt
        written.append(item.path)
        return write_shard(item, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(execute_module, "write_shard", noted)
    with (
        pytest.raises(KeyboardInterrupt),
        OverlayLock(tmp_path / "out") as lock,
        Staging(lock, fingerprint(items), listener) as staging,
    ):
        execute(items, staging, copy=False, reporter=listener)
    assert written == [shard.path for shard in shards[:-1]]
    assert "the same command goes on" in listener.notes[-1]

    # One finished shard is damaged meanwhile: that one and the last are written again, the others are kept.
    damaged = tmp_path / ".out.partial/files" / shards[0].path
    damaged.write_bytes(bytes(damaged.stat().st_size))
    (damaged.parent / "stray.safetensors").write_bytes(b"left by the dead")
    written.clear()
    materialize(source, tmp_path / "out", listener)
    assert written == [shards[0].path, shards[-1].path]
    assert verify(tmp_path / "out", SILENT) == []


def test_another_plan_starts_over(source: Path, tmp_path: Path, listener: Notes) -> None:
    with pytest.raises(Dead), dying_at(40):
        materialize(source, tmp_path / "out")
    make_source(source / "lora.safetensors", [("down.weight", "BF16", (4, 4))], seed=9)
    os.utime(source / "lora.safetensors", (1, 1))
    materialize(source, tmp_path / "out", listener)
    assert "other inputs is discarded" in listener.notes[0]
    assert (tmp_path / "out/loras/lora.safetensors").read_bytes() == (source / "lora.safetensors").read_bytes()
    assert verify(tmp_path / "out", SILENT) == []


@pytest.mark.parametrize(
    "torn",
    [
        b"", b"{", b'{"path": "../../x", "size": 1, "blake3": "", "link": null}\n', b"\xff\n[]\n1\n",
        b"[" * 100_000 + b"\n", b'{"path": "x.json", "size": "1", "blake3": "", "link": null}\n',
    ],
    ids=lambda torn: ascii(torn[:20]),
)  # fmt: skip
def test_a_torn_or_forged_journal_is_believed_only_as_far_as_it_can_be_checked(
    torn: bytes, source: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    with pytest.raises(Dead), dying_at(45):
        materialize(source, tmp_path / "out")
    with (tmp_path / ".out.partial/journal.jsonl").open("ab") as journal:
        journal.write(torn)
    materialize(source, tmp_path / "out")
    assert tree(tmp_path / "out") == whole


def remade(source: Path, target: Path) -> None:
    materialize(source, target, force=True)


def recovered(target: Path) -> None:
    with OverlayLock(target):
        recover(target, SILENT)


def replaced_overlay(tmp_path: Path, name: str) -> tuple[Path, dict[str, bytes]]:
    """An overlay of another source, with a file of the user's in it."""
    other = tmp_path / name / "other"
    other.mkdir(parents=True)
    make_source(other / "model.safetensors", [(f"old.{number}", "BF16", (5, 5)) for number in range(9)])
    make_source(other / "lora.safetensors", [("old", "BF16", (4, 4))])
    target = tmp_path / name / "home/out"
    materialize(other, target)
    (target / "transformer/mine.txt").write_bytes(b"the user's")
    (target / "notes").mkdir()
    (target / "notes/n.md").write_bytes(b"the user's too")
    return target, tree(target)


@pytest.mark.usefixtures("disks")
def test_replacing_an_overlay_dying_at_every_change(source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    mine = {"transformer/mine.txt": b"the user's", "notes/n.md": b"the user's too"}
    chance = random.Random(4)
    for change in itertools.count(61):  # everything before happens in the staging folder, as in the test above
        target, old = replaced_overlay(tmp_path, str(change))
        if count := changes_of(remade, source, target, dying=change):
            break
        found = seen(target)
        assert MANIFEST_NAME not in found or old.items() <= found.items() or whole.items() <= found.items()
        assert mine.items() <= found.items()
        die_again(chance, recovered, target)
        recovered(target)
        assert seen(target) in (old, whole | mine)
        if seen(target) == old:
            materialize(source, target, force=True)
        assert tree(target) == whole | mine
        assert {path.name for path in target.parent.iterdir()} == {"out"}
    assert tree(target) == whole | mine
    assert change == count + 1 > 80


def test_force_is_needed_and_takes_only_overlays(source: Path, tmp_path: Path, listener: Notes) -> None:
    target = tmp_path / "home/out"
    target.mkdir(parents=True)
    materialize(source, target)  # an empty folder is as good as none
    with pytest.raises(OverlayError, match="--force"):
        materialize(source, target)
    (target / MANIFEST_NAME).unlink()
    for force in (False, True):
        with pytest.raises(OverlayError, match="not an overlay"):
            materialize(source, target, force=force)
    file = tmp_path / "file"
    file.write_bytes(b"x")
    with pytest.raises(OverlayError, match="not a folder"):
        materialize(source, file, force=True)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["out"]


def test_a_foreign_file_in_the_way_is_kept_aside(source: Path, tmp_path: Path, listener: Notes) -> None:
    target, _ = replaced_overlay(tmp_path, "x")
    manifest = read_manifest(target)
    lora = manifest.loras[0].file.path
    (target / MANIFEST_NAME).write_bytes(dataclasses.replace(manifest, loras=()).dump())
    materialize(source, target, listener, force=True)
    assert (target.parent / "out.kept" / lora).is_file()
    assert any("in the way" in warning for warning in listener.warnings)
    assert (target / lora).read_bytes() == (source / "lora.safetensors").read_bytes()


def test_a_link_among_the_folders_of_the_old_version_is_not_followed(source: Path, tmp_path: Path) -> None:
    target, _ = replaced_overlay(tmp_path, "x")
    elsewhere = tmp_path / "elsewhere"
    (target / "transformer").rename(elsewhere)
    (target / "transformer").symlink_to(elsewhere)
    before = tree(elsewhere)
    materialize(source, target, force=True)
    assert tree(elsewhere) == before
    assert not (target / "transformer").is_symlink()
    assert verify(target, SILENT) == [] or {fault.path for fault in verify(target, SILENT)} == {"notes/n.md"}


def test_an_overlay_behind_a_link_is_replaced_where_it_is(source: Path, tmp_path: Path) -> None:
    (tmp_path / "big/out").mkdir(parents=True)
    (tmp_path / "link").symlink_to("big/out")
    materialize(source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert verify(tmp_path / "big/out", SILENT) == []


# Bakes: two at once, one of them new, one replacing an old one.


@pytest.mark.usefixtures("disks")
def test_adding_and_replacing_bakes_dying_at_every_change(source: Path, tmp_path: Path) -> None:
    pristine = tmp_path / "pristine"
    materialize(source, pristine)
    bake(pristine, ("kept", "old"), b"first")
    (pristine / "bakes/old/mine.txt").write_bytes(b"the user's")
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(pristine, undisturbed, symlinks=True)
    bake(undisturbed, ("old", "new"), b"second", force=True)
    whole = tree(undisturbed)
    assert whole["bakes/old/mine.txt"] == b"the user's"
    assert whole["bakes/old/config.json"] == whole["bakes/new/config.json"] == b"second"
    assert not (undisturbed / ".ltxpack").exists()
    chance = random.Random(5)
    for change in itertools.count(1):
        target = tmp_path / str(change)
        shutil.copytree(pristine, target, symlinks=True)
        if count := changes_of(bake, target, ("old", "new"), b"second", True, dying=change):
            break
        # At every moment the manifest names only what is whole.
        faults = verify(target, SILENT)
        assert {fault.problem for fault in faults} <= {"is not in the manifest"}, change
        assert "kept" in read_manifest(target).bakes
        die_again(chance, bake, target, ("old", "new"), b"second", True)
        bake(target, ("old", "new"), b"second", force=True)
        assert tree(target) == whole, change
    assert change == count + 1 > 60


def test_a_bake_that_exists_needs_force_and_a_stray_folder_does_not(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    materialize(source, target)
    bake(target, ("a",), b"1")
    with pytest.raises(OverlayError, match="exists already"):
        bake(target, ("a",), b"2")
    (target / "bakes/b").mkdir()
    (target / "bakes/b/mine.txt").write_bytes(b"x")
    bake(target, ("b",), b"1")
    assert (target / "bakes/b/mine.txt").read_bytes() == b"x"
    assert [fault.path for fault in verify(target, SILENT)] == ["bakes/b/mine.txt"]


@pytest.mark.parametrize("link", [".ltxpack", "bakes", ".ltxpack/a.partial", ".ltxpack/a.partial/files"])
def test_links_planted_in_an_overlay_lead_nowhere(link: str, source: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    materialize(source, target)
    elsewhere.mkdir()
    (elsewhere / "precious").write_bytes(b"x")
    (elsewhere / "a").mkdir()
    (elsewhere / "a/config.json").write_bytes(b"x")
    before = tree(elsewhere)
    (target / link).parent.mkdir(parents=True, exist_ok=True)
    (target / link).symlink_to(elsewhere)
    with pytest.raises(OverlayError, match="is a link where only a folder may be"):
        bake(target, ("a",), b"1", force=True)
    assert tree(elsewhere) == before


@pytest.mark.parametrize("name", ["...partial", "..partial", ".partial", "base.partial", "a\nb.partial"])
def test_a_journal_planted_in_an_overlay_removes_nothing(name: str, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    manifest = materialize(source, target)
    (target / "bakes").mkdir()
    work = target / ".ltxpack" / name
    (work / "files/bakes").mkdir(parents=True)
    lines = [{"journal": 1, "fingerprint": "x"}, {"publishing": [record.path for record in manifest.records()]}]
    (work / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for staged in (None, manifest.dump(), manifest.dump().replace(b"2.3.0", b"2.3.1")):
        if staged is not None and work.is_dir():
            (work / "files/ltxpack.json").write_bytes(staged)
        recovered(target)
        assert verify(target, SILENT) == []


JOURNAL = b'{"journal": 1, "fingerprint": "x"}\n'


@pytest.mark.parametrize(
    "content",
    [None, JOURNAL + b"[" * 100_000 + b"\n", JOURNAL + b"{}," * 500_000 + b"\n", JOURNAL * 200_000, b"\n" * 100],
    ids=["pipe", "deep", "many", "long", "empty lines"],
)
def test_a_journal_of_no_sense_is_neither_waited_for_nor_parsed(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    state = Journal.read(path)
    assert (state.records, state.replaced) == ({}, None)


# Locks, space, permissions.


def test_a_second_process_is_told_who_holds_the_overlay(source: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from ltxpack.repack.lock import OverlayLock\n"
        "with OverlayLock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OverlayError, match=f"process {holder.pid} on ") as caught:
            materialize(source, tmp_path / "out")
        assert "in use by another ltxpack" in str(caught.value)
        holder.kill()
    # The lock of the dead does not hold anyone up.
    materialize(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"x")
    (tmp_path / ".out.lock").symlink_to(precious)
    with pytest.raises(OverlayError, match="cannot be written: Too many levels"), OverlayLock(tmp_path / "out"):
        pass
    assert precious.read_bytes() == b"x"


def test_a_lock_that_says_nonsense_names_no_process(tmp_path: Path) -> None:
    with OverlayLock(tmp_path / "out"):
        for nonsense in (b"[" * 4096, b'{"pid": null}', b"\xff"):
            (tmp_path / ".out.lock").write_bytes(nonsense)
            with pytest.raises(OverlayError, match="in use by another ltxpack") as caught:
                OverlayLock(tmp_path / "out").__enter__()
            assert caught.value.found is None


def test_the_lock_is_the_same_whoever_may_write_beside_the_overlay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two users, one may write only inside the overlay."""
    out = tmp_path / "out"
    out.mkdir()
    for first, second in itertools.product(("owner", "guest"), repeat=2):
        locks = []
        for user in (first, second):
            with monkeypatch.context() as patch:
                patch.setattr(os, "access", lambda path, mode, user=user: user == "owner" or path != tmp_path)
                if locks:
                    with pytest.raises(OverlayError, match="in use by another ltxpack"):
                        OverlayLock(out).__enter__()
                else:
                    locks.append(OverlayLock(out).__enter__())
        assert (tmp_path / ".out.lock").exists() == (first == "owner")
        locks[0].__exit__(None, None, None)
    assert list(out.iterdir()) == [] and list(tmp_path.iterdir()) == [out]


def test_a_replaced_overlay_is_held_until_the_end(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for those who may not write beside it."""
    out, place, tried = tmp_path / "out", staging_module._place, []
    materialize(source, out)

    def place_and_look(*arguments: Any) -> None:
        place(*arguments)
        with monkeypatch.context() as patch, pytest.raises(OverlayError, match="in use"):
            patch.setattr(os, "access", lambda path, mode: path != tmp_path)
            tried.append(OverlayLock(out).__enter__())

    monkeypatch.setattr(staging_module, "_place", place_and_look)
    materialize(source, out, force=True)
    assert tried == [] and not verify(out, SILENT)


def test_verifying_waits_for_nobody_who_reads(source: Path, tmp_path: Path) -> None:
    materialize(source, tmp_path / "out")
    with OverlayLock(tmp_path / "out", shared=True):
        assert verify(tmp_path / "out", SILENT) == []
        with pytest.raises(OverlayError, match="in use"):
            materialize(source, tmp_path / "out", force=True)
    with OverlayLock(tmp_path / "out"), pytest.raises(OverlayError, match="in use"):
        verify(tmp_path / "out", SILENT)


@pytest.mark.parametrize("code", ["ENOLCK", "EBADF", "EIO", "ENOSYS", "EACCES", "ESTALE", "EREMOTEIO"])
def test_a_filesystem_without_locks_is_told_once(
    code: str, source: Path, tmp_path: Path, listener: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = OSError(getattr(errno, code), "refused")
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=problem))
    materialize(source, tmp_path / "out", listener)
    why = "this filesystem has no locks (refused); run one ltxpack at a time on it"
    assert listener.notes == [f"{tmp_path}/.out.lock: {why}"]
    assert verify(tmp_path / "out", listener) == []
    assert listener.notes[1:] == [f"{tmp_path}/out: {why}"]


def test_a_lock_file_that_cannot_be_made_or_filled_stops_nobody(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def opened(path: Any, flags: int, *mode: Any, **more: Any) -> int:
        if str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *mode, **more)

    materialize(source, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opened)
        materialize(source, tmp_path / "out", force=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", mock.Mock(side_effect=OSError(errno.ENOSPC, "full")))
        materialize(source, tmp_path / "out", force=True)
    assert verify(tmp_path / "out", SILENT) == []


def test_preflight_refuses_before_the_first_byte(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = plan(source)
    written = sum(item.size for item in items if not isinstance(item, CopyFile))
    copied = sum(item.size for item in items)

    class Usage:
        free = written + len(items) * BYTES_PER_FILE

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    preflight(items, tmp_path / "not/there/yet", copy=False)
    with pytest.raises(OverlayError, match=f"expected {copied} bytes free, found {Usage.free} bytes"):
        materialize(source, tmp_path / "out", copy=True)
    Usage.free -= 1
    with pytest.raises(OverlayError, match=f"expected {written} bytes free"):
        preflight(items, tmp_path, copy=False)
    monkeypatch.undo()
    preflight(items, tmp_path, copy=True)
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path or not mode & os.W_OK)
    with pytest.raises(OverlayError, match="may not be written"):
        preflight(items, tmp_path / "out", copy=False)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()


def test_preflight_looks_at_the_sources(source: Path, tmp_path: Path) -> None:
    items, path = plan(source), source / "model.safetensors"
    os.truncate(path, path.stat().st_size - 5)
    for error, told in (
        (FormatError, "truncated: 5 bytes are missing"), (SourceError, "does not exist"), (SourceError, "is a folder")
    ):  # fmt: skip
        with pytest.raises(error, match=told):
            preflight(items, tmp_path, copy=False)
        path.unlink() if path.is_file() else path.mkdir(exist_ok=True)


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "a\\b", "transformer/config.json", ""])
def test_a_plan_that_leaves_the_overlay_is_refused(path: str, source: Path, tmp_path: Path) -> None:
    items = [*plan(source), WriteBytes(path, b"")]
    with (
        pytest.raises(OverlayError, match="not a path inside the overlay"),
        OverlayLock(tmp_path / "out") as lock,
        Staging(lock, "f", SILENT) as staging,
    ):
        execute(items, staging, copy=False, reporter=SILENT)


@pytest.mark.parametrize("real", [True, False])
def test_a_disk_that_fills_up_meanwhile(
    real: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    source, disk = tmp_path / "source", tmp_path / "disk"
    source.mkdir()
    make_source(source / "model.safetensors", [(f"t{number}", "BF16", (100, 500)) for number in range(4)])
    make_source(source / "lora.safetensors", [("t", "BF16", (4, 4))])
    monkeypatch.setattr(execute_module, "preflight", lambda *_, **__: 0)  # as if another program filled it later
    if real:
        request.getfixturevalue("mount")(disk, options="size=256k")
    else:
        fill_disk(monkeypatch, 250_000, errno.ENOSPC)
    with pytest.raises(OverlayError, match="disk is full") as caught:
        materialize(source, disk / "out", copy=True)
    assert "run the same command again: finished files are kept" in str(caught.value)
    assert not (disk / "out").exists()
    assert not list((disk / ".out.partial").rglob("*.tmp"))
    kept = list((disk / ".out.partial").rglob("*.safetensors"))
    assert len(kept) == 2
    # A larger disk: the work goes on where it was.
    monkeypatch.undo()
    if real:
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    before = {path.stat().st_ino for path in kept}
    materialize(source, disk / "out", copy=True)
    assert verify(disk / "out", SILENT) == []
    assert before <= {path.stat().st_ino for path in (disk / "out").rglob("*.safetensors")}
