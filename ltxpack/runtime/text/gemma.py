"""From prompts to the contexts of the DiT: tokenizer, Gemma 3, text connectors (spec 03).

The caller loads, calls and drops Gemma and the connectors separately, so it decides when each is on the device. Gemma
is transformers' module without vision tower and lm_head; the connectors are diffusers' with an attention
processor of our own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ltxpack.errors import OverlayError, quoted
from ltxpack.files.tensorfile import MAX_TOKENIZER_BYTES
from ltxpack.ltx23.classes import TEXT_ENCODER_TYPE, TEXT_TOKENS
from ltxpack.ltx23.releases import TEXT_ENCODER_REPO
from ltxpack.ltx23.text_encoder import language_model, text_config
from ltxpack.reporter import Reporter
from ltxpack.runtime.model.rope import Rotation, rotate, split_heads
from ltxpack.runtime.overlay import Overlay
from ltxpack.runtime.request import DEFAULT_NEGATIVE_PROMPT
from ltxpack.runtime.sampling.shape import AV
from ltxpack.runtime.weights import load

if TYPE_CHECKING:
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
    from transformers import Gemma3TextConfig, Gemma3TextModel, PreTrainedTokenizerFast

# Letters that a warning quotes of a prompt's end, which is cut off.
LONGEST_SHOWN = 300


@dataclass(frozen=True)
class HiddenStates:
    """Gemma's output for one prompt: ``states`` [1, 1024, D, layers + 1] and ``mask`` int64 [1, 1024], 1 = token."""

    states: Tensor
    mask: Tensor


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of ``folder``'s tokenizer.json, as written there. Raises OverlayError without one."""
    path = folder / "tokenizer.json"
    refused = partial(OverlayError, file=path, next=load.verify_command(folder))
    if not path.is_file():
        raise refused("no such file")
    size = path.stat().st_size
    if size > MAX_TOKENIZER_BYTES:
        raise refused(
            "too large for a tokenizer", expected=f"at most {MAX_TOKENIZER_BYTES} bytes", found=f"{size} bytes"
        )
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        raise OverlayError("not a tokenizer", file=path, found=str(error), next=another_encoder(folder)) from error
    if tokenizer.bos_token_id is None or _padding(tokenizer) is None:
        problem, expected = "names no token to begin or to pad a prompt with", "bos_token, and pad_token or eos_token"
        raise OverlayError(problem, file=folder, expected=expected, next=another_encoder(folder))
    return tokenizer


def load_text_encoder(
    folder: Path, device: torch.device, dtype: torch.dtype | None, reader: load.Reader | None = None
) -> Gemma3TextModel:
    """Gemma 3's language model from ``folder``, without lm_head, each tensor read once, straight to ``device``.

    ``dtype`` None keeps the stored one. The files hold exactly the language model that config.json describes; a vision
    tower, a projector and a head may be there too. Raises UnsupportedError naming what does not fit, OverlayError and
    FormatError, before it reads a tensor.
    """
    from transformers import Gemma3TextModel

    fields, config = _gemma_config(folder)
    # torch's own attention, whatever the file says: _attention_masks fit only that.
    config._attn_implementation = "sdpa"
    with _WeightsOnMeta():
        model = Gemma3TextModel(config)
    stored = language_model(fields, load.read_headers(folder), folder, another_encoder(folder)).tensors
    load.check(model, stored, folder)
    model.load_state_dict((reader or load.read_tensors)(stored, device, dtype), strict=True, assign=True)
    # The rotary frequencies and the embedding scale are in no file. They move to the device and stay fp32.
    for name, buffer in list(model.named_buffers()):
        if name not in stored:
            owner, _, attribute = name.rpartition(".")
            model.get_submodule(owner).register_buffer(attribute, buffer.to(device), persistent=False)
    return model.requires_grad_(False).eval()


def _padding(tokenizer: PreTrainedTokenizerFast) -> Any:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


