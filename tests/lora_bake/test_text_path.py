"""``bake-lora --text``: what LoRAs change of text encoder and connectors, in a folder of its own that a run takes."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from lora_support import change_byte, dotted, save
from support import Done, load, load_all, ltxpack, refused, tree

from ltxpack.ltx23.lora_keys import TextNames, parse_key
from ltxpack.ltx23.renames import CONNECTORS
from ltxpack.manifest import MANIFEST_NAME, read_manifest
from ltxpack.repack.staging import folder_of, unfinished

QUERY = "language_model.model.layers.0.self_attn.q_proj"
DOWN = "language_model.model.layers.1.mlp.down_proj"
PROJECTION = "video_text_proj_in"
CONNECTOR = "audio_connector.transformer_blocks.0.attn1.to_out.0"
MODULES = (QUERY, DOWN, PROJECTION, CONNECTOR)
TRANSFORMER = "transformer_blocks.0.attn1.to_q"
SIZE = ("--height", "64", "--width", "64", "--num-frames", "9", "--steps", "2", "--dtype", "float32", "--device", "cpu")


def base(overlay: Path, folder: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a text encoder and its connectors."""
    places = (overlay / "text_encoder", overlay / "connectors")
    if folder:
        places = (overlay / folder, overlay / folder / "connectors")
    return {name: found for place in places for name, found in load_all(place).items()}


def factors(overlay: Path, modules: tuple[str, ...] = MODULES) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator, weights = torch.Generator().manual_seed(3), base(overlay)
    found = {}
    for module in modules:
        out, columns = weights[f"{module}.weight"].shape
        pair = (torch.randn(2, columns, generator=generator), torch.randn(out, 2, generator=generator))
        found[module] = (pair[0] * 0.3, pair[1] * 0.3)
    return found


def official(module: str) -> str:
    return CONNECTORS.reverse().rename(f"{module}.").removesuffix(".")


def diffusers(module: str) -> str:
    return f"text_encoder.{module}" if module.startswith("language_model") else f"connectors.{module}"


def peft(module: str) -> str:
    inner = module.removeprefix("language_model.model.")
    return f"base_model.model.model.language_model.{inner}" if inner != module else official(module)


def kohya(module: str) -> str:
    inner = module.removeprefix("language_model.model.")
    name = inner if inner != module else official(module).removeprefix("model.diffusion_model.")
    return ("lora_te_" if inner != module else "lora_unet_") + name.replace(".", "_")


SPELLINGS: tuple[Callable[[str], str], ...] = (str, diffusers, peft, kohya)


def lora(path: Path, overlay: Path, spell: Callable[[str], str] = diffusers, transformer: bool = False) -> Path:
    """A LoRA of the text path, and with ``transformer`` of one linear there too."""
    endings = ("lora_down.weight", "lora_up.weight") if spell is kohya else ("lora_A.weight", "lora_B.weight")
    tensors = dotted(factors(overlay), spell, *endings)
    if transformer:
        weights = load(next((overlay / "transformer").glob("*.safetensors")))
        out, columns = weights[f"{TRANSFORMER}.weight"].shape
        pair = {"lora_A": torch.full((1, columns), 0.1), "lora_B": torch.full((out, 1), 0.1)}
        tensors |= {f"transformer.{TRANSFORMER}.{role}.weight": tensor for role, tensor in pair.items()}
    return save(path, tensors)


def done(*words: str | Path) -> Done:
    found = ltxpack(*words)
    assert found.returncode == 0, found.stderr
    return found


def check(overlay: Path, folder: str, strength: float) -> None:
    found, before, pairs = base(overlay, folder), base(overlay), factors(overlay)
    assert found.keys() == before.keys()
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if name == module or module not in pairs:
            assert torch.equal(found[name], tensor), name
            continue
        down, up = pairs[module]
        exact = tensor.double() + strength * (up.double() @ down.double())
        assert found[name].dtype == tensor.dtype
        assert (found[name] != exact.float().to(tensor.dtype)).float().mean() < 1e-2, name
        assert not torch.equal(found[name], tensor), name


