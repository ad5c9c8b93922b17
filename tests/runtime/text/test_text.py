"""The text path against the recorded encodings, and on a tiny Gemma of our own: what it loads and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from codec_parts import checkpoint_of, golden_configs, write_component
from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoAttnProcessor
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from safetensors import safe_open
from safetensors.torch import save_file
from support import distance, load, relative_l2
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import Gemma3TextConfig, Gemma3TextModel, PreTrainedTokenizerFast

from ltxpack.errors import LtxpackError, OverlayError
from ltxpack.ltx23.classes import TEXT_ROOT, TEXT_TOKENS
from ltxpack.ltx23.renames import CONNECTORS
from ltxpack.runtime.sampling.shape import AV
from ltxpack.runtime.text import gemma as text
from ltxpack.runtime.text.gemma import cut_off

ENCODER, TOKENIZER, CONNECTOR_FOLDER = "text_encoder", "tokenizer", "connectors"
CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# bf16 on another machine may add up in another order; single components then drift by up to 1.4e-2.
BOUNDS = {"fp32": 1e-6, "bf16": 1.4e-2}
PROMPTS, MODALITIES = ("prompt", "negative"), ("video", "audio")


# The recorded encodings


@pytest.fixture(scope="module")
def overlay(latents_golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture's Gemma and connectors in the layout of an overlay."""
    folder = tmp_path_factory.mktemp("overlay")
    for name in (ENCODER, TOKENIZER):
        (folder / name).symlink_to((latents_golden / "gemma").resolve())
    config = golden_configs(latents_golden)["connectors"]
    write_component(folder / CONNECTOR_FOLDER, checkpoint_of(latents_golden), CONNECTORS, config)
    return folder


@dataclass
class Recording:
    """One ``text_*.safetensors`` and the modules that should reproduce it."""

    dtype: str
    tensors: dict[str, Tensor]
    prompts: dict[str, str]
    extras: list[str]
    tokenizer: PreTrainedTokenizerFast
    text_encoder: Gemma3TextModel
    connectors: LTX2TextConnectors

    @cached_property
    def hidden(self) -> dict[str, text.HiddenStates]:
        states = text.hidden_states(list(self.prompts.values()), self.tokenizer, self.text_encoder)
        return dict(zip(self.prompts, states, strict=True))

    @cached_property
    def made(self) -> dict[str, tuple[AV[Tensor], dict[str, Tensor]]]:
        """The contexts of each prompt, and the features that the connectors make them from."""
        seen: dict[str, Tensor] = {}
        for name in MODALITIES:
            projection = getattr(self.connectors, f"{name}_text_proj_in")
            projection.register_forward_hook(lambda module, given, made, name=name: seen.update({name: made}))
        return {name: (text.contexts(hidden, self.connectors), dict(seen)) for name, hidden in self.hidden.items()}


@pytest.fixture(scope="module", params=list(DTYPES))
def recording(request: pytest.FixtureRequest, latents_golden: Path, overlay: Path) -> Recording:
    dtype = request.param
    path = latents_golden / "golden" / f"text_{dtype}.safetensors"
    with safe_open(path, framework="pt") as file:
        prompts, extras = (json.loads(file.metadata()[name]) for name in ("prompts", "extras"))
    return Recording(
        dtype,
        load(path),
        dict(zip(PROMPTS, prompts, strict=True)),
        extras,
        text.load_tokenizer(overlay / TOKENIZER),
        text.load_text_encoder(overlay / ENCODER, CPU, DTYPES[dtype]),
        text.load_connectors(overlay / CONNECTOR_FOLDER, CPU, DTYPES[dtype]),
    )


def test_ids_and_masks_equal_the_recorded_ones(recording: Recording) -> None:
    extras = dict(zip(("extra_spaces", "extra_empty", "extra_a"), recording.extras, strict=True))
    for name, prompt in (recording.prompts | extras).items():
        ids, mask = text.tokenize(recording.tokenizer, [prompt])
        assert torch.equal(ids[0], recording.tensors[f"{name}.input_ids"]), name
        assert torch.equal(mask[0], recording.tensors[f"{name}.attention_mask"]), name


def test_hidden_states_equal_the_recorded_ones(recording: Recording) -> None:
    for name, hidden in recording.hidden.items():
        valid = int(recording.tensors[f"{name}.num_valid"])
        expected = recording.tensors[f"{name}.hidden_states_valid"]
        assert hidden.states.dtype == expected.dtype
        assert int(hidden.mask.sum()) == valid
        assert relative_l2(hidden.states[:, -valid:], expected) <= BOUNDS[recording.dtype], name


def test_features_equal_the_recorded_ones(recording: Recording) -> None:
    for name, (_, features) in recording.made.items():
        for modality in MODALITIES:
            (key,) = (k for k in recording.tensors if k.startswith(f"{name}.features_{modality}_"))
            expected = recording.tensors[key]
            assert relative_l2(features[modality][:, -expected.shape[1] :], expected) <= BOUNDS[recording.dtype], key


