"""rank_pattern and alpha_pattern: what PEFT matches is matched, in counted work; the rest is refused by name."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltxpack.errors import AdapterError
from ltxpack.lora_bake.patterns import MAX_PATTERNS, MAX_STEPS, Automaton, PatternTable
from ltxpack.lora_bake.settings import from_document

CONFIG = Path("adapter_config.json")
MODULES = [
    f"transformer_blocks.{block}.{attention}.{linear}"
    for block in range(48)
    for attention in ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
    for linear in ("to_q", "to_k", "to_v", "to_out.0", "to_gate_logits", "other")
]


def by_peft(table: Mapping[str, int], name: str) -> int | None:
    """What PEFT documents: the first pattern that matches the name, or what follows one of its dots, to the end."""
    return next((value for pattern, value in table.items() if re.match(rf"(.*\.)?({pattern})$", name)), None)


ones = st.sampled_from(
    ["a", "b", "0", "_", "-", ".", r"\.", r"\-", r"\d", r"\D", r"\w", "[ab]", "[^a.]", "[a-z0-9_]", r"[\d_]", "[!]"]
)
items = st.tuples(ones, st.sampled_from(["", "", "", "", "*", "+", "?", "*?"])).map("".join)
branches = st.lists(items, max_size=3).map("".join)
groups = st.tuples(st.sampled_from(["(", "(?:"]), st.lists(branches, min_size=1, max_size=3).map("|".join)).map(
    lambda parts: f"{parts[0]}{parts[1]})"
)
sequences = st.lists(items | groups, min_size=1, max_size=4).map("".join)
patterns = st.tuples(
    st.sampled_from(["", "", "", "^"]),
    st.lists(sequences, min_size=1, max_size=2).map("|".join),
    st.sampled_from(["", "", "$"]),
).map("".join)
module_names = st.text("ab01._-!", min_size=1, max_size=10).filter(lambda name: not name.endswith("."))


@settings(max_examples=300)
@given(st.lists(patterns, min_size=1, max_size=3, unique=True), st.lists(module_names, min_size=1, max_size=6))
def test_what_is_taken_matches_as_in_peft(found: list[str], names: list[str]) -> None:
    table = {pattern: number for number, pattern in enumerate(found)}
    try:
        ours = PatternTable(table, "rank_pattern", CONFIG)
    except AdapterError as error:
        assert any(len(re.findall(r"[*+?]", pattern)) > 4 for pattern in found), error
        return
    # The one difference: in a plain name a dot is a dot, although PEFT would take any character there.
    plain = re.compile(r"\^?[\w-]+(\\?\.[\w-]+)*\$?")
    exact = {re.sub(r"\\?\.", r"\.", p) if plain.fullmatch(p) else p: number for p, number in table.items()}
    for name in names:
        assert ours.find(name, None) == by_peft(exact, name), (found, name)


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("to_q", 6 * 48),
        ("attn1.to_q", 48),
        (r"attn1\.to_q", 48),
        ("^transformer_blocks.0.attn1.to_q", 1),
        ("^attn1.to_q", 0),
        (r"transformer_blocks\.\d+\.attn1\.to_(q|k)$", 2 * 48),
        (r".*\.attn[12]\..*", 2 * 6 * 48),
        (r".*blocks\.([0-9]|1[0-9])\..*attn1.*", 2 * 6 * 20),
        (r"(?:attn1|attn2)\.to_q|audio_attn1\.to_k", 3 * 48),
        (r"transformer_blocks\.4[0-7]\..*?_attn\.to_out\.0", 2 * 8),
    ],
)
def test_patterns_as_they_are_written(pattern: str, matching: int) -> None:
    table = PatternTable({pattern: 1}, "rank_pattern", CONFIG)
    assert sum(table.find(name, 0) or 0 for name in MODULES) == matching
    assert sum(by_peft({pattern: 1}, name) or 0 for name in MODULES) == matching


def test_the_first_pattern_that_matches_wins_whatever_its_kind() -> None:
    table = PatternTable({r".*\.attn1\..*": 1, "to_q": 2, r".*to_[qk]": 3, "attn1.to_k": 4}, "rank_pattern", CONFIG)
    names = ("x.attn1.to_q", "x.attn2.to_q", "x.attn2.to_k", "x.attn1.to_k", "x.attn2.to_v")
    assert [table.find(name, None) for name in names] == [1, 2, 3, 1, None]


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("(a+)+b", "beyond the expressions known here"),
        ("(a|b)*", "beyond the expressions known here"),
        (r"(a)\1", "beyond the expressions known here"),
        ("a{2}", "beyond the expressions known here"),
        ("(?=a)b", "beyond the expressions known here"),
        ("(?i)a", "beyond the expressions known here"),
        ("a^b", "beyond the expressions known here"),
        ("a*+b", "beyond the expressions known here"),
        ("[z-a]", "bad character range"),
        ("((a)b)", "groups stand within groups"),
        ("a)", "groups stand within groups"),
        ("(a", "not closed"),
        ("a*b*c*d*e*", "more than 4"),
        ("x" * 513, "longer than 512"),
        ("(" + "|" * 511, "not closed"),
    ],
)
def test_other_expressions_are_refused_by_name(pattern: str, told: str) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(AdapterError, match=told) as caught:
            from_document({field: {pattern: 4}}, CONFIG)
        message = str(caught.value)
        assert message.startswith(f"{CONFIG}: {field} has a pattern that is not matched here")
        assert pattern[:80] in message and f"next: write plain module names in {field}" in message
        assert len(message) < 1000


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({f"m{number}": 4 for number in range(MAX_PATTERNS + 1)}, "rank_pattern has too many patterns"),
        ({f".*m{number}": 4 for number in range(101)}, "more than 100 of the patterns are no plain names"),
        ({"[a]" * 160 + str(number): 4 for number in range(30)}, "all patterns together are longer than 4096"),
    ],
)
def test_the_number_of_patterns_is_bounded(table: dict[str, int], told: str) -> None:
    with pytest.raises(AdapterError, match=told):
        from_document({"rank_pattern": table}, CONFIG)


def steps(patterns: list[str], names: list[str]) -> int:
    """What matching ``names`` takes."""
    automaton = Automaton()
    for number, pattern in enumerate(patterns):
        automaton.add(number, pattern)
    for name in names:
        automaton.first(name, -1)
    return automaton.steps


SLOW = [f"[a-z_.0-9]*[a-z_.0-9]*[a-z_.0-9]*[!]x{number}" for number in range(30)]


def test_a_name_is_read_once_however_the_pattern_looks() -> None:
    """A backtracking matcher takes some n**4 steps here, hours for the longest name."""
    shortest, longest = (steps(SLOW, ["ab." * count]) for count in (100, 1600))
    assert longest < 16 * shortest


def test_real_patterns_leave_room() -> None:
    expressions = [rf".*blocks\.{block}\.attn\d\.to_(q|k)" for block in range(48)]
    assert steps(expressions, MODULES) < MAX_STEPS / 4
    assert steps(SLOW, MODULES) < MAX_STEPS / 4


def test_work_beyond_all_bounds_is_refused_by_name() -> None:
    """Every letter brings a state that is new: what such an automaton could need is 2**500 states."""
    draw = random.Random(1)
    table = PatternTable({".*a" + "." * 500: 1}, "alpha_pattern", CONFIG)
    with pytest.raises(AdapterError, match="alpha_pattern takes too much work to match"):
        for _ in range(1000):
            table.find("".join(draw.choice("ab") for _ in range(1000)), None)
    assert table.steps < 1.01 * MAX_STEPS


def test_work_on_plain_names_is_counted_too() -> None:
    table = PatternTable({"x": 1}, "rank_pattern", CONFIG)
    with pytest.raises(AdapterError, match="rank_pattern takes too much work to match"):
        for _ in range(2000):
            table.find("a." * 500 + "b", None)