@pytest.mark.parametrize("spell", SPELLINGS)
def test_every_spelling_gives_the_same_weights(spell: Callable[[str], str], overlay: Path, tmp_path: Path) -> None:
    file = lora(tmp_path / "style.safetensors", overlay, spell)
    told = done("bake-lora", overlay, "--lora", file, "--strength", "0.7", "--text", "--device", "cpu").stdout
    assert "text_encoders/style-0.7: baked" in told and "--text-encoder style-0.7 --prompt" in told
    check(overlay, "text_encoders/style-0.7", 0.7)
    assert not (overlay / "bakes" / "style-0.7").exists()
    bake = read_manifest(overlay).text_encoders["style-0.7"]
    assert set(bake.changed) == {f"{module}.weight" for module in MODULES}
    assert done("verify", overlay).returncode == 0


def test_both_halves_of_a_lora_are_baked_and_repaired_and_planned(overlay: Path, tmp_path: Path) -> None:
    file = lora(tmp_path / "style.safetensors", overlay, transformer=True)
    words = ("bake-lora", overlay, "--strength", "0", "--strength", "0.5", "--add", f"{file}=0.8@0:0.25", "--text")
    plan = json.loads(done(*words, "--plan", "--json").stdout)
    done(*words)
    manifest = read_manifest(overlay)
    assert {"distilled-0+style-0.8_0at0.25", "distilled-0.5+style-0.8_0at0.25"} <= set(manifest.bakes)
    assert list(manifest.text_encoders) == ["style-0.8"]
    check(overlay, "text_encoders/style-0.8", 0.8)
    written = {path for path in tree(overlay) if path.startswith("text_encoders/")}
    assert written == {file["path"] for file in plan["files"] if file["path"].startswith("text_encoders/")}
    assert written == {record.path for record in manifest.text_encoders["style-0.8"].files}
    assert all(text.count("is there already") for text in done(*words).stdout.splitlines() if text.startswith("text_"))
    before = tree(overlay)
    change_byte(overlay / "text_encoders/style-0.8/connectors/diffusion_pytorch_model.safetensors")
    for folder in ("text_encoders/style-0.8", "bakes/distilled-0.5+style-0.8_0at0.25"):
        (overlay / folder / "config.json").unlink()
    assert "text_encoders/style-0.8" in ltxpack("verify", overlay).stdout
    message = refused(ltxpack("verify", overlay, "--repair"), 1)
    assert "style.safetensors" in message and "--lora FILE" in message
    done("verify", overlay, "--repair", "--lora", file)
    assert tree(overlay) == before
    assert json.loads(done("inspect", overlay, "--json").stdout)["text_encoders"]["style-0.8"]["rule"] == "fp32"


def test_what_is_not_changed_is_a_link(overlay: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "mine.safetensors", dotted(factors(overlay, (PROJECTION,)), official))
    done("bake-lora", overlay, "--lora", file, "--strength", "1", "--text", "--rule", "official")
    folder = overlay / "text_encoders" / "mine-1"
    assert (folder / "model.safetensors").readlink() == Path("../../text_encoder/model.safetensors")
    assert not (folder / "connectors" / "diffusion_pytorch_model.safetensors").is_symlink()


