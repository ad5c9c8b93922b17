"""Places where a folder cannot be swapped: mount points, the current folder, other users' folders, layers, two disks.

By real mounts where the machine allows them; the kinds that need none run everywhere.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from materialize import tiny_source
from support import FORKS, Done, Mount, ltxpack, refused, tree

from ltxpack.cli import main
from ltxpack.manifest import MANIFEST_NAME, read_manifest

pytestmark = pytest.mark.usefixtures("short_prompts")

NOBODY = 65534


def said(done: Done) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_source.make_source(tmp_path / "source")


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """The overlay as it is in a folder of its own."""
    said(ltxpack("materialize", source, tmp_path / "usual/out", "--copy"))
    return tree(tmp_path / "usual/out")


def plain_folder(folder: Path, mount: Mount) -> None:
    folder.mkdir()


def own_disk(folder: Path, mount: Mount) -> None:
    mount(folder)


def new_disk(folder: Path, mount: Mount) -> None:
    mount(folder)
    (folder / "lost+found").mkdir(mode=0o700)


def same_disk_mounted_again(folder: Path, mount: Mount) -> None:
    (folder.parent / "behind").mkdir()
    mount(folder, "bind", source=folder.parent / "behind")


def below_a_read_only_disk(folder: Path, mount: Mount) -> None:
    mount(folder.parent)
    folder.mkdir()
    mount(folder)
    subprocess.run(["mount", "-o", "remount,ro", str(folder.parent)], check=True)


def upper_layer(folder: Path, mount: Mount) -> None:
    """A folder of an image's layer, seen through an overlayfs."""
    base = folder.parent / "layers"
    mount(base)
    for name in ("lower/out", "upper", "work"):
        (base / name).mkdir(parents=True)
    mount(folder.parent / "seen", "overlay", f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work")
    folder.symlink_to("seen/out")


PLACES = [plain_folder, own_disk, new_disk, same_disk_mounted_again, below_a_read_only_disk, upper_layer]


@pytest.mark.parametrize("place", PLACES)
def test_an_empty_folder_is_filled_and_replaced_where_it_is(
    place: Callable[[Path, Mount], None], mount: Mount, source: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "place/out"
    out.parent.mkdir()
    place(out, mount)
    os.chown(out, os.getuid(), os.getgid())
    out.chmod(0o2771)
    kept = (out.stat().st_ino, out.stat().st_mode)
    command = ["materialize", source, out, "--copy"]
    said(ltxpack(*command))
    assert tree(out) == whole
    assert "nothing to do" in said(ltxpack(*command))
    (out / "vae/mine.txt").write_bytes(b"the user's")
    said(ltxpack(*command, "--force"))
    assert tree(out) == whole | {"vae/mine.txt": b"the user's"}
    assert (out.stat().st_ino, out.stat().st_mode) == kept
    (out / "vae/mine.txt").unlink()
    damaged = next((out / "transformer").glob("*.safetensors"))
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    assert "every file as written" in said(ltxpack("verify", out, "--repair", "--source", source))
    assert tree(out) == whole
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_the_current_folder_is_filled(source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / ".DS_Store").write_bytes(b"of a system")
    said(ltxpack("materialize", source, ".", "--copy", cwd=here))
    said(ltxpack("materialize", source, ".", "--copy", "--force", cwd=here))
    assert tree(here) == whole | {".DS_Store": b"of a system"}


def as_users(runs: Sequence[tuple[int, Sequence[Sequence[str | Path]]]], told: Path) -> None:
    """Runs commands as one user after the other; ``told`` gets what the last one is told."""
    with told.open("w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        os.setgroups([])
        for user, commands in runs:
            os.setgid(user)
            os.setuid(user)
            file.seek(file.truncate(0))
            for command in commands:
                sys.argv = ["ltxpack", *map(str, command)]
                with contextlib.suppress(SystemExit):
                    main()


def told_nobody(*commands: Sequence[str | Path], by_root: Sequence[Sequence[str | Path]] = ()) -> str:
    """What another user is told; before, root runs the same or ``by_root`` and so imports what others may not read."""
    with tempfile.NamedTemporaryFile() as told:
        runs = ((0, by_root or commands), (NOBODY, commands))
        process = FORKS.Process(target=as_users, args=(runs, Path(told.name)))
        process.start()
        process.join()
        assert process.exitcode == 0
        return Path(told.name).read_text()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that any user may look at."""
    if os.geteuid():
        pytest.skip("needs to become another user")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def open_to_all(*folders: Path) -> None:
    for path in (each for folder in folders for each in (folder, *folder.rglob("*"))):
        path.chmod(0o755)


def test_another_user_fills_a_folder_whose_parent_is_not_his(place: Path, whole: dict[str, bytes]) -> None:
    """As in containers that run as nobody: the folder is his, what it lies in is root's."""
    source, out = tiny_source.make_source(place / "source"), place / "out"
    open_to_all(source)
    out.mkdir()
    os.chown(out, NOBODY, NOBODY)
    for more in ([], ["--force"]):
        command = ["materialize", source, out, "--copy", *more]
        assert "error: " not in told_nobody(command, by_root=[[*command, "--plan"]])
        assert tree(out) == whole
        assert {path.stat().st_uid for path in (out, *out.rglob("*"))} == {NOBODY}
    assert {path.name for path in place.iterdir()} == {"source", "out"}


def test_what_may_not_be_looked_at_is_told_as_that(place: Path, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(place)
    source, overlay, closed = (place / name for name in ("source", "overlay", "closed"))
    for made, folder in ((demo / "source", source), (demo / "overlay", overlay), (demo / "source", closed)):
        shutil.copytree(made, folder)
    open_to_all(source, overlay)
    closed.chmod(0o700)
    lora = next(closed.glob("*lora*.safetensors"))
    commands = [
        ["inspect", lora],
        ["materialize", closed, "out", "--plan"],
        ["materialize", lora, "out", "--plan"],
        ["materialize", source, "out", "--lora", lora],
        *(["bake-lora", overlay, "--strength", "1", "--plan", "--lora", at] for at in (lora, closed)),
    ]
    errors = [line for line in told_nobody(*commands).splitlines() if line.startswith("error: ")]
    assert len(errors) == len(commands)
    assert all("cannot be read: Permission denied" in line for line in errors), errors


def test_a_folder_of_an_overlay_that_may_not_be_looked_at_is_told_as_that(place: Path, demo: Path) -> None:
    """verify gave up at its first file, and both said to make room."""
    overlay = Path(shutil.copytree(demo / "overlay", place / "overlay"))
    open_to_all(overlay)
    (overlay / "vae").chmod(0o700)
    told = told_nobody(["verify", overlay], ["plan", overlay])
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert f"vae/{name}: Permission denied" in told, told
    assert "next: correct the permissions there" in told and "make room" not in told


def test_what_cannot_work_at_the_end_is_told_at_the_beginning(source: Path, tmp_path: Path, mount: Mount) -> None:
    """--force on an overlay one folder of which may not be written: nothing is read or written before that is told."""
    out = tmp_path / "out"
    said(ltxpack("materialize", source, out, "--copy"))
    before = tree(out)
    mount(out / "vae", "bind", source=out / "vae")
    subprocess.run(["mount", "-o", "remount,ro,bind", str(out / "vae")], check=True)
    message = refused(ltxpack("materialize", source, out, "--copy", "--force"), 1)
    assert "is on a read-only filesystem" in message and f"{out}/vae" in message
    assert tree(out) == before


def test_part_of_an_overlay_on_another_disk(
    source: Path, tmp_path: Path, mount: Mount, whole: dict[str, bytes]
) -> None:
    """Its files are moved one by one, as copies."""
    out = tmp_path / "out"
    said(ltxpack("materialize", source, out, "--copy"))
    shutil.rmtree(out / "transformer")
    mount(out / "transformer")
    said(ltxpack("verify", out, "--repair", "--source", source))
    assert tree(out) == whole
    said(ltxpack("materialize", source, out, "--copy", "--force"))
    assert tree(out) == whole and os.path.ismount(out / "transformer")


BAKE = ["--strength", "0.7"]


def test_bakes_on_a_disk_of_their_own(demo: Path, tmp_path: Path, mount: Mount) -> None:
    """The work is on that disk and needs its space, not the overlay's."""
    out = tmp_path / "out"
    mount(out, options="size=32m")
    shutil.copytree(demo / "overlay", out, symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(out / "bakes")
    manifest = json.loads((out / MANIFEST_NAME).read_bytes())
    (out / MANIFEST_NAME).write_text(json.dumps(manifest | {"bakes": {}}))
    mount(out / "bakes", options="size=500k")
    assert "the disk is too small" in refused(ltxpack("bake-lora", out, *BAKE), 1)
    (out / "ballast").write_bytes(bytes(shutil.disk_usage(out).free - 200_000))
    subprocess.run(["mount", "-o", "remount,size=64m", str(out / "bakes")], check=True)
    said(ltxpack("bake-lora", out, *BAKE))
    before = tree(out)
    said(ltxpack("bake-lora", out, *BAKE, "--force"))
    assert tree(out) == before
    (out / "ballast").unlink()
    assert "every file as written" in said(ltxpack("verify", out))
    assert [path.name for path in (out / "bakes").iterdir()] == ["distilled-0.7"]
    assert not (out / ".ltxpack").exists()
    config = out / "bakes/distilled-0.7/config.json"
    config.unlink()
    said(ltxpack("verify", out, "--repair"))
    assert tree(out) == {path: content for path, content in before.items() if path != "ballast"}


def test_bakes_of_an_overlay_in_the_layer_of_an_image(demo: Path, tmp_path: Path, mount: Mount) -> None:
    base, out = tmp_path / "layers", tmp_path / "seen/out"
    mount(base, options="size=200m")
    (base / "lower").mkdir()
    shutil.copytree(demo / "overlay", base / "lower/out", symlinks=True)
    lower = tree(base / "lower")
    for name in ("upper", "work"):
        (base / name).mkdir()
    mount(tmp_path / "seen", "overlay", f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work")
    said(ltxpack("bake-lora", out, *BAKE))
    said(ltxpack("bake-lora", out, "--strength", "0.5", "--force"))
    assert "every file as written" in said(ltxpack("verify", out))
    expected = {path.removeprefix("out/"): content for path, content in lower.items()}
    found = {path: content for path, content in tree(out).items() if "distilled-0.7" not in path}
    assert {path for path in found if found[path] != expected.get(path)} <= {MANIFEST_NAME}
    assert tree(base / "lower") == lower


def test_outputs_that_are_mount_points_keep_their_place(demo: Path, tmp_path: Path, mount: Mount) -> None:
    """As containers have single files: nothing can be renamed onto them."""
    for name in ("a.mp4", "a.safetensors", "whole.safetensors"):
        (tmp_path / "outside" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "outside" / name).write_bytes(b"older and longer than nothing")
        (tmp_path / name).touch()
        mount(tmp_path / name, "bind", source=tmp_path / "outside" / name)
    small = ["--device=cpu", "--dtype=float32", "--recipe=distilled", "--height=64", "--width=64"]
    small += ["--num-frames=9", "--prompt=boat"]
    outputs = ["-o", tmp_path / "a.mp4", "--save-tensors", tmp_path / "a.safetensors"]
    said(ltxpack("run", demo / "overlay", *small, *outputs))
    said(
        ltxpack("run", demo / "overlay", *small, "-o", tmp_path / "b.mp4", "--save-tensors", tmp_path / "b.safetensors")
    )
    assert (tmp_path / "outside/a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "outside/a.mp4").read_bytes()[4:8] == b"ftyp"
    said(ltxpack("export", demo / "overlay", "-o", tmp_path / "whole.safetensors", "--force"))
    said(ltxpack("export", demo / "overlay", "-o", tmp_path / "other.safetensors"))
    assert (tmp_path / "outside/whole.safetensors").read_bytes() == (tmp_path / "other.safetensors").read_bytes()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_output_that_cannot_be_made_is_told_before_anything_is(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def opened(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", opened)
    for command in (["run", "--prompt=boat", "-o", "a.mp4"], ["export", "-o", "a.safetensors"]):
        message = refused(ltxpack(command[0], demo / "overlay", *command[1:-1], tmp_path / command[-1]), 2)
        assert "is on a read-only filesystem" in message and "choose -o in another folder" in message


def test_commands_go_on_without_locks(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOTSUP, "Operation not supported")))
    source = demo / "source"
    for command in (
        ["materialize", source, out],
        ["bake-lora", out, *BAKE],
        ["verify", out],
        ["verify", out, "--repair", "--source", source],
        ["export", out, "-o", tmp_path / "whole.safetensors"],
    ):
        done = said(ltxpack(*command))
        assert "this filesystem has no locks (Operation not supported); run one ltxpack at a time on it" in done
    assert (tmp_path / "whole.safetensors").exists()


def test_materialize_where_nothing_can_be_linked(
    source: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((os, "link"), (os, "symlink"), (fcntl, "ioctl")):
        monkeypatch.setattr(module, name, mock.Mock(side_effect=OSError(errno.EOPNOTSUPP, "Operation not supported")))
    said(ltxpack("materialize", source, tmp_path / "out"))
    assert tree(tmp_path / "out") == whole
    assert {record.link for record in read_manifest(tmp_path / "out").records()} == {None}


def test_a_file_of_the_user_in_the_way_is_kept_on_the_disk_it_is_on(
    source: Path, tmp_path: Path, mount: Mount, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    mount(out)
    said(ltxpack("materialize", source, out, "--copy"))
    manifest = json.loads((out / MANIFEST_NAME).read_bytes())
    lora = manifest["loras"].pop()["file"]["path"]
    (out / MANIFEST_NAME).write_text(json.dumps(manifest))
    for content in (b"first", b"second"):
        (out / lora).unlink()
        (out / lora).write_bytes(content)
        assert "in the way of a new file" in said(ltxpack("materialize", source, out, "--copy", "--force"))
        (out / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert tree(out / ".kept") == {lora: b"first", f"{lora}~": b"second"}
    assert not (tmp_path / "out.kept").exists()
