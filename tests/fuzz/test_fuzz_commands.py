"""Whole commands on hostile files: ``materialize`` on a source, ``verify --repair`` on an overlay.

Each attempt works on files of its own that share their bytes with the templates by hard links, so that a file opened
for writing where it should have been replaced is seen. However it ends, it ends as a command may: exit status 0, 1 or
2, one paragraph that says why, nothing written outside the overlay, and an overlay called done verifies clean.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from fuzz_mutations import mutate
from fuzz_targets import LONGEST_MESSAGE, guard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import Done, load, ltxpack, tree

from ltxpack.manifest import MANIFEST_NAME

SMALL = ("--max-shard-size", "400kB")
# An attempt takes half a second, so these are few; each run of the tests makes others.
limited = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
randoms = st.integers(0, 2**32 - 1).map(random.Random)


@dataclass
class Files:
    """A sound ``source``, ``work/overlay`` with two bakes made from it, and ``strange``, which lies outside of both.

    The templates, or one attempt's files: of these only the overlay may be written.
    """

    folder: Path

    def __post_init__(self) -> None:
        self.source, self.strange, self.overlay = (self.folder / name for name in ("source", "strange", "work/overlay"))
        self.overlay.parent.mkdir(parents=True)

    def replace(self, path: Path, data: bytes) -> None:
        """Other bytes at ``path``, in a file of its own."""
        path.unlink(missing_ok=True)
        path.write_bytes(data)

    def run(self, *arguments: str | Path) -> Done:
        """The command, watched."""
        outside = (tree(self.source), tree(self.strange))
        watch = guard()
        watch.seen, watch.allowed = [], os.path.realpath(self.folder)
        try:
            done = ltxpack(*arguments)
        finally:
            watch.allowed = None
        assert not watch.seen, watch.seen[:3]
        assert (tree(self.source), tree(self.strange)) == outside
        beside = {path.name for path in self.overlay.parent.iterdir()}
        assert beside <= {"overlay", ".overlay.partial", "overlay.kept"}, beside
        ended_as_it_may(done)
        return done


@pytest.fixture(scope="module")
def templates(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    made = Files(tmp_path_factory.mktemp("commands"))
    shutil.copytree(demo / "source", made.source)
    prepare(made)
    before = tree(made.folder)
    yield made
    assert tree(made.folder) == before


def prepare(templates: Files) -> None:
    """Make the files, and have all modules imported: under the guard that would count as writing."""
    templates.strange.mkdir()
    (templates.strange / "config.json").write_text('{"not": "yours"}')
    finished(ltxpack("materialize", templates.source, templates.overlay, *SMALL))
    finished(ltxpack("bake-lora", templates.overlay, "--strength", "0.25"))
    lora = ("--lora", part_lora(templates), "--name", "part")
    finished(ltxpack("bake-lora", templates.overlay, "--strength", "1", *lora))
    [shard] = list(templates.overlay.glob("bakes/distilled-0.25/*-00001-*.safetensors"))
    shard.unlink()
    finished(ltxpack("verify", templates.overlay, "--repair", "--source", templates.source))


def part_lora(templates: Files) -> Path:
    """A LoRA of one linear: all but one shard of its bake are links."""
    whole = load(next(templates.source.glob("*-lora-*")))
    name = next(key for key in sorted(whole) if ".transformer_blocks.0." in key).partition(".lora_")[0]
    path = templates.strange / "part.safetensors"
    save_file({key: tensor.to(torch.bfloat16) for key, tensor in whole.items() if key.startswith(f"{name}.")}, path)
    return path


def finished(done: Done) -> None:
    assert done.returncode == 0, done.stderr


def ended_as_it_may(done: Done) -> None:
    """Exit status 0, 1 or 2; whoever fails says so in one printable paragraph that ends in what to do next."""
    told = done.stdout + done.stderr
    assert done.returncode in (0, 1, 2), told
    assert "Traceback" not in told
    assert told.replace("\n", "").isprintable(), ascii(told)
    if done.returncode:
        paragraph = done.stderr.partition("error: ")[2] or done.stdout
        assert paragraph, told
        assert "\n\n" not in paragraph and len(paragraph) < LONGEST_MESSAGE, paragraph
        assert "next: " in paragraph or "fault(s)" in paragraph, paragraph


@contextlib.contextmanager
def attempted(templates: Files, *, overlay: bool) -> Iterator[Files]:
    """An attempt, in a folder that goes with it."""
    with tempfile.TemporaryDirectory(dir=templates.folder.parent) as name:
        made = Files(Path(name))
        shutil.copytree(templates.source, made.source, copy_function=os.link)
        shutil.copytree(templates.strange, made.strange, copy_function=os.link)
        if overlay:
            shutil.copytree(templates.overlay, made.overlay, symlinks=True, copy_function=os.link)
        yield made


def change_source(attempt: Files, rng: random.Random) -> None:
    """One header, config or index is another; of a checkpoint, half of the time the config within its metadata."""
    names = ["*-dev.*", "*-dev.*", "*-dev.*", "*-lora-*", "*-upscaler-*", "gemma/*.safetensors", "gemma/*.json"]
    path = rng.choice(sorted(attempt.source.glob(rng.choice(names))))
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else len(data)
    head = metadata_changed(data[:end], rng) if end < len(data) and rng.random() < 0.5 else mutate(data[:end], rng)
    attempt.replace(path, head + data[end:])


def metadata_changed(head: bytes, rng: random.Random) -> bytes:
    """A header with one entry of its metadata changed: JSON in a string, or plain text."""
    try:
        header = json.loads(head[8:])
        key = rng.choice(sorted(header["__metadata__"]))
        value = header["__metadata__"][key].encode()
    except (ValueError, LookupError, TypeError, AttributeError):  # nothing that was not changed before
        return mutate(head, rng)
    header["__metadata__"][key] = mutate(value, rng).decode("utf-8", "replace")
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def edit_manifest(attempt: Files, rng: random.Random) -> None:
    path = attempt.overlay / MANIFEST_NAME
    attempt.replace(path, mutate(path.read_bytes(), rng))


def edit_file(attempt: Files, rng: random.Random) -> None:
    path = a_file(attempt, rng)
    attempt.replace(path, mutate(path.read_bytes(), rng))


def forge_file(attempt: Files, rng: random.Random) -> None:
    """Another file, and a manifest that says it is the right one."""
    path = a_file(attempt, rng)
    data = mutate(path.read_bytes(), rng)
    attempt.replace(path, data)
    manifest = attempt.overlay / MANIFEST_NAME
    text = manifest.read_text(errors="replace")
    for record in records(text):
        if record.get("path") == path.relative_to(attempt.overlay).as_posix():
            before = json.dumps(record, indent=1, sort_keys=True)
            after = json.dumps({**record, "size": len(data), "blake3": blake3(data).hexdigest()})
            text = re.sub(r"\s*".join(map(re.escape, before.split())), lambda _, after=after: after, text)
    attempt.replace(manifest, text.encode())


def records(text: str) -> list[dict[str, Any]]:
    """All objects with a path in a manifest, sound or not."""
    found: list[dict[str, Any]] = []

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        node = dict(pairs)
        if "blake3" in node and isinstance(node.get("path"), str):
            found.append(node)
        return node

    with contextlib.suppress(ValueError, RecursionError):
        json.loads(text, object_pairs_hook=look)
    return found


def remove_file(attempt: Files, rng: random.Random) -> None:
    a_file(attempt, rng).unlink()


def remove_folder(attempt: Files, rng: random.Random) -> None:
    folder = a_file(attempt, rng).parent
    if folder != attempt.overlay:
        shutil.rmtree(folder)


def link_file(attempt: Files, rng: random.Random) -> None:
    path = a_file(attempt, rng)
    path.unlink()
    path.symlink_to(rng.choice((attempt.strange / "config.json", attempt.strange, "nowhere", path.name, "..")))


def link_folder(attempt: Files, rng: random.Random) -> None:
    path = a_file(attempt, rng).parent
    if path != attempt.overlay:
        shutil.rmtree(path)
        path.symlink_to(attempt.strange)


def folder_for_file(attempt: Files, rng: random.Random) -> None:
    path = a_file(attempt, rng)
    path.unlink()
    path.mkdir()
    if rng.random() < 0.5:
        (path / "mine.txt").write_text("mine")


def pipe_for_file(attempt: Files, rng: random.Random) -> None:
    """Whoever opens it for reading would wait for ever."""
    path = a_file(attempt, rng)
    path.unlink()
    os.mkfifo(path)


def stray_file(attempt: Files, rng: random.Random) -> None:
    path = a_file(attempt, rng).with_name(rng.choice(("mine.safetensors", "x.json", "\x1b[2J.json", "a\nb")))
    path.write_bytes(b"mine")


def unfinished_bake(attempt: Files, rng: random.Random) -> None:
    """What a killed command may leave, made up."""
    work = attempt.overlay / ".ltxpack" / rng.choice(("x.partial", "part.partial", "distilled-0.25.partial"))
    if work.exists():
        return
    work.mkdir(parents=True)
    if rng.random() < 0.1:
        os.mkfifo(work / "journal.jsonl")
        return
    some = [path.relative_to(attempt.overlay).as_posix() for path in rng.choices(all_files(attempt), k=3)]
    first = json.dumps({"journal": 1, "fingerprint": "x"}).encode()
    line = json.dumps({"publishing": [*some, "../config.json", "config.json"]}).encode()
    lines = [first, mutate(first, rng), line, line, mutate(line, rng), b"[" * 100_000]
    (work / "journal.jsonl").write_bytes(b"\n".join([first, *rng.choices(lines, k=rng.randrange(1, 4)), b""]))
    for folder in rng.choices(("files", "old", "files/bakes/part", "files/bakes/x"), k=rng.randrange(3)):
        (work / folder).mkdir(parents=True, exist_ok=True)
        (work / folder / "config.json").write_text("{}")
    if rng.random() < 0.2 and not (work / "old").exists():
        (work / "old").symlink_to(attempt.strange)


def all_files(attempt: Files) -> list[Path]:
    """The overlay's files and links."""
    found = (Path(folder, name) for folder, _, names in os.walk(attempt.overlay) for name in names)
    return sorted(path for path in found if path.is_file() and path.name != MANIFEST_NAME)


