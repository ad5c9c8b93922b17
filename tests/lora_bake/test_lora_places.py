"""Where a LoRA may be: a file, a folder with one, a place on the hub or its page's address; what is told of others."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
from lora_support import linears, low_rank, make_overlay, official_keys, peft_folder, random_weights, save
from materialize.fake_hub import FakeHub
from support import ltxpack, refused, tree

from ltxpack.errors import UsageError
from ltxpack.materialize import access
from ltxpack.materialize.hub.client import Reference, parse_reference

FACTORS = low_rank([module for module in linears() if ".attn1." in module], 2, seed=5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an overlay ``out``, LoRAs, and a folder ``hub`` with the files of a repo."""
    folder = tmp_path_factory.mktemp("place")
    make_overlay(folder / "out")
    for name in ("style", "one/style", "several/b", "several/a", "beside/lora", "hub/loras/style-v1",
                 "hub/loras/style-v2", "hub/alone/only"):  # fmt: skip
        save(folder / f"{name}.safetensors", official_keys(FACTORS))
    save(folder / "beside" / "vae.safetensors", {"vae.decoder.conv_in.weight": random_weights()["proj_in.weight"]})
    peft_folder(folder / "run" / "checkpoint-100", FACTORS, {"r": 2, "lora_alpha": 2, "peft_type": "LORA"})
    (folder / "empty" / "below").mkdir(parents=True)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, and the home folder: as ``made``; its ``hub`` is the hub."""
    shutil.copytree(made, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    repo = tmp_path / "hub"
    monkeypatch.setattr(access, "Hub", lambda **_: FakeHub({"someone/repo": repo, "someone/one": repo / "alone"}))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


PAGE = "https://huggingface.co/someone"


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("style.safetensors", "style"),
        ("~/style.safetensors", "style"),
        ("one", "style"),
        ("~/one/", "style"),
        ("beside", "lora"),
        ("run", "checkpoint-100"),
        ("run/checkpoint-100", "checkpoint-100"),
        ("someone/one", "only"),
        ("hf://someone/one", "only"),
        ("hf://someone/repo/loras/style-v2.safetensors", "style-v2"),
        ("hf://someone/repo@main/loras/style-v2.safetensors", "style-v2"),
        (f"{PAGE}/repo/blob/main/loras/style-v2.safetensors", "style-v2"),
        (f"{PAGE}/repo/resolve/main/loras/style-v2.safetensors?download=true", "style-v2"),
        (f"{PAGE}/repo/tree/main/alone", "only"),
        (f"{PAGE}/one", "only"),
        (f"{PAGE}/one/tree/main/", "only"),
        ("https://hf.co/someone/one/tree/v1.0", "only"),
    ],
)
def test_what_may_be_typed(typed: str, name: str, place: Path) -> None:
    words = ["--strength", "0.5", "--lora", typed, "--add", f"{typed}=0.25"]
    done = ltxpack("bake-lora", "out", *words, "--plan", "--json")
    assert done.returncode == 0, done.stderr
    planned = {file["path"].split("/")[1] for file in json.loads(done.stdout)["files"]}
    assert planned == {f"{name}-0.5+{name}-0.25"}


@pytest.mark.parametrize(
    ("typed", "name"),
    [("~/one/", "style"), ("run", "checkpoint-100"), ("someone/one", "only"), (f"{PAGE}/repo/tree/main/alone", "only")],
)
def test_a_repair_takes_what_a_bake_takes(typed: str, name: str, place: Path) -> None:
    made = ltxpack("bake-lora", "out", "--strength", "0.5", "--lora", typed)
    assert made.returncode == 0, made.stderr
    whole = tree(place / "out")
    (place / f"out/bakes/{name}-0.5/config.json").unlink()
    repaired = ltxpack("verify", "out", "--repair", "--lora", typed)
    assert repaired.returncode == 0, repaired.stderr
    assert tree(place / "out") == whole


@pytest.mark.parametrize(
    ("typed", "told", "again"),
    [
        ("stile.safetensors", "no such LoRA", "style.safetensors"),
        ("STYLE.safetensors", "no such LoRA", "style.safetensors"),
        ("./style", "no such LoRA", "style.safetensors"),
        ("several", "several LoRAs", "several/a.safetensors"),
        ("someone/repo", "several or no LoRA files", "someone/repo/alone/only.safetensors"),
        ("someone/repo/loras", "several or no LoRA files", "someone/repo/loras/style-v1.safetensors"),
        ("someone/repo/loras/style-v3.safetensors", "is not in someone/repo",
         "someone/repo/loras/style-v2.safetensors"),
        ("nowhere.safetensors", "no such LoRA", None),
        ("~nobody/x.safetensors", "no such LoRA", None),
        ("out/transformer", "no LoRAs", None),
        ("empty", "without a LoRA", None),
        ("https://civitai.com/models/123", "no page of a model on the hub", None),
        ("https://huggingface.co/datasets/a/b", "no page of a model on the hub", None),
        ("https://[", "no page of a model on the hub", None),
    ],
)  # fmt: skip
def test_what_is_not_there_is_told_with_what_is(typed: str, told: str, again: str | None, place: Path) -> None:
    words = ["bake-lora", "out", "--strength", "0.5", "--lora", typed, "--add", f"{typed}=0.25@0:1"]
    message = refused(ltxpack(*words, "--plan"), 2 if typed.startswith("https") else 1)
    assert told in message
    if again is not None:
        command = shlex.split(message.partition("next: ")[2])
        assert command == ["ltxpack", *words[:5], again, "--add", f"{again}=0.25@0:1"]
        assert ltxpack(*command[1:], "--plan").returncode == 0


def test_a_repair_names_what_is_there(place: Path) -> None:
    assert ltxpack("bake-lora", "out", "--strength", "0.5", "--lora", "style.safetensors").returncode == 0
    (place / "out/bakes/style-0.5/config.json").unlink()
    message = refused(ltxpack("verify", "out", "--repair", "--lora", "one", "--lora", "stile.safetensors"), 1)
    assert "no such LoRA" in message
    assert message.endswith("next: ltxpack verify out --repair --lora one --lora style.safetensors\n")


@pytest.mark.parametrize("ending", [".aria2", ".part", ".crdownload", ".incomplete"])
def test_half_a_download_is_refused(ending: str, place: Path) -> None:
    (place / f"style.safetensors{ending}").write_bytes(b"")
    (place / "run" / "checkpoint-100" / f"adapter_model.safetensors{ending}").write_bytes(b"")
    for typed in ("style.safetensors", "run"):
        message = refused(ltxpack("bake-lora", "out", "--strength", "1", "--lora", typed, "--plan"), 1)
        assert "half a download" in message and ending in message


def test_an_empty_name_is_not_the_current_folder(place: Path) -> None:
    done = ltxpack("bake-lora", "../out", "--strength", "0.5", "--lora", "", "--plan", cwd=place / "one")
    assert "is empty" in refused(done, 2)


def test_references_and_addresses() -> None:
    address = "https://huggingface.co/a/b/blob/refs%2Fpr%2F1/my%20file.safetensors"
    assert parse_reference(address) == Reference("a/b", "refs/pr/1", "my file.safetensors")
    assert parse_reference("hf://a/b@v1/c") == Reference("a/b", "v1", "c")
    assert parse_reference("HTTPS://huggingface.co/a/b/") == Reference("a/b", None, None)
    for odd in ("https://huggingface.co/a", "https://huggingface.co/a/b/blob/main/../../x", "hf://", "hf://a"):
        with pytest.raises(UsageError):
            parse_reference(odd)
