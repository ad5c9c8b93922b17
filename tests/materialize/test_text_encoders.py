"""Text encoders as other tools leave them: what is taken gives the same hidden states, the rest is refused by name."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ltxpack, refused, tree
from transformers import Gemma3ForConditionalGeneration, Gemma3TextConfig

from ltxpack.ltx23.text_encoder import SIZES
from ltxpack.manifest import read_manifest
from ltxpack.materialize.text_encoder import OTHER_ENCODER
from ltxpack.repack.verify import verify
from ltxpack.reporter import SilentReporter
from ltxpack.runtime.overlay import Overlay
from ltxpack.runtime.text import gemma as text
from ltxpack.runtime.weights.sizes import model_sizes

pytestmark = pytest.mark.usefixtures("short_prompts")

CPU = torch.device("cpu")
PROMPTS = ("a beach at dusk", "")
Weights = dict[str, torch.Tensor]
ROOT, VISION, PROJECTOR = "language_model.model.", "vision_tower.", "multi_modal_projector."


def renamed(**roots: str) -> Callable[[Weights], Weights]:
    """Names whose ``roots`` (of the language model, vision tower and projector) are these; a part without one goes."""
    new = {ROOT: roots.get("text"), VISION: roots.get("vision"), PROJECTOR: roots.get("projector")}

    def change(weights: Weights) -> Weights:
        pairs = [(name, root, to) for name in weights for root, to in new.items() if name.startswith(root)]
        return {to + name.removeprefix(root): weights[name] for name, root, to in pairs if to is not None}

    return change


def stored(dtype: torch.dtype, ending: str = "") -> Callable[[Weights], Weights]:
    return lambda weights: {name: t.to(dtype) if name.endswith(ending) else t for name, t in weights.items()}


HEAD = "lm_head.weight"


def with_head(weights: Weights) -> Weights:
    return weights | {HEAD: weights[f"{ROOT}embed_tokens.weight"].clone()}


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


def alone(config: dict[str, object]) -> dict[str, object]:
    """The config of the language model alone, as Gemma3TextModel.save_pretrained writes it."""
    own = config["text_config"]
    assert isinstance(own, dict)
    return {**own, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}


def same(config: dict[str, object]) -> dict[str, object]:
    return config


def gemma(demo: Path, folder: Path, change: Callable[[Weights], Weights], config: Callable[..., object] = same) -> Path:
    """The demo's text encoder with other weights and another config."""
    shutil.copytree(demo / "source" / "gemma", folder)
    weights = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config(json.loads((folder / "config.json").read_text()))))
    return folder


def made(demo: Path, out: Path, folder: Path, *more: str) -> Path:
    done = ltxpack("materialize", demo / "source", out, "--text-encoder", folder, *more)
    assert done.returncode == 0, done.stderr
    return out


@functools.cache
def states(overlay: Path) -> list[torch.Tensor]:
    tokenizer = text.load_tokenizer(overlay / "tokenizer")
    encoder = text.load_text_encoder(overlay / "text_encoder", CPU, torch.bfloat16)
    return [each.states for each in text.hidden_states(PROMPTS, tokenizer, encoder)]


@functools.cache
def blocks(overlay: Path) -> object:
    """The sizes that a plan counts."""
    return model_sizes(Overlay.open(overlay), (), "bfloat16").parts["text_encoder"].blocks


NEWER = renamed(text="model.language_model.", vision="model.vision_tower.", projector="model.multi_modal_projector.")
# What is taken -> the weights and config that others write, and whether it is stored anew.
TAKEN: dict[str, tuple[Callable[[Weights], Weights], Callable[..., object], bool]] = {
    "names of newer transformers": (NEWER, same, False),
    "with its tied head": (with_head, same, False),
    "newer names and a head": (lambda weights: NEWER(weights) | {HEAD: with_head(weights)[HEAD]}, same, False),
    "no vision tower": (renamed(text=ROOT), same, False),
    "vision tower in F32": (stored(torch.float32, "post_layernorm.bias"), same, False),
    "the language model alone": (renamed(text="model."), alone, True),
    "alone, without a head": (renamed(text=""), alone, True),
    "alone, published names": (renamed(text=ROOT), alone, True),
    "names of it alone, config of the whole": (renamed(text="model."), same, True),
    "F16": (stored(torch.float16), same, True),
    "F32": (stored(torch.float32), same, True),
    "F64": (stored(torch.float64), same, True),
    "F32, and integers": (lambda w: stored(torch.float32)(w) | {f"{VISION}position_ids": torch.arange(4)}, same, True),
    "one norm in F32": (stored(torch.float32, "model.norm.weight"), same, True),
}  # fmt: skip


