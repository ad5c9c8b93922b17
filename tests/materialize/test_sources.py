"""What the user names and which files it turns out to be."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from materialize import tiny_source
from materialize.fake_hub import COMMIT, FakeHub
from support import ltxpack, refused

from ltxpack.errors import FormatError, LtxpackError, SourceError, UnsupportedError, UsageError
from ltxpack.ltx23.expected import inventory
from ltxpack.ltx23.releases import DEFAULT_FILES, RELEASES, TEXT_ENCODER_REPO, likely, recognise
from ltxpack.materialize.access import Access, InputFile, local_folder
from ltxpack.materialize.hub.client import cached_sha256
from ltxpack.materialize.inputs import Inputs, read_inputs
from ltxpack.materialize.sources import Sources, resolve
from ltxpack.materialize.text_encoder import read_text_encoder
from ltxpack.reporter import SilentReporter


def find(source: Path | str, hub: FakeHub | None = None, allow_missing: bool = False, **flags: str | Path) -> Sources:
    typed = {name: str(value) for name, value in flags.items()}
    access = Access(SilentReporter(), hub or FakeHub({}))
    found = resolve(str(source), typed, access, revision=typed.pop("revision", None), allow_missing=allow_missing)
    found.faults.refuse()
    return found


def chosen(found: Sources) -> dict[str, InputFile | None]:
    """The files by role."""
    return {"checkpoint": found.checkpoint[0].input, "lora": found.lora, "upsampler": found.upsampler}


def read(source: Path | str, hub: FakeHub | None = None, **flags: str | Path) -> Inputs:
    return read_inputs(find(source, hub, **flags), Access(SilentReporter(), hub or FakeHub({})))


def hub_repos(tmp_path: Path, source: Path) -> FakeHub:
    """The source as the two repos of the hub, under the published names."""
    model = tmp_path / "model"
    model.mkdir()
    for role, name in tiny_source.NAMES.items():
        shutil.copy(source / name, model / DEFAULT_FILES[role])
    shutil.copy(source / tiny_source.CHECKPOINT, model / "ltx-2.3-22b-dev-extra.safetensors")
    return FakeHub({"Lightricks/LTX-2.3": model, TEXT_ENCODER_REPO: source / tiny_source.GEMMA})


def test_a_folder_is_enough_and_a_single_file_finds_the_others_beside_it(source: Path) -> None:
    found = find(source)
    assert {role: file.name for role, file in chosen(found).items()} == tiny_source.NAMES
    assert found.text_encoder.label.endswith(tiny_source.GEMMA)
    assert chosen(found)["checkpoint"].repo is None and not found.missing
    assert find(source / tiny_source.CHECKPOINT) == found
    renamed = (source / tiny_source.CHECKPOINT).rename(source / "my base.safetensors")
    assert chosen(find(renamed))["checkpoint"].path == renamed


def test_files_of_systems_are_no_inputs(source: Path, tmp_path: Path) -> None:
    """As macOS leaves them on other disks, beside every file; and a disk's folders of its own."""
    expected, before = find(source), tmp_path / "before"
    shutil.copytree(source, before)
    for path in [path for path in source.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    shutil.copytree(before / tiny_source.GEMMA, source / ".Trash-1000")
    (source / "lost+found").mkdir(mode=0)
    assert find(source) == expected
    taken, usual = ([file.name for _, file in read(place).files()] for place in (source, before))
    assert taken == usual
    found = find("a/b", FakeHub({"a/b": source, TEXT_ENCODER_REPO: source / tiny_source.GEMMA}))
    assert {role: file.name for role, file in chosen(found).items()} == tiny_source.NAMES


@pytest.mark.parametrize("role", tiny_source.NAMES)
def test_two_candidates_are_refused_and_listed(source: Path, role: str) -> None:
    name = tiny_source.NAMES[role]
    shutil.copy(source / name, source / f"another-{name}")
    with pytest.raises(SourceError, match="several") as caught:
        find(source)
    form = " (bf16)" if role == "checkpoint" else ""
    assert caught.value.items == (f"another-{name}{form}", f"{name}{form}")
    assert f"--{role}" in str(caught.value.next)
    assert find(source, **{role: name}) is not None


def test_two_text_encoders_are_refused_and_listed(source: Path) -> None:
    shutil.copytree(source / tiny_source.GEMMA, source / "gemma2")
    with pytest.raises(SourceError, match="several text encoders") as caught:
        find(source)
    assert caught.value.items == ("gemma", "gemma2")
    assert find(source, text_encoder="gemma2").text_encoder.label.endswith("gemma2")


def test_other_subfolders_are_no_text_encoders(source: Path) -> None:
    other = source / "another"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "t5"}')
    (source / "broken").mkdir()
    (source / "broken" / "config.json").write_text("{")
    assert find(source) is not None
    shutil.rmtree(source / tiny_source.GEMMA)
    with pytest.raises(SourceError, match="no text encoder") as caught:
        find(source)
    assert any("t5" in str(item) for item in caught.value.items)