def test_without_text_they_are_refused_and_may_be_left_out(overlay: Path, tmp_path: Path) -> None:
    file = lora(tmp_path / "style.safetensors", overlay, transformer=True)
    words = ("bake-lora", overlay, "--lora", file, "--strength", "1")
    message = refused(ltxpack(*words), 1)
    assert "4 targets outside the transformer" in message and "bake-lora --text bakes those" in message
    assert "left out" in done(*words, "--allow-unmatched").stderr
    alone = lora(tmp_path / "alone.safetensors", overlay)
    message = refused(ltxpack("bake-lora", overlay, "--lora", alone, "--strength", "1"), 1)
    assert "changes only the text path" in message and "--text" in message
    message = refused(ltxpack("bake-lora", overlay, "--strength", "1", "--text"), 1)
    assert "no LoRA changes the text path" in message and message.endswith("--strength 1\n")
    assert "read " not in message
    without = dataclasses.replace(read_manifest(overlay), loras=(), bakes={})
    (overlay / MANIFEST_NAME).write_bytes(without.dump())
    words = ("bake-lora", overlay, "--strength", "0", "--format", "fp8", "--keep-blocks", "none", "--text")
    assert "no LoRA changes the text path" in refused(ltxpack(*words), 1)


def test_a_run_takes_it_and_says_so(overlay: Path, tmp_path: Path) -> None:
    file = lora(tmp_path / "style.safetensors", overlay)
    done("bake-lora", overlay, "--lora", file, "--strength", "1", "--strength", "0", "--text")
    same = base(overlay)
    assert all(torch.equal(tensor, same[name]) for name, tensor in base(overlay, "text_encoders/style-0").items())
    found = {}
    for name in ("base", "style-1"):
        tensors = tmp_path / f"{name}.safetensors"
        done("run", overlay, "--prompt", "a boat", *SIZE, "--text-encoder", name, "-o", tmp_path / f"{name}.mp4",
             "--save-tensors", tensors)  # fmt: skip
        found[name] = load(tensors)["stage2.video"]
    assert not torch.equal(found["base"], found["style-1"])
    message = refused(ltxpack("run", overlay, "--prompt", "x", "--text-encoder", "none"), 2)
    assert "there is no text encoder" in message and "style-1" in message


def test_one_that_was_stopped_goes_on(overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = lora(tmp_path / "style.safetensors", overlay)
    words = ("bake-lora", overlay, "--lora", file, "--strength", "1", "--text")
    with monkeypatch.context() as patch:
        module = importlib.import_module("ltxpack.lora_bake.bake")
        patch.setattr(module, "publish_bakes", mock.Mock(side_effect=KeyboardInterrupt))
        assert ltxpack(*words).returncode == 130
    (work,) = unfinished(overlay)
    assert folder_of(work) == "text_encoders/style-1" and not (overlay / "text_encoders").exists()
    assert "unfinished work" in ltxpack("verify", overlay).stderr
    with monkeypatch.context() as patch:
        patch.setattr("ltxpack.lora_bake.stream.Engine.fuse_shard", lambda *_: pytest.fail("it was made again"))
        done(*words)
    check(overlay, "text_encoders/style-1", 1.0)
    assert not unfinished(overlay) and not ltxpack("verify", overlay).returncode


@pytest.mark.parametrize(
    ("name", "folder"),
    [("x", "bakes/x"), ("text_encoders@x", "text_encoders/x"), ("bakes@x", None), ("@x", None), ("base", None),
     ("other@x", None), ("text_encoders@..", None)],
)  # fmt: skip
def test_staging_folders_by_their_names(name: str, folder: str | None) -> None:
    assert folder_of(Path(f"{name}.partial")) == folder


def test_names_of_other_models_are_none_of_the_text_path() -> None:
    shapes = {f"{module}.weight": (4, 4) for module in MODULES}
    names = TextNames(shapes)
    others = ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", "model.layers.9.self_attn.q_proj")
    for module in (*others, "text_encoder.vision_tower.x"):
        parsed = parse_key(f"{module}.lora_A.weight")
        assert parsed is not None and names.find(parsed) is None


def test_inspect_says_what_bakes_it(overlay: Path, tmp_path: Path) -> None:
    file = lora(tmp_path / "style.safetensors", overlay)
    assert (
        "--text bakes those of the text path"
        in json.loads(done("inspect", file, "--json").stdout)["takes"]["ltxpack bake-lora"]
    )