class _WeightsOnMeta(TorchFunctionMode):
    """Modules allocate their weights on the meta device; the buffers that they compute stay real.

    This holds for one thread only, unlike accelerate's ``init_empty_weights``: another thread may load meanwhile.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        where = {"device": "meta"} if func is torch.empty else {}
        return func(*args, **{**(kwargs or {}), **where})


def load_connectors(
    folder: Path, device: torch.device, dtype: torch.dtype | None, reader: load.Reader | None = None
) -> LTX2TextConnectors:
    """The text connectors of ``folder`` with our attention processor; see ``load.load_component`` for errors."""
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    connectors = load.load_component(LTX2TextConnectors, folder, device, dtype, reader=reader)
    use_rounded_rotary(connectors)
    return connectors


def tokenize(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask) int64 [B, 1024]: stripped, BOS first, cut at 1024, padded on the left."""
    ids = torch.full((len(prompts), TEXT_TOKENS), _padding(tokenizer), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        tokens = tokenizer(prompt.strip(), truncation=True, max_length=TEXT_TOKENS)["input_ids"]
        if tokens[:1] != [tokenizer.bos_token_id]:
            tokens = [tokenizer.bos_token_id, *tokens][:TEXT_TOKENS]
        ids[row, -len(tokens) :] = torch.tensor(tokens)
        mask[row, -len(tokens) :] = 1
    return ids, mask


@torch.no_grad()
def hidden_states(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerFast, text_encoder: Gemma3TextModel
) -> list[HiddenStates]:
    """Gemma's hidden states of each prompt, computed in one batch: the embeddings and every layer, the last one normed.

    Positions count from 0 over padding too, and attention is purely causal, as in the official pipeline.
    """
    device = text_encoder.device
    ids, mask = (tensor.to(device) for tensor in tokenize(tokenizer, prompts))
    masks = _attention_masks(mask, text_encoder.config.sliding_window)
    output = text_encoder(input_ids=ids, attention_mask=masks, output_hidden_states=True, use_cache=False)
    return [
        HiddenStates(torch.stack([layer[row] for layer in output.hidden_states], dim=-1)[None], mask[row, None])
        for row in range(len(prompts))
    ]


def _attention_masks(mask: Tensor, window: int) -> dict[str, Tensor]:
    """For each kind of Gemma's layers the mask [B, 1, T, T], bool: which token attends to which.

    A token attends to itself and to the tokens before it that are not padding; in sliding layers to the last ``window``
    of them. ``mask`` [B, T], 1 = token. Padding attends to itself, or some kernels would compute NaN for it, which
    spreads to the real tokens.
    """
    at = torch.arange(mask.shape[1], device=mask.device)
    back = at[:, None] - at
    full = ((back >= 0) & mask[:, None].bool() | (back == 0))[:, None]
    return {"full_attention": full, "sliding_attention": full & (back < window)}


@torch.no_grad()
def contexts(hidden: HiddenStates, connectors: LTX2TextConnectors) -> AV[Tensor]:
    """The contexts [1, 1024, D] of one prompt. The DiT attends to all 1024 rows, without a mask."""
    states, mask = (tensor.to(connectors.device) for tensor in (hidden.states, hidden.mask))
    video, audio, _ = connectors(states, mask)
    return AV(video, audio)


class RoundedRotaryAttention:
    """Attention processor for the connectors that rotates in the model dtype with rounded tables (spec 06, 3).

    diffusers' own rotates in fp32. In fp32 both agree; in bf16 diffusers is 8e-3 off the official result.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or query_rotary_emb is None or key_rotary_emb is not None:
            raise ValueError("for the connectors' self-attention only")
        query = split_heads(attn.norm_q(attn.to_q(hidden_states)), attn.heads)
        key = split_heads(attn.norm_k(attn.to_k(hidden_states)), attn.heads)
        value = split_heads(attn.to_v(hidden_states), attn.heads)
        table = Rotation(*(part.to(query.dtype) for part in query_rotary_emb))
        mixed = F.scaled_dot_product_attention(
            rotate(query, table), rotate(key, table), value, attn_mask=attention_mask
        ).transpose(1, 2)
        if attn.to_gate_logits is not None:
            mixed = mixed * (2 * torch.sigmoid(attn.to_gate_logits(hidden_states))).unsqueeze(-1)
        return attn.to_out[0](mixed.flatten(2))


def use_rounded_rotary(connectors: LTX2TextConnectors) -> None:
    for stack in (connectors.video_connector, connectors.audio_connector):
        for block in stack.transformer_blocks:
            block.attn1.set_processor(RoundedRotaryAttention())


def another_encoder(folder: Path) -> str:
    """The ``next`` for a bad text encoder from before materialize checked it, in which verify finds no fault."""
    overlay = quoted(folder.parent)
    return f"ltxpack materialize SOURCE {overlay} --force --text-encoder {TEXT_ENCODER_REPO} (takes the published one)"


def _gemma_config(folder: Path) -> tuple[Mapping[str, Any], Gemma3TextConfig]:
    """The language model's fields, and transformers' config for them."""
    from transformers import Gemma3Config, Gemma3TextConfig

    path = folder / "config.json"
    try:
        fields, _ = Gemma3Config.get_config_dict(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        problem = "not a readable config"
        raise OverlayError(problem, file=path, found=str(error), next=load.verify_command(folder)) from error
    text = text_config(fields, path, another_encoder(folder))
    whole = Gemma3Config if fields["model_type"] == TEXT_ENCODER_TYPE else Gemma3TextConfig
    return text, whole.from_dict(fields).get_text_config()


def tell_cut(overlay: Overlay, prompts: Iterable[tuple[str, str]], reporter: Reporter) -> None:
    """Warn of every prompt, given as (name, text), whose end the model does not read. Raises OverlayError.

    The text path cuts silently, like the official one. This skips the official negative prompt, which no user wrote.
    """
    names: dict[str, list[str]] = {}
    for name, prompt in prompts:
        if prompt != DEFAULT_NEGATIVE_PROMPT and _most_tokens(prompt) > TEXT_TOKENS:
            names.setdefault(prompt, []).append(name)
    if not names:
        return
    overlay.check(overlay.records("tokenizer"))
    tokenizer = load_tokenizer(overlay.folder("tokenizer"))
    for prompt, (first, *others) in names.items():
        count, rest = cut_off(tokenizer, prompt)
        if rest.strip():
            more = f" and {len(others)} more like it" if others else ""
            limit = f"{count} tokens, of which the model reads {TEXT_TOKENS}"
            words = len(rest.split())
            reporter.warn(f"{first}{more}: {limit}; it does not read the last {words} words: {_in_one_line(rest)}")


def cut_off(tokenizer: PreTrainedTokenizerFast, prompt: str) -> tuple[int, str]:
    """The number of ``prompt``'s tokens, and its end that is cut off."""
    stripped = prompt.strip()
    found = tokenizer(stripped, return_offsets_mapping=True, verbose=False)
    ids, spans = found["input_ids"], found["offset_mapping"]
    lacks_bos = ids[:1] != [tokenizer.bos_token_id]
    read = spans[: TEXT_TOKENS - lacks_bos]
    rest = stripped[max((end for _, end in read), default=0) :] if len(ids) > len(read) else ""
    return len(ids) + lacks_bos, rest


def _most_tokens(prompt: str) -> int:
    """An upper bound of the tokens: one for each byte, and three for a space, as Gemma's tokenizer spells it."""
    return len(prompt.encode()) + 2 * prompt.count(" ") + 1


def _in_one_line(text: str) -> str:
    """``text`` in one line; only the beginning and the end if it is long."""
    text, half = " ".join(text.split()), LONGEST_SHOWN // 2
    return text if len(text) <= LONGEST_SHOWN else f"{text[:half]} … {text[-half:]}"
