"""Damaged files of the base are made again from the inputs that the manifest records, and from no others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from materialize import tiny_source
from materialize.fake_hub import FakeHub
from support import tree

from ltxpack.errors import OverlayError, SourceError
from ltxpack.ltx23.releases import TEXT_ENCODER_REPO
from ltxpack.manifest import read_manifest
from ltxpack.materialize import Options, materialize, restore_base
from ltxpack.reporter import SilentReporter

QUIET = SilentReporter()
REPO, OTHERS = "someone/model", "someone/others"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_source.make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def repos(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | SourceError]:
    """The source as a repo, another checkpoint and another LoRA in a second one, the text encoder in a third."""
    others = tiny_source.make_source(tmp_path_factory.mktemp("others"), seed=1)
    (others / "mine").mkdir()
    for name in (tiny_source.CHECKPOINT, tiny_source.LORA):
        (others / name).rename(others / "mine" / f"other-{name}")
    return {REPO: source, OTHERS: others, TEXT_ENCODER_REPO: source / tiny_source.GEMMA}


@pytest.fixture
def hub(repos: dict[str, Path | SourceError]) -> FakeHub:
    return FakeHub(repos)


@pytest.fixture(scope="module")
def of_others(repos: dict[str, Path | SourceError], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An overlay made from another checkpoint and LoRA than the defaults."""
    out = tmp_path_factory.mktemp("made") / "out"
    checkpoint, lora = (f"{OTHERS}/mine/other-{name}" for name in (tiny_source.CHECKPOINT, tiny_source.LORA))
    options = Options(REPO, out, checkpoint=checkpoint, lora=lora, max_shard_size=100_000, copy=True)
    materialize(options, QUIET, FakeHub(repos))
    return out


@pytest.fixture
def out(of_others: Path, tmp_path: Path) -> Path:
    """A copy of that overlay."""
    return Path(shutil.copytree(of_others, tmp_path / "out"))


def damaged(overlay: Path, *names: str) -> dict[str, bytes]:
    """Remove ``names``; what the overlay held before."""
    before = tree(overlay)
    for name in names:
        (overlay / name).unlink()
    return before


def test_another_checkpoint_and_lora_than_the_defaults_are_found(hub: FakeHub, out: Path) -> None:
    manifest = read_manifest(out)
    names = [record.path for record in manifest.records()]
    before = damaged(out, *names)
    restore_base(out, manifest, names, QUIET, hub=hub)
    assert tree(out) == before
    assert {repo for what, repo, _ in hub.asked if what == "files"} == {REPO, OTHERS, TEXT_ENCODER_REPO}
    assert {revision for what, _, revision in hub.asked if what == "files"} == {
        file.revision for file in manifest.source.files
    }


@pytest.mark.parametrize(
    ("name", "fetched"),
    [
        ("model_index.json", []),
        ("scheduler/scheduler_config.json", []),
        ("vae/config.json", []),
        ("source/metadata.json", []),
        ("transformer/diffusion_pytorch_model.safetensors.index.json", []),
        ("latent_upsampler/config.json", []),
        ("tokenizer/tokenizer.json", ["tokenizer.json"]),
        (f"loras/other-{tiny_source.LORA}", [f"mine/other-{tiny_source.LORA}"]),
        ("transformer/diffusion_pytorch_model-00001*", [f"mine/other-{tiny_source.CHECKPOINT}"]),
    ],
)
def test_only_what_damaged_files_were_made_from_is_fetched(
    hub: FakeHub, out: Path, name: str, fetched: list[str]
) -> None:
    (name,) = (path.relative_to(out).as_posix() for path in out.glob(name))
    before = damaged(out, name)
    restore_base(out, read_manifest(out), [name], QUIET, hub=hub)
    assert tree(out) == before
    assert hub.fetched("") == fetched


def test_a_local_input_beside_hub_inputs_is_only_asked_for_when_it_is_needed(
    hub: FakeHub, source: Path, tmp_path: Path
) -> None:
    lora = tmp_path / "mine.safetensors"
    shutil.copy(source / tiny_source.LORA, lora)
    out = tmp_path / "out"
    materialize(Options(REPO, out, lora=str(lora), copy=True), QUIET, hub)
    manifest = read_manifest(out)
    before = damaged(out, "vae/config.json", "loras/mine.safetensors")
    restore_base(out, manifest, ["vae/config.json"], QUIET, hub=hub)
    with pytest.raises(SourceError, match="made from local files") as caught:
        restore_base(out, manifest, ["loras/mine.safetensors"], QUIET, hub=hub)
    assert "mine.safetensors" in str(caught.value) and "--source FOLDER" in caught.value.next
    restore_base(out, manifest, ["loras/mine.safetensors"], QUIET, source=str(tmp_path), hub=hub)
    assert tree(out) == before


def test_a_source_under_another_name_is_known_by_its_size(source: Path, tmp_path: Path) -> None:
    moved, out = Path(shutil.copytree(source, tmp_path / "moved")), tmp_path / "out"
    materialize(Options(str(source), out, copy=True), QUIET)
    for name in (tiny_source.CHECKPOINT, tiny_source.LORA):
        (moved / name).rename(moved / f"{name[:3]}{name[-16:]}")
    lora = f"loras/{tiny_source.LORA}"
    before = damaged(out, "vae/config.json", lora)
    restore_base(out, read_manifest(out), ["vae/config.json", lora], QUIET, source=str(moved))
    assert tree(out) == before
    (moved / "as-large.safetensors").write_bytes(bytes((source / tiny_source.LORA).stat().st_size))
    damaged(out, lora)
    with pytest.raises(SourceError, match="does not hold the lora") as caught:
        restore_base(out, read_manifest(out), [lora], QUIET, source=str(moved))
    assert caught.value.next == f"ltxpack verify {out} --repair --source FOLDER"


def test_a_folder_with_another_file_of_that_name_and_size_repairs_nothing(source: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tiny_source.make_source(tmp_path / "other", seed=1)
    materialize(Options(str(source), out, copy=True), QUIET)
    manifest, name = read_manifest(out), f"loras/{tiny_source.LORA}"
    damaged(out, name)
    with pytest.raises(OverlayError, match="not the one it was made from"):
        restore_base(out, manifest, [name], QUIET, source=str(other))
    assert not (out / name).exists()
    (other / tiny_source.LORA).unlink()
    with pytest.raises(SourceError, match="does not hold the lora"):
        restore_base(out, manifest, [name], QUIET, source=str(other))