def a_file(attempt: Files, rng: random.Random) -> Path:
    """One of them; small components have as many chances as the transformer's many shards."""
    files = all_files(attempt)
    folder = rng.choice(sorted({path.parent for path in files}))
    return rng.choice([path for path in files if path.parent == folder])


DAMAGES = (
    *(edit_manifest, edit_manifest, edit_manifest, edit_file, edit_file, forge_file, forge_file),
    *(remove_file, remove_folder, link_file, link_folder, folder_for_file, pipe_for_file, stray_file, unfinished_bake),
)


@limited
@given(rng=randoms)
def test_a_changed_source_is_materialized_whole_or_refused(templates: Files, rng: random.Random) -> None:
    """Materialize what was changed; where it is taken, the overlay must be sound, and is there already."""
    with attempted(templates, overlay=False) as attempt:
        for _ in range(rng.choice((1, 1, 1, 2))):
            change_source(attempt, rng)
        command = ("materialize", attempt.source, attempt.overlay, *SMALL)
        done = attempt.run(*command)
        assert (attempt.overlay / MANIFEST_NAME).exists() == (done.returncode == 0)
        if done.returncode == 0:
            finished(attempt.run("verify", attempt.overlay))
            finished(attempt.run(*command))


@limited
@given(rng=randoms)
def test_a_damaged_overlay_is_replaced_or_left_alone(templates: Files, rng: random.Random) -> None:
    """Materialize in the place of a damaged overlay; files that are not ltxpack's stay, and nothing else is wrong."""
    with attempted(templates, overlay=True) as attempt:
        rng.choice(DAMAGES)(attempt, rng)
        if rng.random() < 0.2:
            change_source(attempt, rng)
        force = ("--force",) if rng.random() < 0.7 else ()
        done = attempt.run("materialize", attempt.source, attempt.overlay, *SMALL, *force)
        if done.returncode == 0 and force:
            told = attempt.run("verify", attempt.overlay).stdout.splitlines()
            faults = [line for line in told if not line.startswith((f"{attempt.overlay}: ", "  next: "))]
            assert all(line.endswith(": is not in the manifest") for line in faults), faults


@limited
@given(rng=randoms)
def test_a_damaged_overlay_is_repaired_or_its_faults_are_told(templates: Files, rng: random.Random) -> None:
    """Repair what was damaged; where that is said to be done, a second look finds nothing."""
    with attempted(templates, overlay=True) as attempt:
        for _ in range(rng.choice((1, 1, 2, 3))):
            rng.choice(DAMAGES)(attempt, rng)
        if rng.random() < 0.2:
            change_source(attempt, rng)
        lora = ("--lora", attempt.strange / "part.safetensors")
        done = attempt.run("verify", attempt.overlay, "--repair", "--source", attempt.source, *lora)
        if done.returncode == 0:
            finished(attempt.run("verify", attempt.overlay))
