"""rank_pattern and alpha_pattern: plain names match as in PEFT; any other expression is refused by name."""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_support import low_rank, nested, opened, peft_folder, shapes, unfit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import get_pattern_key

from ltxpack.errors import AdapterError
from ltxpack.lora_bake.adapter import Adapter
from ltxpack.ltx23.expected import inventory, published_configs
from ltxpack.ltx23.lora_keys import linear_modules
from ltxpack.ltx23.lora_statements import MAX_MASKS, Patterns
from ltxpack.ltx23.renames import TRANSFORMER

CONFIG = Path("adapter_config.json")
MODULE = "transformer_blocks.0.attn1.to_q"


words = st.text("ab0_-", min_size=1, max_size=2)
names = st.lists(words, min_size=1, max_size=4).map(".".join)
patterns = st.tuples(
    st.sampled_from(["", "", "^"]),
    st.lists(words, min_size=1, max_size=3).flatmap(lambda w: st.sampled_from([".".join(w), r"\.".join(w)])),
    st.sampled_from(["", "$"]),
).map("".join)


@given(st.lists(patterns, min_size=1, max_size=4, unique=True), st.lists(names, min_size=1, max_size=6))
def test_plain_names_match_as_in_peft(found: list[str], modules: list[str]) -> None:
    table = {pattern: number for number, pattern in enumerate(found)}
    ours = Patterns(table, "rank_pattern", CONFIG)
    for name in modules:
        assert ours.find([name], None) == table.get(get_pattern_key(list(table), name)), (found, name)
    matched = {pattern for pattern in found if any(get_pattern_key([pattern], name) == pattern for name in modules)}
    told = set(ours.unused([name] for name in modules))
    # A name that is no module's may still be spelled like a pattern: PEFT returns the name where nothing matches.
    assert not told & (matched - set(modules))


def test_a_dot_stands_for_any_letter_as_in_peft() -> None:
    table = {"to.q": 8, r"to\.k": 9}
    assert [Patterns(table).find([name], None) for name in ("a.to_q", "a.to.q", "to.k", "to_k")] == [8, 8, 9, None]
    with pytest.raises(AdapterError, match="too many patterns of different forms"):
        Patterns({"a" * i + ".b" + "c" * j: 1 for i in range(1, 40) for j in range(40)}, "rank_pattern", CONFIG)
    assert MAX_MASKS < 40 * 39


@pytest.mark.parametrize("official", [False, True])
def test_every_linear_of_the_published_model_may_have_a_pattern_and_is_compared_once(
    official: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    linears = sorted(linear_modules(inventory("transformer", published_configs()["transformer"])))
    names = [TRANSFORMER.reverse().rename(name) for name in linears] if official else linears
    found = Patterns({name: number for number, name in enumerate(names)})
    compared = mock.Mock(wraps=found._entries_of)
    monkeypatch.setattr(found, "_entries_of", compared)
    for _ in range(3):
        assert [found.find([name], None) for name in names[:20]] == list(range(20))
        assert not found.unused([name] for name in names)
    assert compared.call_count == len(names)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", r"attn\d", ".*to_q", "(a|b)", "a{2}", "(?i)a", "a^b", "[z-a]", "a*b", "", "a..b", ".a", "a b", r"a\-b"],
)
def test_other_expressions_are_refused_by_name(pattern: str) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(AdapterError) as caught:
            Patterns({pattern: 4}, field, CONFIG)
        message = str(caught.value)
        assert message.startswith(f"{CONFIG}: {field} has a pattern that is no plain module name")
        assert pattern[:80] in message and f"next: write plain module names in {field}" in message
        assert len(message) < 1000


def peft(folder: Path, prefix: str, **stated: object) -> Adapter:
    factors = low_rank([MODULE, "proj_in"])
    return opened(peft_folder(folder, factors, {"r": 4, "lora_alpha": 4, **stated}, prefix))


@pytest.mark.parametrize("prefix", ["model.", "diffusion_model.", "transformer.", ""])
@pytest.mark.parametrize("anchor", ["", "^"])
def test_a_pattern_may_carry_the_prefix_of_the_wrapped_model(prefix: str, anchor: str, tmp_path: Path) -> None:
    # PEFT's anchor stands before the whole name in the wrapped model.
    for number, written in enumerate({prefix} if anchor else {prefix, ""}):
        adapter = peft(tmp_path / str(number), prefix, alpha_pattern={anchor + written + MODULE: 16})
        assert {name: target.factor for name, target in adapter.targets.items()} == {
            f"{MODULE}.weight": 4.0,
            "proj_in.weight": 1.0,
        }
        assert adapter.warnings == ()


def test_a_pattern_that_matches_no_module_is_told(tmp_path: Path) -> None:
    table = {"blocks.7.nothing": 16, "^attn1.to_q": 16, "to_q": 4}
    [told] = peft(tmp_path, "", alpha_pattern=table).warnings
    assert told == "alpha_pattern has 2 patterns matching none of its modules: blocks.7.nothing, ^attn1.to_q"


def wrapped_model(prefix: str) -> torch.nn.Module:
    """A model with a few of the transformer's linears under ``prefix``."""
    names = (MODULE, MODULE.replace("to_q", "to_k"), MODULE.replace(".0.", ".1."), "proj_in")
    return nested({prefix + name: torch.nn.Linear(*shapes()[f"{name}.weight"][::-1]) for name in names})


spelled = st.sampled_from(["to_q", "attn1.to_q", r"attn1\.to_k", "^PREFIX" + MODULE, "^" + MODULE, "PREFIX" + MODULE,
                           "to_q$", "transformer_blocks.1.attn1.to_q", "proj_in", "proj.in", "nothing"])  # fmt: skip


@pytest.mark.filterwarnings("ignore:The following")
@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(["", "model.", "diffusion_model.", "transformer."]),
    # PEFT cannot load again what several patterns for one module made.
    st.dictionaries(spelled, st.integers(1, 5), max_size=1),
    st.dictionaries(spelled, st.integers(1, 40), max_size=3),
    st.booleans(),
)
def test_ranks_and_scales_are_those_of_peft(
    prefix: str, ranks: dict[str, int], alphas: dict[str, int], rslora: bool
) -> None:
    tables = ({name.replace("PREFIX", prefix): value for name, value in table.items()} for table in (ranks, alphas))
    rank_pattern, alpha_pattern = tables
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_k", "proj_in"], use_rslora=rslora,
        rank_pattern=rank_pattern, alpha_pattern=alpha_pattern,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(wrapped_model(prefix), config).save_pretrained(folder)
        adapter = opened(Path(folder))
        # PEFT sorts the patterns as it saves them: what it loads counts.
        model = PeftModel.from_pretrained(wrapped_model(prefix), folder)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    assert len(layers) == len(adapter.targets) == 4
    for name, layer in layers.items():
        target = adapter.targets[name.removeprefix(f"base_model.model.{prefix}") + ".weight"]
        assert target.rank == layer.r["default"]
        assert target.factor == pytest.approx(layer.scaling["default"])


def test_ranks_of_patterns_that_peft_has_sorted(tmp_path: Path) -> None:
    """The factors say which of two patterns was the first."""
    for rank in (4, 8):
        factors = low_rank([MODULE], rank)
        stated = {"r": 2, "lora_alpha": 8, "rank_pattern": {"attn1.to_q": 4, "to_q": 8}}
        adapter = opened(peft_folder(tmp_path / str(rank), factors, stated))
        assert adapter.factor == 8 / rank
    unfit(peft_folder(tmp_path / "x", low_rank([MODULE], 2), stated), "1 rank mismatch")