def test_contexts_equal_the_recorded_ones(recording: Recording) -> None:
    for name, (contexts, _) in recording.made.items():
        expected = AV(*(recording.tensors[f"{name}.{modality}_encoding"] for modality in MODALITIES))
        assert contexts.map(lambda t: t.dtype) == expected.map(lambda t: t.dtype)
        errors = contexts.map(relative_l2, expected)
        assert max(errors.video, errors.audio) <= BOUNDS[recording.dtype], (name, errors)
        assert recording.tensors[f"{name}.connector_mask"].all(), "the DiT needs no text mask"


def test_contexts_need_our_rotary_in_bf16_only(recording: Recording) -> None:
    """With the library's own processor fp32 stays equal and bf16 does not: why ``use_rounded_rotary`` is there."""
    connectors, hidden = recording.connectors, recording.hidden["prompt"]
    ours, _ = recording.made["prompt"]
    for module in connectors.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(LTX2AudioVideoAttnProcessor())
    try:
        stock = text.contexts(hidden, connectors)
    finally:
        text.use_rounded_rotary(connectors)
    error = distance(stock.video, ours.video)
    assert error <= 1e-6 if recording.dtype == "fp32" else 1e-4 < error < 5e-2


# A tiny Gemma of our own


GEMMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 32,
    "sliding_window": 8,
}
WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", *"abcdefgh"]