@pytest.mark.parametrize("kind", TAKEN)
def test_what_is_taken_gives_the_same_states(kind: str, demo: Path, tmp_path: Path) -> None:
    change, config, anew = TAKEN[kind]
    folder = gemma(demo, tmp_path / "gemma", change, config)
    out = made(demo, tmp_path / "out", folder)
    expected = states(demo / "overlay")
    if kind == "F16":  # small numbers lose bits in it
        rounded = gemma(demo, tmp_path / "rounded", lambda w: stored(torch.bfloat16)(stored(torch.float16)(w)))
        expected = states(made(demo, tmp_path / "rounded out", rounded))
    assert all(torch.equal(*pair) for pair in zip(states(out), expected, strict=True))
    there = load_file(folder / "model.safetensors")
    component = read_manifest(out).components["text_encoder"]
    wide = {name for name, tensor in there.items() if tensor.dtype not in (torch.bfloat16, torch.int64)} if anew else ()
    assert len(component.cast) == len(wide)
    given, written = (where.joinpath("model.safetensors").read_bytes() for where in (folder, out / "text_encoder"))
    assert (written != given) == anew
    assert blocks(out) == blocks(demo / "overlay")


@pytest.mark.parametrize("kind", ["the language model alone", "F32", "names of newer transformers"])
def test_transformers_loads_what_is_stored(kind: str, demo: Path, tmp_path: Path) -> None:
    change, config, _ = TAKEN[kind]
    out = made(demo, tmp_path / "out", gemma(demo, tmp_path / "gemma", change, config))
    model, info = Gemma3ForConditionalGeneration.from_pretrained(
        out / "text_encoder", output_loading_info=True, local_files_only=True, dtype="auto"
    )
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all("vision" in name or "multi_modal" in name for name in info["missing_keys"])
    assert model.dtype == torch.bfloat16


def test_a_text_encoder_that_was_stored_anew_is_repaired_and_is_the_same_again(demo: Path, tmp_path: Path) -> None:
    folder = gemma(demo, tmp_path / "gemma", renamed(text="model."), alone)
    out = made(demo, tmp_path / "out", folder, "--max-shard-size", "60KB")
    before = tree(out)
    assert "text_encoder/model.safetensors.index.json" in before
    assert (
        "already there"
        in ltxpack("materialize", demo / "source", out, "--text-encoder", folder, "--max-shard-size", "60KB").stdout
    )
    (out / "text_encoder/model-00001-of-00002.safetensors").unlink()
    (out / "text_encoder/config.json").unlink()
    done = ltxpack("verify", out, "--repair", "--source", tmp_path)
    assert done.returncode == 0, done.stderr
    assert tree(out) == before and not verify(out, SilentReporter())


def test_shards_without_an_index_get_one(demo: Path, tmp_path: Path) -> None:
    folder = gemma(demo, tmp_path / "gemma", lambda weights: weights)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number, names in enumerate((sorted(weights)[:9], sorted(weights)[9:]), 1):
        save_file({name: weights[name] for name in names}, folder / f"model-0000{number}-of-00002.safetensors")
    out = made(demo, tmp_path / "out", folder)
    assert all(torch.equal(*pair) for pair in zip(states(out), states(demo / "overlay"), strict=True))
    before = tree(out)
    (out / "text_encoder/model.safetensors.index.json").unlink()
    assert ltxpack("verify", out, "--repair", "--source", tmp_path).returncode == 0
    assert tree(out) == before