def test_everything_missing_is_told_at_once(source: Path) -> None:
    for name in (tiny_source.LORA, tiny_source.UPSAMPLER):
        (source / name).unlink()
    shutil.rmtree(source / tiny_source.GEMMA)
    with pytest.raises(SourceError) as caught:
        find(source)
    for word in ("lora", "upsampler", "text encoder"):
        assert word in str(caught.value)
    found = find(source, allow_missing=True)
    assert list(found.missing) == ["lora", "upsampler", "text_encoder"]
    assert "\n" not in "".join(found.missing.values())
    (source / tiny_source.CHECKPOINT).unlink()
    with pytest.raises(SourceError, match="no file for the checkpoint"):
        find(source, allow_missing=True)


def test_a_checkpoint_that_cannot_be_read_is_told_with_what_else_is_missing(source: Path) -> None:
    (source / tiny_source.LORA).unlink()
    os.truncate(source / tiny_source.CHECKPOINT, 100)
    with pytest.raises(SourceError, match="several inputs cannot be used") as caught:
        find(source)
    first, *others = caught.value.items
    assert tiny_source.CHECKPOINT in str(first) and "truncated" in str(first)
    assert any("no file for the lora" in str(item) for item in others)


def test_several_unclear_inputs_each_list_their_candidates(tmp_path: Path) -> None:
    folder = tmp_path / "s 2"
    folder.mkdir()
    names = ["a-dev.safetensors", "b dev.safetensors", *(f"{n:02}-distilled-lora.safetensors" for n in range(30))]
    for name in names:
        (folder / name).touch()
    shown = refused(ltxpack("materialize", folder, tmp_path / "out"), 1).splitlines()
    where = shown.index(f"  - {folder}: holds several files that may be the checkpoint, expected one file named "
                        "*dev*.safetensors")  # fmt: skip
    assert shown[where + 1 : where + 3] == ["  -   a-dev.safetensors", "  -   b dev.safetensors"]
    assert "  -   00-distilled-lora.safetensors" in shown and "  -   and 27 more" in shown
    assert any("holds no file for the upsampler" in line for line in shown)
    assert any("holds no text encoder" in line for line in shown)
    assert shown[-1] == (
        "  next: the same command with --checkpoint a-dev.safetensors --lora 00-distilled-lora.safetensors "
        f"--upsampler FILE --text-encoder {TEXT_ENCODER_REPO}"
    )


def test_what_to_do_about_several_inputs_is_said_once_each(source: Path, tmp_path: Path) -> None:
    (source / tiny_source.UPSAMPLER).rename(source / "a b-spatial-upscaler-x2.safetensors")
    shutil.copy(source / "a b-spatial-upscaler-x2.safetensors", source / "c-spatial-upscaler-x2.safetensors")
    with pytest.raises(SourceError) as caught:
        find(source, checkpoint=tmp_path / "x", lora=tmp_path / "y")
    assert caught.value.next == (
        f"{SourceError.fallback}; the same command with --upsampler 'a b-spatial-upscaler-x2.safetensors'"
    )


def test_a_flag_takes_a_file_a_folder_or_a_name_within_source_which_a_path_that_exists_wins_over(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.copy(source / tiny_source.LORA, tmp_path / "elsewhere"))
    monkeypatch.chdir(moved.parent)
    assert find(source, lora=tiny_source.LORA).lora.path == moved
    (source / tiny_source.LORA).unlink()
    for typed in (moved, moved.parent):
        assert find(source, lora=typed).lora.path == moved
    typed = tiny_source.UPSAMPLER.removesuffix(".safetensors")
    assert find(source, lora=moved, upsampler=typed).upsampler.name == tiny_source.UPSAMPLER


