"""The exception tree. Every failure that a user reads is one of these exceptions.

LtxpackError
├── UsageError        wrong arguments (exit status 2)
│   └── BadLinesError unusable lines of a prompts file, all listed
├── FormatError       a file is not what it claims to be: truncated, hostile, not safetensors, bad JSON
│   └── OtherFormatError  a file of another format than safetensors: GGUF, a pickle, a web page
├── SourceError       an input is out of reach: ambiguous, gated, no network
│   └── AbsentError   an input does not exist
├── UnsupportedError  a sound file this version does not convert: other generation, unknown tensor or field
├── AdapterError      a LoRA that does not fit: unmatched keys, half pairs, wrong shapes
├── OverlayError      an overlay that is missing, changed, incomplete or in use
├── UnwrittenError    an output of a run that could not be written, as on a full disk
├── DeviceError       no such device, or too little memory on it
└── FailedLinesError  some of many videos were not made, all listed
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

MAX_LISTED = 10
# The most that a hostile file may add to a message; names of tensors and modules are far shorter.
LONGEST_PART = 1000
LONGEST_ITEM = 300


class LtxpackError(Exception):
    """A failure as one message: the place, what was expected, what was found, and what to do next.

    Rendered as::

        out/transformer/x.safetensors: transformer_blocks.7.attn1.to_q.weight: shape differs
          expected bf16 [4096, 4096], found bf16 [4096, 2048]
          next: ltxpack verify out/

    ``next`` is a command or plain words. A command begins with ``ltxpack`` and works as typed, once the user has filled
    in names in capitals; a remark in parentheses may follow it. Plain words hold no ltxpack command. The tests parse
    each ``next`` that they meet against the command line.
    """

    exit_status = 1
    # The ``next`` if the code that raises gives none.
    fallback = "ltxpack --help"
    max_listed = MAX_LISTED
    longest_item = LONGEST_ITEM

    def __init__(
        self,
        problem: str,
        *,
        file: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        expected: object = None,
        found: object = None,
        items: Sequence[object] = (),
        next: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = None if file is None else os.fspath(file)
        self.tensor = tensor
        self.expected = expected
        self.found = found
        self.items = tuple(items)
        self.next = _with_file(next or self.fallback, self.file)
        super().__init__(self.render())

    def render(self) -> str:
        """The message as printed, without the leading ``error:``."""
        named = [one_line(part) for part in (self.file, self.tensor and clipped(self.tensor)) if part]
        head = ": ".join([*named, printable(clipped(self.problem))])
        lines = [head]
        facts = [
            f"{word} {one_line(clipped(str(value)))}"
            for word, value in (("expected", self.expected), ("found", self.found))
            if value is not None
        ]
        if facts:
            lines.append("  " + ", ".join(facts))
        lines += [f"  - {one_line(clipped(str(item), self.longest_item))}" for item in self.items[: self.max_listed]]
        if len(self.items) > self.max_listed:
            lines.append(f"  - and {len(self.items) - self.max_listed} more")
        lines.append(f"  next: {printable(self.next)}")
        return "\n".join(lines)


class UsageError(LtxpackError):
    """Wrong arguments."""

    exit_status = 2
    fallback = "the same command with --help says what it takes"


class BadLinesError(UsageError):
    """Unusable lines of a prompts file."""

    max_listed = longest_item = sys.maxsize


class FormatError(LtxpackError):
    """A file is not what it claims to be."""

    fallback = "fetch or write that file again, then run the same command again"


class OtherFormatError(FormatError):
    """A file of another format than safetensors, which ``found`` names."""


class SourceError(LtxpackError):
    """An input is out of reach."""

    fallback = "correct the name or fetch the file, then run the same command again"


class AbsentError(SourceError):
    """An input does not exist."""


class UnsupportedError(LtxpackError):
    """A sound file that this version does not convert."""

    fallback = "ltxpack inspect FILE (says what a file is; this version converts LTX-2.3)"


class AdapterError(LtxpackError):
    """A LoRA that does not fit the transformer."""

    fallback = "ltxpack inspect FILE (says what a LoRA holds)"


class OverlayError(LtxpackError):
    """An overlay that is missing, changed, incomplete or in use."""

    fallback = "ltxpack verify OVERLAY"


class UnwrittenError(LtxpackError):
    """An output of a run that could not be written; ``items`` list the files of the video that stay."""

    fallback = "free some space, then run the same command again"

    def keeping(self, *paths: str | os.PathLike[str]) -> UnwrittenError:
        """The same error, with ``paths`` as the whole files of the video."""
        kept = [f"kept: {os.fspath(path)}" for path in paths] or ["nothing of this video is kept"]
        return UnwrittenError(self.problem, file=self.file, found=self.found, items=kept, next=self.next)


class DeviceError(LtxpackError):
    """A device that does not exist or is too small."""

    fallback = "the same command with --device cpu"


class FailedLinesError(LtxpackError):
    """Some of many videos were not made."""

    max_listed = longest_item = sys.maxsize


def _with_file(next: str, file: str | None) -> str:
    """``next`` with ``file`` in the place of FILE, if it inspects a file and ``file`` is here."""
    with contextlib.suppress(OSError):
        if file is not None and f"{next} ".startswith("ltxpack inspect FILE ") and Path(file).exists():
            return next.replace("FILE", quoted(file), 1)
    return next


def printable(text: str) -> str:
    """``text`` with control characters escaped, so that a hostile name cannot write to the terminal."""
    return "".join(ch if ch.isprintable() or ch == "\n" else ch.encode("unicode_escape").decode() for ch in text)


def one_line(text: str) -> str:
    """``text`` as :func:`printable`, its line breaks escaped too: a name must not look like a line of the message."""
    return printable(text).replace("\n", "\\n")


def clipped(text: str, longest: int = LONGEST_PART) -> str:
    """The first ``longest`` characters of ``text``, the last of them an ellipsis if ``text`` is longer."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def listed(items: Sequence[str], most: int = MAX_LISTED) -> str:
    """The first of ``items`` in one sentence, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(clipped(item, LONGEST_ITEM) for item in items[:most]) + more


def quoted(path: str | os.PathLike[str]) -> str:
    """``path`` as it is typed in a shell, for a command to type next; a Path never looks like an option."""
    text = os.fspath(path)
    return shlex.quote(f"./{text}" if text.startswith("-") and not isinstance(path, str) else text)
