"""materialize against a local server that speaks the hub's protocol, by the real hub client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Commit, HubServer
from materialize import quantised_source, tiny_source
from support import tree

from ltxpack.errors import OverlayError, SourceError, UnsupportedError
from ltxpack.ltx23.releases import DEFAULT_FILES, TEXT_ENCODER_REPO
from ltxpack.ltx23.renames import CHECKPOINT_TABLES
from ltxpack.manifest import read_manifest
from ltxpack.materialize import Options, materialize, plan_overlay, restore_base
from ltxpack.repack.verify import verify
from ltxpack.reporter import SilentReporter

REPO = "Lightricks/LTX-2.3"


def repos(source: Path) -> dict[str, dict[str, bytes | Path]]:
    """The source as the hub would hold it: published names, the text encoder in its own repo."""
    model: dict[str, bytes | Path] = {DEFAULT_FILES[role]: source / name for role, name in tiny_source.NAMES.items()}
    gemma = {path.name: path for path in (source / tiny_source.GEMMA).iterdir()}
    return {REPO: {**model, "README.md": b"text"}, TEXT_ENCODER_REPO: {**gemma}}


@pytest.fixture
def server(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(repos(source)) as running:
        running.use(monkeypatch, tmp_path / "cache")
        yield running


def test_an_overlay_from_the_hub_equals_the_one_from_the_files(
    server: HubServer, source: Path, out: Path, tmp_path: Path
) -> None:
    local = tmp_path / "local"
    materialize(Options(REPO, out), SilentReporter())
    materialize(Options(str(source), local), SilentReporter())
    for component in (*CHECKPOINT_TABLES, "latent_upsampler", "scheduler", "text_encoder", "tokenizer"):
        assert tree(out / component) == tree(local / component)
    assert verify(out, SilentReporter()) == []
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    manifest = read_manifest(out)
    assert (manifest.source.repo, manifest.source.revision) == (REPO, server.commit(REPO))
    for file in manifest.source.files:
        repo = TEXT_ENCODER_REPO if file.role == "text_encoder" else REPO
        assert (file.repo, file.revision) == (repo, server.commit(repo))
        assert file.sha256 or not file.name.endswith(".safetensors")
    assert [lora.file.path for lora in manifest.loras] == [f"loras/{DEFAULT_FILES['lora']}"]


def test_a_plan_moves_headers_only(server: HubServer, tmp_path: Path, out: Path) -> None:
    plan = plan_overlay(Options(REPO, out), SilentReporter()).to_json()
    assert plan["missing"] == [] and str(tmp_path) not in str(plan)
    sizes = {file["path"]: file["bytes"] for file in plan["files"]}
    sent = sum(request.sent for request in server.requests)
    assert sent < sum(sizes.values()) / 4
    materialize(Options(REPO, out), SilentReporter())
    assert not [request.path for request in server.requests if "README" in request.path]
    found = {path: len(content) for path, content in tree(out).items() if path != "ltxpack.json"}
    assert sizes == found


def test_the_same_again_needs_no_network(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: Path
) -> None:
    from huggingface_hub import constants

    materialize(Options(REPO, out), SilentReporter())
    before = len(server.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not materialize(Options(REPO, out), SilentReporter()).written
    assert len(server.requests) == before
    again = tmp_path / "again"
    materialize(Options(REPO, again), SilentReporter())
    assert tree(again / "transformer") == tree(out / "transformer")


def test_a_repair_takes_the_same_files_of_a_newer_commit(server: HubServer, source: Path, out: Path) -> None:
    """A repository whose history was squashed has no older commit."""
    materialize(Options(REPO, out, copy=True), SilentReporter())
    before, lora = tree(out), DEFAULT_FILES["lora"]

    def repaired_from(**files: bytes) -> dict[str, bytes]:
        server.commits[REPO]["main"] = Commit.of({**repos(source)[REPO], **files})
        (out / "loras" / lora).unlink()
        restore_base(out, read_manifest(out), [f"loras/{lora}"], SilentReporter())
        return tree(out)

    assert repaired_from(**{"README.md": b"other"}) == before
    with pytest.raises(SourceError, match="does not hold the lora") as caught:
        repaired_from(**{lora: b"other"})
    assert caught.value.next == f"ltxpack verify {out} --repair --source FOLDER"


def test_a_newer_commit_with_the_same_files_is_the_same_source(server: HubServer, source: Path, out: Path) -> None:
    """Most commits of a model's repository change its page alone."""
    materialize(Options(REPO, out), SilentReporter())
    server.commits[REPO]["main"] = Commit.of({**repos(source)[REPO], "README.md": b"other"})
    assert not materialize(Options(REPO, out), SilentReporter()).written
    lora = DEFAULT_FILES["lora"]
    changed = bytearray((source / tiny_source.LORA).read_bytes())
    changed[-1] ^= 1
    server.commits[REPO]["main"] = Commit.of({**repos(source)[REPO], lora: bytes(changed)})
    with pytest.raises(OverlayError, match=f"another lora than {lora}"):
        materialize(Options(REPO, out), SilentReporter())


@pytest.mark.parametrize("name", ["ltx-2.3-dev-fp8.safetensors", "LTX-2.3-dev-Q4_K_M.gguf"])
def test_an_unusable_checkpoint_is_refused_by_its_header(
    name: str, source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the repository holds none of the other inputs."""
    file = quantised_source.write(tmp_path / name, quantised_source.fp8(), quantised_source.METADATA)
    if name.endswith(".gguf"):
        file.write_bytes(b"GGUF\3\0\0\0" + file.read_bytes()[8:])
    with HubServer({"someone/repo": {name: file}, TEXT_ENCODER_REPO: repos(source)[TEXT_ENCODER_REPO]}) as server:
        server.use(monkeypatch, tmp_path / "cache")
        for within in ("someone/repo", f"someone/repo/{name}"):
            with pytest.raises(UnsupportedError, match=r"scaled fp8|GGUF") as caught:
                materialize(Options(within, out), SilentReporter())
            assert caught.value.next.startswith("ltxpack materialize Lightricks/LTX-2.3 OVERLAY")
    assert sum(request.sent for request in server.requests) < file.stat().st_size
    assert not out.exists()


def test_a_gated_text_encoder_is_told_before_the_first_weight(
    source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer(repos(source), gated={TEXT_ENCODER_REPO}) as server:
        server.use(monkeypatch, tmp_path / "cache")
        with pytest.raises(SourceError) as caught:
            materialize(Options(REPO, out), SilentReporter())
        assert TEXT_ENCODER_REPO in str(caught.value) and caught.value.next
        assert sum(request.sent for request in server.requests) < 100_000
        assert not out.exists()
        plan = plan_overlay(Options(REPO, out), SilentReporter()).to_json()
        assert [entry.split(":")[0] for entry in plan["missing"]] == ["text_encoder"]