def test_wrong_use(source: Path) -> None:
    checkpoint = source / tiny_source.CHECKPOINT
    for place, flags, told in (
        (checkpoint, {"checkpoint": checkpoint}, "twice"), (source, {"revision": "main"}, "--revision"),
        ("", {}, "is empty"), (source, {"lora": ""}, "is empty"), (source, {"text_encoder": ""}, "is empty"),
        ("https://example.org/Lightricks/LTX-2.3", {}, "is no page of a model on the hub"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=told):
            find(place, **flags)


def test_a_mistyped_path_names_what_is_there(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist") as caught:
        find(tmp_path / "sourc")
    assert caught.value.items == (str(source),)
    with pytest.raises(SourceError, match="does not exist") as caught:
        find(source, lora="ltx-2.3-mini-distilled-lora-3.safetensors")
    assert tiny_source.LORA in str(caught.value)
    with pytest.raises(SourceError, match="does not exist"):
        find(source, upsampler="nowhere/x.safetensors")


def test_a_relative_typo_that_looks_like_a_repo_names_both(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source.parent.parent)
    with pytest.raises(SourceError, match="nor is there such a file or folder here") as caught:
        find(f"{source.parent.name}/sourse")
    assert caught.value.items == (f"{source.parent.name}/source",)


def test_hub_defaults_are_the_published_names_else_the_rule_of_a_folder(source: Path, tmp_path: Path) -> None:
    hub = hub_repos(tmp_path, source)
    found = find("Lightricks/LTX-2.3", hub)
    assert {role: file.member for role, file in chosen(found).items()} == DEFAULT_FILES
    assert found.text_encoder.label == TEXT_ENCODER_REPO
    base = chosen(found)["checkpoint"]
    assert base.sha256 is not None
    assert (base.repo.repo, base.repo.commit) == ("Lightricks/LTX-2.3", COMMIT)
    hub.repos["someone/fork"] = source
    assert chosen(find("someone/fork", hub))["checkpoint"].member == tiny_source.CHECKPOINT


def test_revisions_and_files_of_other_repos(source: Path, tmp_path: Path) -> None:
    hub = hub_repos(tmp_path, source)
    hub.repos["someone/loras"] = source
    lora = f"someone/loras@v2/{tiny_source.LORA}"
    found = find("Lightricks/LTX-2.3", hub, revision="abc", lora=lora, text_encoder="someone/loras/gemma")
    assert ("files", "Lightricks/LTX-2.3", "abc") in hub.asked
    assert ("files", "someone/loras", "v2") in hub.asked
    assert found.lora.label == f"someone/loras/{tiny_source.LORA}"
    assert "config.json" in found.text_encoder.files
    with pytest.raises(SourceError, match="is not in the repo") as caught:
        find("Lightricks/LTX-2.3", hub, lora="someone/loras/ltx-2.3-mini-distilled-lora-9.safetensors")
    assert tiny_source.LORA in caught.value.items
    with pytest.raises(UsageError, match="twice"):
        find("Lightricks/LTX-2.3@main", hub, revision="abc")


def test_links_lead_to_the_real_file_and_a_cache_blob_tells_its_hash(source: Path, tmp_path: Path) -> None:
    checkpoint, lora, digest = source / tiny_source.CHECKPOINT, source / tiny_source.LORA, "ab" * 32
    (tmp_path / "blobs").mkdir()
    for link, real in ((checkpoint, tmp_path / "elsewhere.bin"), (lora, tmp_path / "blobs" / digest)):
        link.rename(real)
        link.symlink_to(Path("..") / real.relative_to(tmp_path))
    found = find(source)
    base = chosen(found)["checkpoint"]
    assert (base.path, base.name) == (tmp_path / "elsewhere.bin", tiny_source.CHECKPOINT)
    assert base.label == str(checkpoint)
    assert found.lora.sha256 == digest
    assert cached_sha256(checkpoint) is None


def test_a_folder_without_permission_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "iterdir", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(SourceError, match="Permission denied"):
        find(tmp_path)


# The text encoder's folder


INDEX, SHARDS = "model.safetensors.index.json", [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]


def change_json(folder: Path, name: str = "config.json", **changes: object) -> None:
    (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


FAULTS: dict[str, tuple[Callable[[Path], object], type[LtxpackError], str]] = {
    "another model": (lambda f: change_json(f, model_type="t5"), UnsupportedError, "model_type"),
    "code": (lambda f: change_json(f, auto_map={"AutoModel": "x.Y"}), UnsupportedError, "auto_map"),
    "tokenizer code": (lambda f: change_json(f, "tokenizer_config.json", auto_map={}), UnsupportedError, "auto_map"),
    "no bos": (lambda f: change_json(f, "special_tokens_map.json", bos_token=None), UnsupportedError, "bos_token"),
    "no padding": (lambda f: change_json(f, "special_tokens_map.json", eos_token=""), UnsupportedError, "eos_token"),
    "quantised": (lambda f: change_json(f, quantization_config={}), UnsupportedError, "quantization_config"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), SourceError, "tokenizer.json"),
    "endless tokenizer": (lambda f: os.truncate(f / "tokenizer.json", 2**40), FormatError, "too large for a tokenizer"),
    "no shard": (lambda f: (f / SHARDS[1]).unlink(), SourceError, "lacks shards"),
    "no index, no shard": (lambda f: [(f / n).unlink() for n in (INDEX, SHARDS[1])], SourceError, SHARDS[1]),
    "index lies": (lambda f: change_index(f, dict.popitem), FormatError, "not in the index"),
    "index outside": (
        lambda f: change_index(f, lambda names: names.update(dict.fromkeys(names, "../evil.safetensors"))),
        FormatError,
        "plain .safetensors file name",
    ),
    "other width": (
        lambda f: change_json(f, text_config={**tiny_source.GEMMA_TEXT, "hidden_size": 8}),
        FormatError,
        "hidden_size",
    ),
    "torn shard": (lambda f: os.truncate(f / SHARDS[0], 40), FormatError, "truncated"),
    "list as config": (lambda f: (f / "processor_config.json").write_text("[]"), FormatError, "JSON object"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_text_encoder_faults_are_refused_by_name(source: Path, fault: str) -> None:
    damage, kind, words = FAULTS[fault]
    folder = source / tiny_source.GEMMA
    damage(folder)
    with pytest.raises(kind) as caught:
        read_text_encoder(local_folder(folder), Access(SilentReporter()), None)
    assert words in str(caught.value)


def test_a_text_encoder_of_another_size_does_not_fit(source: Path) -> None:
    tiny_source.Tiny(shapes=tiny_source.tensor_shapes(tiny_source.CONFIG, factor=5)).write(source)
    with pytest.raises(UnsupportedError, match="another size") as caught:
        read(source)
    assert (caught.value.expected, caught.value.found) == ("width 24 and 4 layers", "width 24 and 2 layers")


def test_only_known_files_of_the_text_encoder_are_taken_and_one_weight_file_needs_no_index(source: Path) -> None:
    encoder, folder = read(source).text_encoder, source / tiny_source.GEMMA
    assert encoder is not None
    assert not [path for path in encoder.taken if not path.endswith((".safetensors", ".json", ".jinja"))]
    assert "tokenizer/chat_template.jinja" in encoder.taken
    for path in folder.glob("model*"):
        path.unlink()
    shapes = inventory("text_encoder", {"text_config": tiny_source.GEMMA_TEXT})
    tiny_source.write_tensors(folder / "gemma_3.SAFETENSORS", shapes, {})
    encoder = read(source).text_encoder
    assert encoder is not None and encoder.taken["text_encoder/model.safetensors"].name == "gemma_3.safetensors"


def test_a_file_as_text_encoder_names_its_folder(source: Path) -> None:
    with pytest.raises(SourceError, match="is a file") as caught:
        find(source, text_encoder=source / tiny_source.GEMMA / "config.json")
    assert str(caught.value.next).endswith(str(source / tiny_source.GEMMA))


# The LoRA and the checkpoint, by their headers

Shapes = dict[str, tuple[int, ...]]


@pytest.fixture
def shapes() -> Shapes:
    """The tensors of the checkpoint, to be changed."""
    return tiny_source.tensor_shapes(tiny_source.CONFIG)


@pytest.mark.parametrize(
    ("role", "other", "told"),
    [("lora", tiny_source.UPSAMPLER, "LoRA"), ("lora", tiny_source.CHECKPOINT, "LoRA"),
     ("upsampler", tiny_source.LORA, "latent upsampler")],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused(source: Path, role: str, other: str, told: str) -> None:
    with pytest.raises(UnsupportedError, match=f"is not a {told}"):
        read(source, **{role: source / other})


def test_missing_unknown_and_misshapen_tensors_are_told_together(source: Path, shapes: Shapes) -> None:
    del shapes["vae.decoder.conv_in.conv.bias"]
    shapes["model.diffusion_model.proj_out.weight"] = (1, 2)
    shapes["audio_vae.encoder.extra.weight"] = (3,)
    shapes["surprise.weight"] = (3,)
    tiny_source.Tiny(shapes=shapes).write(source)
    with pytest.raises(UnsupportedError, match="tensors that its config asks for") as caught:
        read(source)
    assert sorted(caught.value.items) == [
        "missing: vae.decoder.conv_in.conv.bias [32]",
        "shape: model.diffusion_model.proj_out.weight: expected [16, 24], found [1, 2]",
        "unknown: audio_vae.encoder.extra.weight",
        "unknown: surprise.weight",
    ]


def test_a_name_that_only_looks_like_the_target_is_unknown(source: Path, shapes: Shapes) -> None:
    """``proj_in`` is what ``patchify_proj`` becomes: both together would land on one name."""
    shapes["model.diffusion_model.proj_in.weight"] = shapes["model.diffusion_model.patchify_proj.weight"]
    tiny_source.Tiny(shapes=shapes).write(source)
    with pytest.raises(UnsupportedError, match=r"unknown: model\.diffusion_model\.pro"):
        read(source)


def test_statistics_that_no_module_reads_are_dropped(source: Path, shapes: Shapes) -> None:
    extra = ["vae.per_channel_statistics.mean-of-stds", "vae.per_channel_statistics.channel"]
    tiny_source.Tiny(shapes={**shapes, **dict.fromkeys(extra, (16,))}).write(source)
    inputs = read(source)
    assert sorted(inputs.checkpoint.dropped) == sorted(extra)
    assert sum(map(len, inputs.checkpoint.tensors.values())) == len(shapes)


def test_fp8_and_integers_are_refused_by_name(source: Path, shapes: Shapes) -> None:
    tiny_source.Tiny(dtypes=lambda name: "I16" if name == "vae.decoder.conv_in.conv.bias" else "BF16").write(source)
    with pytest.raises(UnsupportedError, match=r"dtype: vae\.decoder\.conv_in\.conv\.bias"):
        read(source)
    shapes["model.diffusion_model.transformer_blocks.0.attn1.to_q.weight_scale"] = ()
    tiny_source.Tiny(shapes=shapes).write(source)
    with pytest.raises(UnsupportedError, match="fp8") as caught:
        read(source)
    assert "weight_scale" in str(caught.value.tensor)


# Known releases

LORAS = [release for release in RELEASES if "lora" in release.name]


def test_releases_are_distinct_and_known_by_content() -> None:
    assert len({release.sha256 for release in RELEASES}) == len({release.name for release in RELEASES}) == 5
    assert all(len(release.sha256) == 64 for release in RELEASES)
    first, second = LORAS
    assert first.size == second.size
    assert recognise(second.file, second.size, second.sha256).release is second
    assert recognise("renamed.safetensors", first.size, first.sha256).release is first
    assert recognise("mine.safetensors", 1, "00" * 32).release is None
    assert recognise(first.file, first.size, None).release is None
    assert likely(first.file, first.size) is first


def test_a_known_name_with_another_content_is_a_warning() -> None:
    first, second = LORAS
    found = recognise(first.file, first.size, second.sha256)
    assert found.release is second
    assert second.file in str(found.warning) and first.sha256 in str(found.warning)
    assert "unknown content" in str(recognise(first.file, first.size, "00" * 32).warning)
    assert str(first.size) in str(recognise(first.file, 5, None).warning)
    assert recognise(first.file, first.size, first.sha256).warning is None
