"""A checkpoint in several files, as shards or as other programs split it: the same overlay as from the whole one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from materialize import quantised_source as made
from materialize import tiny_source
from materialize.fake_hub import FakeHub
from materialize.quantised_source import ROOT, Tensors
from support import Notes, ltxpack, refused, tree

from ltxpack.errors import FormatError, LtxpackError, SourceError
from ltxpack.files.tensorfile import read_tensorfile
from ltxpack.ltx23.releases import TEXT_ENCODER_REPO
from ltxpack.manifest import read_manifest
from ltxpack.materialize import Options, materialize
from ltxpack.materialize.inspect import inspect_path
from ltxpack.repack.verify import verify

CHECKPOINT = tiny_source.CHECKPOINT
TRANSFORMER = "ltx-2.3-mini-dev_transformer_only_bf16.safetensors"
Rename = Callable[[str], str | None]


def read(path: Path) -> tuple[Tensors, dict[str, str]]:
    file, data = read_tensorfile(path), path.read_bytes()
    tensors = {i.name: (i.dtype, i.shape, data[i.start : i.start + i.nbytes]) for i in file.tensors.values()}
    return tensors, dict(file.metadata)


def under(*roots: str, drop: str = "", add: str = "") -> Rename:
    """Names that begin with one of ``roots``, without ``drop`` and with ``add`` before them."""
    return lambda name: add + name.removeprefix(drop) if name.startswith(roots) else None


OFFICIAL: dict[str, Rename] = {
    TRANSFORMER: under(ROOT), "video_vae.safetensors": under("vae."),
    "audio.safetensors": under("audio_vae.", "vocoder."), "projection.safetensors": under("text_embedding_projection."),
}  # fmt: skip
BARE: dict[str, Rename] = {
    TRANSFORMER: under(ROOT, drop=ROOT), "video_vae.safetensors": under("vae.", drop="vae."),
    "audio_vae.safetensors": under("audio_vae.", drop="audio_vae."),
    "vocoder.safetensors": under("vocoder.", drop="vocoder."),
    "projection.safetensors": under("text_embedding_projection.", drop="text_embedding_projection."),
}  # fmt: skip
COMFY = {**OFFICIAL, TRANSFORMER: under(ROOT, drop="model.")}
CONNECTORS = tuple(f"{ROOT}{stream}_embeddings_connector." for stream in ("video", "audio"))
APART: dict[str, Rename] = {
    **OFFICIAL,
    TRANSFORMER: lambda name: name if name.startswith(ROOT) and not name.startswith(CONNECTORS) else None,
    "connectors.safetensors": under(*CONNECTORS, drop=ROOT),
}
# How the files are split -> the name of each and its tensors' names.
SPLITS = {"official names": OFFICIAL, "bare names": BARE, "ComfyUI's names": COMFY, "connectors apart": APART}


def split(source: Path, folder: Path, files: Mapping[str, Rename], stating: str = TRANSFORMER) -> list[Path]:
    """The checkpoint of ``source`` in ``files``; all metadata stand in ``stating``."""
    tensors, metadata = read(source / CHECKPOINT)
    folder.mkdir(exist_ok=True, parents=True)
    for name, rename in files.items():
        made.write(folder / name, made.renamed(tensors, rename), metadata if name == stating else {})
    if folder == source:
        (source / CHECKPOINT).unlink()
    return [folder / name for name in files]


def same_but_sources(out: Path, whole: Path) -> bool:
    """Whether two overlays are equal, but for the names of the checkpoint's files in the manifest."""
    found, expected = tree(out), tree(whole)
    manifests = [json.loads(each.pop("ltxpack.json")) for each in (found, expected)]
    for manifest in manifests:
        manifest["source"]["files"] = [file for file in manifest["source"]["files"] if file["role"] != "checkpoint"]
    return found == expected and manifests[0] == manifests[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The overlay of the whole checkpoint. Not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    materialize(Options(str(tiny_source.make_source(folder / "source")), folder / "whole"), Notes())
    return folder / "whole"


@pytest.mark.parametrize("kind", SPLITS)
def test_parts_beside_are_found_and_give_the_same_overlay(kind: str, source: Path, whole: Path, out: Path) -> None:
    parts = split(source, source, SPLITS[kind])
    done = ltxpack("materialize", source, out)
    assert done.returncode == 0, done.stderr
    assert all(f"checkpoint: {part}" in done.stderr for part in parts)
    assert same_but_sources(out, whole) and not verify(out, Notes())
    bases = [file.name for file in read_manifest(out).source.files if file.role == "checkpoint"]
    assert bases[0] == TRANSFORMER and sorted(bases) == sorted(part.name for part in parts)
    assert "already there" in ltxpack("materialize", source, out).stdout


def test_named_parts_from_other_folders_are_repaired_from_them(source: Path, whole: Path, out: Path) -> None:
    models = source.parent / "models"
    split(source, models / "diffusion_models", OFFICIAL, "video_vae.safetensors")
    (models / "vae").mkdir()
    for name in ("video_vae.safetensors", "audio.safetensors"):
        (models / "diffusion_models" / name).rename(models / "vae" / name)
    (models / "diffusion_models/projection.safetensors").rename(source / "mine.safetensors")
    transformer = models / "diffusion_models" / TRANSFORMER
    (source / CHECKPOINT).unlink()
    command = ("materialize", source, out, "--checkpoint", transformer)
    message = refused(ltxpack(*command), 1)
    assert "missing: the text projections" in message and message.count("missing:") == 1, "the VAEs are in ComfyUI's"
    assert "next: the same command with --part FILE\n" in message
    assert ltxpack(*command, "--part", "mine.safetensors").returncode == 0, "a name within SOURCE, as for other flags"
    assert same_but_sources(out, whole)
    before = tree(out)
    for damaged in ("connectors", "vae", "transformer"):
        (out / damaged / "diffusion_pytorch_model.safetensors").unlink()
    assert "mine.safetensors" in refused(ltxpack("verify", out, "--repair", "--source", transformer.parent), 1)
    (source / "mine.safetensors").rename(models / "mine.safetensors")
    done = ltxpack("verify", out, "--repair", "--source", models)
    assert done.returncode == 0, done.stderr
    assert tree(out) == before


def shards(source: Path, folder: Path, stem: str = "ltx-2.3-mini-dev", index: bool = False) -> list[Path]:
    """The checkpoint in three shards whose tensors are dealt out in turn; the metadata stand in each."""
    tensors, metadata = read(source / CHECKPOINT)
    (source / CHECKPOINT).unlink()
    names = [f"{stem}-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    dealt = {name: {key: tensors[key] for key in list(tensors)[at::3]} for at, name in enumerate(names)}
    if index:
        placed = {key: name for name, own in dealt.items() for key in own}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return [made.write(folder / name, own, metadata) for name, own in dealt.items()]


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("alone", [False, True], ids=["folder", "file"])
def test_shards_are_one_checkpoint(index: bool, alone: bool, source: Path, whole: Path, out: Path) -> None:
    paths = shards(source, source, index=index)
    typed = (paths[1],) if alone else (source,)
    assert ltxpack("materialize", *typed, out).returncode == 0
    assert same_but_sources(out, whole)
    before = tree(out)
    (out / "transformer/diffusion_pytorch_model.safetensors").unlink()
    assert ltxpack("verify", out, "--repair", "--source", source).returncode == 0 and tree(out) == before
    paths[2].unlink()
    message = refused(ltxpack("materialize", *typed, out.parent / "other"), 1)
    assert "lacks shards of the checkpoint" in message and f"- {paths[2].name}" in message


def test_parts_on_the_hub(source: Path, whole: Path, out: Path) -> None:
    shards(source, source)
    hub = FakeHub({"someone/model": source, TEXT_ENCODER_REPO: source / tiny_source.GEMMA})
    materialize(Options("someone/model", out), Notes(), hub)
    assert all(tree(out)[path] == data for path, data in tree(whole).items() if path != "ltxpack.json")
    assert {file.repo for file in read_manifest(out).source.files if file.role == "checkpoint"} == {"someone/model"}
    fetched = hub.fetched()
    assert not materialize(Options("someone/model", out), Notes(), hub).written and hub.fetched() == fetched


def test_a_whole_checkpoint_under_another_root_is_taken(source: Path, whole: Path, out: Path) -> None:
    tensors, metadata = read(source / CHECKPOINT)
    bare = {name.removeprefix(ROOT): entry for name, entry in tensors.items()}
    made.write(source / CHECKPOINT, bare, metadata)
    materialize(Options(str(source), out), Notes())
    assert same_but_sources(out, whole)


def test_sections_of_the_config_may_stand_in_their_parts(source: Path, whole: Path, out: Path) -> None:
    _, metadata = read(source / CHECKPOINT)
    config = json.loads(metadata["config"])
    paths = {path.name: path for path in split(source, source, OFFICIAL)}
    rest = {key: value for key, value in metadata.items() if key != "config"}
    for name, sections in ((TRANSFORMER, {"transformer", "scheduler"}), ("video_vae.safetensors", {"vae"}),
                           ("audio.safetensors", {"audio_vae", "vocoder"})):  # fmt: skip
        own = {"config": json.dumps({key: value for key, value in config.items() if key in sections})}
        made.write(paths[name], read(paths[name])[0], own | (rest if name == "audio.safetensors" else {}))
    materialize(Options(str(source), out), Notes())
    assert {k: v for k, v in tree(out).items() if "metadata" not in k and k != "ltxpack.json"} == {
        k: v for k, v in tree(whole).items() if "metadata" not in k and k != "ltxpack.json"
    }
    kept = json.loads((out / "source/metadata.json").read_text())
    assert json.loads(kept["config"]) == config and kept["model_version"] == metadata["model_version"]


def change(path: Path, **metadata: str) -> None:
    tensors, stated = read(path)
    made.write(path, tensors, {key: value for key, value in (stated | metadata).items() if value})


def other_vae(source: Path) -> None:
    change(source / "video_vae.safetensors", config=json.dumps({"vae": {"latent_channels": 3}}))


def only_audio_vae(source: Path) -> None:
    path = source / "audio.safetensors"
    made.write(path, made.renamed(read(path)[0], under("audio_vae.")), {})


# What is wrong with parts -> the change, and what is said.
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "two video VAEs": (
        lambda f: shutil.copy(f / "video_vae.safetensors", f / "vae_copy.safetensors"),
        "several files with the video VAE",
    ),
    "another generation": (
        lambda f: change(f / "video_vae.safetensors", model_version="2.0.0"), "of different generations"
    ),
    "another config": (other_vae, "states another `vae`"),
    "no config": (lambda f: change(f / TRANSFORMER, config="", model_version=""), "no config and no model_version"),
    "no vocoder": (only_audio_vae, "missing: the vocoder (vocoder.*)"),
    "a quantised transformer": (
        lambda f: made.write(f / TRANSFORMER, made.renamed(made.fp8(), under(ROOT)), read(f / TRANSFORMER)[1]),
        "is quantised (scaled fp8)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_parts_that_do_not_belong_together(fault: str, source: Path, out: Path) -> None:
    split(source, source, OFFICIAL)
    damage, told = FAULTS[fault]
    damage(source)
    assert told in refused(ltxpack("materialize", source, out), 1)
    assert not out.exists()


def test_of_two_vaes_the_named_one_is_taken(source: Path, whole: Path, out: Path) -> None:
    """The command that the refusal proposes."""
    split(source, source, OFFICIAL)
    shutil.copy(source / "video_vae.safetensors", source / "a_copy.safetensors")
    with pytest.raises(SourceError) as caught:
        materialize(Options(str(source), out), Notes())
    flag = str(caught.value.next).removeprefix("the same command with --part ")
    materialize(Options(str(source), out, part=(flag,)), Notes())
    assert same_but_sources(out, whole)


def test_tensors_met_twice_are_told_and_other_ones_refused(source: Path, whole: Path, out: Path) -> None:
    split(source, source, OFFICIAL)
    tensors, _ = read(source / TRANSFORMER)
    again = made.renamed(tensors, under(*CONNECTORS))
    both = read(source / "projection.safetensors")[0]
    made.write(source / "projection.safetensors", both | again, {})
    notes = Notes()
    options = Options(str(source), out, part=("projection.safetensors",) * 2)
    materialize(options, notes)
    assert same_but_sources(out, whole)
    names = [file.name for file in read_manifest(out).source.files]
    assert names.count("projection.safetensors") == 1, "a part named twice is one"
    assert any("two files of the checkpoint hold" in text and "the first file's" in text for text in notes.warnings)
    name = next(iter(again))
    made.write(source / "projection.safetensors", both | again | {name: ("F32", (1,), bytes(4))}, {})
    with pytest.raises(FormatError, match="differs from the same tensor"):
        materialize(options, Notes())


def test_a_part_alone_is_told_by_inspect_with_what_to_do(source: Path, tmp_path: Path) -> None:
    split(source, source, BARE)
    told = {path.name: inspect_path(path) for path in source.glob("*.safetensors")}
    assert told[TRANSFORMER]["next"].startswith(f"ltxpack materialize {source / TRANSFORMER} OVERLAY --part FILE")
    assert "the transformer alone, in bf16" in told[TRANSFORMER]["takes"]["ltxpack materialize"]
    for name, words in (("video_vae", "the video VAE"), ("audio_vae", "the audio VAE"), ("vocoder", "the vocoder"),
                        ("projection", "text connectors")):  # fmt: skip
        problem = told[f"{name}.safetensors"].get("problem") or told[f"{name}.safetensors"]["summary"]
        assert words in problem, name


def test_a_tensor_under_two_names_of_one_file_is_refused(source: Path, out: Path) -> None:
    tensors, metadata = read(source / CHECKPOINT)
    name = f"{ROOT}proj_out.bias"
    bare = {key.removeprefix(ROOT): entry for key, entry in tensors.items()}
    made.write(source / CHECKPOINT, bare | {name: tensors[name]}, metadata)
    with pytest.raises(LtxpackError, match=r"twice|unknown"):
        materialize(Options(str(source), out), Notes())


def test_a_folder_as_a_part_is_refused(source: Path, out: Path) -> None:
    with pytest.raises(LtxpackError, match="is a folder"):
        materialize(Options(str(source), out, part=(str(source),)), Notes())
