"""Holds every ``next`` of every message to what errors.py says of it: a command that parses, or plain words.

``conftest`` records the errors that are made while a test runs; ``fault_of`` says what is wrong with one text.
"""

from __future__ import annotations

import re
import shlex
from unittest import mock

import click

from ltxpack.cli import COMMANDS, cli
from ltxpack.errors import LtxpackError

COMMAND = re.compile(r"\bltxpack (?:--?\w|(?:" + "|".join(COMMANDS) + r")\b)")
# What click does not ask for, and the command refuses to go without.
NEEDED = {"run": {"--prompt", "--prompts"}}


class Recorder:
    """Notes the fault of every ``next`` from the moment it is made."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        real = LtxpackError.__init__

        def recording(error: LtxpackError, *arguments: object, **named: object) -> None:
            real(error, *arguments, **named)  # type: ignore[arg-type]
            fault = fault_of(error.next)
            if fault is not None:
                self.faults.append(f"next: {error.next}\n  {fault}")

        LtxpackError.__init__ = recording  # type: ignore[method-assign]

    def taken(self) -> list[str]:
        """The faults since the last call."""
        found, self.faults = self.faults, []
        return found


def fault_of(text: str, stand_in: str | None = None) -> str | None:
    """What is wrong with ``text`` as a ``next``, or None. ``stand_in``: a word that may be any value."""
    if "…" in text and "'" not in text:
        return "something is left out of it"
    try:
        words, remark = _split(text) if COMMAND.match(text) else ([], text)
    except ValueError as error:
        return str(error)
    if COMMAND.search(remark):
        return "a command stands in the middle of it"
    return _fault_of_command(words, stand_in) if words else None


def _split(text: str) -> tuple[list[str], str]:
    """The words of the command, and the remark in parentheses after it. Raises ValueError for an open quotation."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    while (word := lexer.get_token()) is not None and word != "(":
        words.append(word)
    return words, "" if word is None else lexer.instream.read()


def _fault_of_command(words: list[str], stand_in: str | None) -> str | None:
    """What click says of the command; nothing is run, no file is looked for."""
    if words[-1] == "--help" or words[1].startswith("-"):
        return None
    needed = NEEDED.get(words[1], set())
    if needed and not needed & set(words):
        return f"lacks {' or '.join(sorted(needed))}"
    with mock.patch.object(click.Path, "convert", lambda self, value, parameter, context: value):
        try:
            command = cli.get_command(click.Context(cli), words[1])
            assert command is not None, words[1]
            command.make_context(words[1], words[2:])
        except click.ClickException as error:
            message = error.format_message()
            # The last placeholder may stand for more words, such as options.
            return None if stand_in and (stand_in in message or stand_in == words[-1]) else message
    return None
