"""Messages: one paragraph of printable text, whatever stood in the file they tell of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltxpack.cli.terminal import say_error
from ltxpack.errors import BadLinesError, FormatError, printable

HOSTILE = "a\nb\n\n  next: rm -rf ~\x1b[2J\u202e" + "x" * 100_000


@given(st.text(), st.text(), st.text(), st.lists(st.text(), max_size=3))
def test_a_message_has_the_lines_it_was_given_and_no_other(
    name: str, tensor: str, found: str, items: list[str]
) -> None:
    message = str(FormatError("is wrong", file=name, tensor=tensor, expected=found, found=found, items=items))
    assert message.replace("\n", "").isprintable()
    first, facts, *rest, last = message.split("\n")
    assert first.endswith("is wrong")
    assert facts.startswith("  expected ")
    assert len(rest) == len(items) and all(line.startswith("  - ") for line in rest)
    assert last == f"  next: {FormatError.fallback}"


def test_what_a_hostile_file_adds_is_short_and_stays_in_its_line() -> None:
    message = str(FormatError("is wrong", file="x", tensor=HOSTILE, expected=1, found=HOSTILE, items=[HOSTILE] * 100))
    assert [line[:12] for line in message.split("\n")] == [
        "x: a\\nb\\n\\n ", "  expected 1", *["  - a\\nb\\n\\n"] * 20, "  - and 80 m", "  next: fetc",
    ]  # fmt: skip
    assert len(message) < 10_000


def test_lines_that_a_user_wrote_are_all_told_in_full() -> None:
    faults = [f"line {number}: {'x' * 2000}" for number in range(50)]
    message = str(BadLinesError("bad lines", items=faults))
    assert all(fault in message for fault in faults)


def test_an_error_of_the_system_is_printed_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    say_error("a\x1b[2J\u202e: No such file")
    assert capsys.readouterr().err == "error: a\\x1b[2J\\u202e: No such file\n"
    assert printable("a\nb") == "a\nb"
