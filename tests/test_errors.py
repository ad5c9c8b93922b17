"""Messages: one paragraph of printable text, whatever stood in the file they tell of."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from next_commands import fault_of
from support import REPOSITORY

from ltxpack import errors
from ltxpack.cli.terminal import say_error
from ltxpack.errors import AdapterError, BadLinesError, FormatError, LtxpackError, printable

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
        "x: a\\nb\\n\\n ", "  expected 1", *["  - a\\nb\\n\\n"] * 10, "  - and 90 m", "  next: fetc",
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


def test_a_next_that_inspects_names_the_file_if_it_is_here(tmp_path: Path) -> None:
    (tmp_path / "my lora").touch()
    error = AdapterError("holds no LoRA", file=tmp_path / "my lora")
    assert error.next == f"ltxpack inspect '{tmp_path}/my lora' (says what a LoRA holds)"
    assert AdapterError("holds no LoRA", file="org/repo/FILE").next.startswith("ltxpack inspect FILE (")
    other = AdapterError("is empty", file=tmp_path, next="ltxpack inspect FILE_OR_OVERLAY")
    assert other.next == "ltxpack inspect FILE_OR_OVERLAY"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("ltxpack verify 'my (own) out' --repair", None),
        ("ltxpack inspect FILE (it's one of ours)", None),
        ("ltxpack run out --prompt TEXT --device cpu", None),
        ("ltxpack run --help", None),
        ("choose another folder", None),
        ("ltxpack bake-lora out --force", "strength"),
        ("ltxpack run out --device cpu", "lacks --prompt"),
        ("ltxpack run out --prompt TEXT --stages 2", "No such option"),
        ("ltxpack run out --prompt TEXT --dtype int8", "int8"),
        ("ltxpack verify my out", "unexpected"),
        ("ltxpack inspect FILE says what it is", "unexpected"),
        ("ltxpack verify out, or take another", "unexpected"),
        ("ltxpack run … --device cpu", "left out"),
        ("free some memory; ltxpack plan says more", "middle"),
        ("ltxpack plan (or ltxpack verify OVERLAY)", "middle"),
        ("ltxpack verify it's", "quotation"),
    ],
)
def test_a_next_is_a_command_that_parses_or_plain_words(text: str, fault: str | None) -> None:
    found = fault_of(text)
    assert found is None if fault is None else found is not None and fault in found


def test_every_next_written_in_the_package_can_be_typed() -> None:
    """Those that no test meets too; a placeholder of an f-string stands for any one word."""
    faults = {text: fault for text in written_nexts() if (fault := fault_of(text, stand_in="STAND-IN"))}
    assert not faults


def written_nexts() -> Iterator[str]:
    """``next=`` of every call, and the fallback of every class."""
    for path in (REPOSITORY / "ltxpack").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            value = node.value if isinstance(node, ast.keyword) and node.arg == "next" else None
            if isinstance(value, ast.Constant | ast.JoinedStr):
                parts = value.values if isinstance(value, ast.JoinedStr) else [value]
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "STAND-IN" for part in parts)
    yield from (each.fallback for each in error_classes())


def error_classes() -> list[type[LtxpackError]]:
    return [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, LtxpackError)]


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = [line.strip("├─└│ ").split()[0] for line in (errors.__doc__ or "").splitlines() if "──" in line]
    assert {*drawn, "LtxpackError"} == {each.__name__ for each in error_classes()}