@pytest.fixture
def small(made: Path, tmp_path: Path) -> Path:
    """The test's own copy of :func:`made`, to change."""
    return Path(shutil.copytree(made, tmp_path / "small"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An overlay with a random two-layer Gemma and a word-level tokenizer."""
    torch.manual_seed(0)
    tmp_path = tmp_path_factory.mktemp("small")
    encoder, tokenizer = tmp_path / ENCODER, tmp_path / TOKENIZER
    encoder.mkdir()
    tokenizer.mkdir()
    gemma = Gemma3TextModel(Gemma3TextConfig(**GEMMA))
    weights = {TEXT_ROOT + name: tensor.clone() for name, tensor in gemma.state_dict().items()}
    weights["vision_tower.vision_model.post_layernorm.bias"] = torch.zeros(2)
    save_file(weights, encoder / "model.safetensors")
    (encoder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": GEMMA}))
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    words.save(str(tokenizer / "tokenizer.json"))
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(named))
    return tmp_path


def gemma_of(overlay: Path) -> tuple[PreTrainedTokenizerFast, Gemma3TextModel]:
    return text.load_tokenizer(overlay / TOKENIZER), text.load_text_encoder(overlay / ENCODER, CPU, torch.float32)


def test_a_prompt_too_long_is_cut_behind_its_bos(small: Path) -> None:
    ids, mask = text.tokenize(text.load_tokenizer(small / TOKENIZER), ["a b " * 3000, "\n c d "])
    assert ids.shape == mask.shape == (2, TEXT_TOKENS)
    assert ids[0, :3].tolist() == [2, 4, 5]
    assert mask[0].all()
    assert ids[1, -4:].tolist() == [0, 2, 6, 7]
    assert mask[1].sum() == 3


@pytest.mark.parametrize(
    ("count", "cut"),
    [(TEXT_TOKENS - 1, 0), (TEXT_TOKENS, 1), (TEXT_TOKENS + 1, 2), (3 * TEXT_TOKENS, 2 * TEXT_TOKENS + 1)],
)
def test_what_is_cut_off_is_what_the_ids_lack(small: Path, count: int, cut: int) -> None:
    tokenizer = text.load_tokenizer(small / TOKENIZER)
    words = [WORDS[4 + number % 4] for number in range(count)]
    found, rest = cut_off(tokenizer, f"  {'  '.join(words)}\n")
    assert (found, rest.split()) == (count + 1, words[count - cut :])
    ids, mask = text.tokenize(tokenizer, [" ".join(words)])
    assert tokenizer.decode(ids[0, -mask.sum() :]).split()[1:] == words[: count - cut]


def test_without_a_bos_one_more_is_cut_off(small: Path) -> None:
    path = small / TOKENIZER / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": None}))
    assert cut_off(text.load_tokenizer(small / TOKENIZER), "a b " * 512) == (1025, " b")


def test_a_tokenizer_of_a_terabyte_is_not_opened(small: Path) -> None:
    os.truncate(small / TOKENIZER / "tokenizer.json", 2**40)
    with pytest.raises(OverlayError, match="too large for a tokenizer") as caught:
        text.load_tokenizer(small / TOKENIZER)
    assert caught.value.found == f"{2**40} bytes"


class WithoutBos:
    """A tokenizer that adds no BOS, and has no pad token."""

    bos_token_id, eos_token_id, pad_token_id = 2, 1, None

    def __call__(self, prompt: str, truncation: bool, max_length: int) -> dict[str, list[int]]:
        return {"input_ids": [4] * min(len(prompt), max_length)}


def test_bos_is_put_first_where_the_tokenizer_does_not() -> None:
    ids, mask = text.tokenize(WithoutBos(), ["x" * 3, "x" * 5000, ""])  # type: ignore[arg-type]
    assert ids[0, -5:].tolist() == [1, 2, 4, 4, 4]
    assert ids[1, 0] == 2
    assert mask.sum(dim=1).tolist() == [4, 1024, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_gemma_loads_whole_without_head_and_vision_tower(small: Path, dtype: torch.dtype | None) -> None:
    model = text.load_text_encoder(small / ENCODER, CPU, dtype)
    assert {p.dtype for p in model.parameters()} == {dtype or torch.float32}
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert {b.dtype for b in model.buffers()} == {torch.float32}, "frequencies and embedding scale are never cast"
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    stored = load(small / ENCODER / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[TEXT_ROOT + name].to(parameter.dtype)), name


@pytest.mark.parametrize("window", [4, 4096])
def test_padding_is_no_trouble_to_a_kernel_that_makes_nan_of_it(
    small: Path, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers has it padding sees no key, of which this kernel makes NaN, and so of all tokens behind."""
    tokenizer, model = gemma_of(small)
    model.config.sliding_window = window
    ids, mask = text.tokenize(tokenizer, ["a b c d e f g h"])
    count, attend, nowhere = int(mask.sum()), torch.nn.functional.scaled_dot_product_attention, []

    def strict(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **more: Any) -> Tensor:
        empty = ~attn_mask.any(-1)
        nowhere.append(int(empty.sum()))
        return torch.where(empty[..., None], torch.nan, attend(query, key, value, attn_mask=attn_mask, **more))

    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", strict)
        assert model(input_ids=ids, attention_mask=mask).last_hidden_state[:, -count:].isnan().any()
    assert any(nowhere)
    nowhere.clear()
    (found,) = text.hidden_states(["a b c d e f g h"], tokenizer, model)
    assert nowhere and not any(nowhere)
    assert found.states.isfinite().all()
    assert torch.equal(found.states[0, -count:], torch.stack(expected, dim=-1)[0, -count:])


def test_the_attention_is_torchs_whatever_the_file_asks_for(small: Path) -> None:
    asked = {"attn_implementation": "eager", "_attn_implementation": "eager"}
    edited_config(**asked, text_config=GEMMA | asked)(small)
    _, model = gemma_of(small)
    assert {layer.self_attn.config._attn_implementation for layer in model.layers} == {"sdpa"}


def edited_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def edit(overlay: Path) -> None:
        path = overlay / ENCODER / "model.safetensors"
        weights = load(path)
        change(weights)
        save_file(weights, path)

    return edit


def edited_config(**fields: object) -> Callable[[Path], object]:
    def edit(overlay: Path) -> None:
        path = overlay / ENCODER / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


NORM = TEXT_ROOT + "norm.weight"
EXTRA = TEXT_ROOT + "extra.weight"
ENCODER_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (edited_weights(lambda w: w.pop(NORM)), "missing: language_model.model.norm.weight"),
    "tensor of another model": (edited_weights(lambda w: w.update({"talker.weight": torch.zeros(1)})), "talker.weight"),
    "tensor too many": (edited_weights(lambda w: w.update({EXTRA: torch.zeros(1)})), "unknown: .*extra.weight"),
    "another text encoder": (edited_config(model_type="llama"), "model_type llama"),
    "a config of other sizes": (edited_config(text_config=GEMMA | {"num_hidden_layers": 10**9}), "num_hidden_layers"),
    "no config": (lambda o: (o / ENCODER / "config.json").unlink(), "config"),
    "config that is no JSON": (lambda o: (o / ENCODER / "config.json").write_text("{"), "config"),
}


@pytest.mark.parametrize("fault", ENCODER_FAULTS)
def test_a_text_encoder_that_does_not_fit_is_refused_by_name(small: Path, fault: str) -> None:
    make, says = ENCODER_FAULTS[fault]
    make(small)
    with pytest.raises(LtxpackError, match=says) as raised:
        text.load_text_encoder(small / ENCODER, CPU, torch.float32)
    damaged = isinstance(raised.value, OverlayError)
    assert str(raised.value.next).startswith("ltxpack verify" if damaged else "ltxpack materialize SOURCE")


@pytest.mark.parametrize("content", [None, "{", '{"model": 3}'])
def test_a_broken_tokenizer_is_refused_by_name(small: Path, content: str | None) -> None:
    path = small / TOKENIZER / "tokenizer.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(OverlayError, match=r"tokenizer\.json") as raised:
        text.load_tokenizer(small / TOKENIZER)
    assert f"next: ltxpack {'verify' if content is None else 'materialize SOURCE'}" in str(raised.value)


@pytest.mark.parametrize("named", [{}, {"bos_token": "<bos>"}, {"pad_token": "<pad>"}])
def test_a_tokenizer_that_cannot_begin_or_pad_a_prompt_is_refused(small: Path, named: dict[str, str]) -> None:
    (small / TOKENIZER / "tokenizer_config.json").write_text(json.dumps(named))
    with pytest.raises(OverlayError, match="names no token"):
        text.load_tokenizer(small / TOKENIZER)