LAYER = f"{ROOT}layers.1."
# What is refused -> the weights, and what the message names.
REFUSED: dict[str, tuple[Callable[[Weights], Weights], tuple[str, ...]]] = {
    "fp8": (stored(torch.float8_e4m3fn, "proj.weight"), ("is quantised (fp8", "28 weights in codes")),
    "int8": (stored(torch.int8, "q_proj.weight"), ("is quantised (int8)", "q_proj.weight")),
    "bitsandbytes": (
        lambda w: w | {f"{LAYER}mlp.up_proj.weight.absmax": torch.zeros(4)}, ("is quantised (nf4", "absmax")
    ),
    "one norm missing": (without(f"{ROOT}norm.weight"), (f"missing: {ROOT}norm.weight [32]",)),
    "a part of a layer missing": (without(f"{LAYER}mlp.up_proj.weight"), (f"missing: {LAYER}mlp.up_proj.weight",)),
    "another shape": (
        lambda w: w | {f"{LAYER}mlp.up_proj.weight": torch.zeros(3, 2, dtype=torch.bfloat16)},
        (f"shape: {LAYER}mlp.up_proj.weight: expected [64, 32], found [3, 2]",),
    ),
    "a LoRA inside": (
        lambda w: w | {f"{LAYER}self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}, ("holds a LoRA", "q_proj.lora_A")
    ),
    "a foreign tensor": (lambda w: w | {"talker.weight": torch.zeros(1)}, ("unknown: talker.weight",)),
    "integers": (stored(torch.int64, f"{ROOT}norm.weight"), ("dtype: language_model.model.norm.weight", "found I64")),
    "a layer less": (without("language_model.model.layers.3."), ("num_hidden_layers", "expected 3, found 4")),
    "the vision tower alone": (renamed(vision=VISION), ("holds no Gemma 3 language model",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_run_refuses_materialize_refuses_by_name(kind: str, demo: Path, tmp_path: Path) -> None:
    change, named = REFUSED[kind]
    folder = gemma(demo, tmp_path / "gemma", change)
    message = refused(ltxpack("materialize", demo / "source", tmp_path / "out", "--text-encoder", folder), 1)
    assert all(words in message for words in named)
    assert f"next: {OTHER_ENCODER}" in message and not (tmp_path / "out").exists()
    # An overlay of an earlier version may hold it: the same words, and no verify, which would find nothing.
    with pytest.raises(Exception, match="next: ltxpack materialize SOURCE") as caught:
        text.load_text_encoder(folder, CPU, torch.bfloat16)
    assert all(words in str(caught.value) for words in named)


# File or files of a folder that holds weights and too little else -> what the message says.
WEIGHTS_ALONE = {
    "gemma_3_12B_it.safetensors": "found gemma_3_12B_it.safetensors (bf16)",
    "gemma-3-12b-it-Q4_K_M.gguf": "found gemma-3-12b-it-Q4_K_M.gguf (a GGUF file)",
}


@pytest.mark.parametrize("name", WEIGHTS_ALONE)
@pytest.mark.parametrize("typed", ["the folder", "the file"])
def test_weights_alone_are_told_what_else_they_need(name: str, typed: str, demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text_encoders"
    folder.mkdir()
    shutil.copy(demo / "source/gemma/model.safetensors", folder / name)
    if name.endswith(".gguf"):
        (folder / name).write_bytes(b"GGUF" + bytes(60))
    given = folder if typed == "the folder" else folder / name
    message = refused(ltxpack("materialize", demo / "source", tmp_path / "out", "--text-encoder", given), 1)
    assert WEIGHTS_ALONE[name] in message and f"next: {OTHER_ENCODER}" in message
    assert all(f"- {needed}" in message for needed in ("config.json", "tokenizer.json", "tokenizer_config.json"))


@pytest.mark.parametrize("name", WEIGHTS_ALONE)
def test_weights_alone_beside_the_checkpoint_are_told_too(name: str, source: Path, out: Path) -> None:
    shutil.rmtree(source / "gemma")
    (source / name).write_bytes(b"GGUF" + bytes(60))
    if name.endswith(".safetensors"):
        save_file({f"{ROOT}embed_tokens.weight": torch.zeros(2, 2)}, source / name)
    message = refused(ltxpack("materialize", source, out), 1)
    assert "holds no text encoder" in message and f"{name}: weights alone; config.json, tokenizer.json" in message


def test_the_language_model_alone_is_found_in_a_folder(source: Path, out: Path) -> None:
    path = source / "gemma" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config["text_config"] | {"model_type": "gemma3_text"}))
    assert ltxpack("materialize", source, out).returncode == 0
    made_anew = json.loads((out / "text_encoder/config.json").read_text())
    assert made_anew["model_type"] == "gemma3" and made_anew["text_config"]["hidden_size"] == 24


def test_sizes_that_a_config_leaves_out_are_those_of_transformers() -> None:
    assert {name: getattr(Gemma3TextConfig(), name) for name in SIZES} == SIZES
