"""Finds prompts that are longer than the model reads, and quotes the words that it does not read.

The text path itself cuts silently, like the official one (:func:`ltxpack.runtime.text.gemma.tokenize`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ltxpack.ltx23.classes import TEXT_TOKENS
from ltxpack.reporter import Reporter
from ltxpack.runtime.overlay import Overlay
from ltxpack.runtime.request import DEFAULT_NEGATIVE_PROMPT
from ltxpack.runtime.text.gemma import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Letters of a prompt's end that a warning quotes.
LONGEST_SHOWN = 300


def tell_cut(overlay: Overlay, prompts: Iterable[tuple[str, str]], reporter: Reporter) -> None:
    """Warn of every prompt, given as (name, text), whose end the model does not read. Raises OverlayError.

    It skips the official negative prompt, which users did not write.
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
