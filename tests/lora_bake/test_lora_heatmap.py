"""coverage.html: columns in model order, one scale for all pages, everything of the document, nothing hostile."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_support import (
    dotted,
    linears,
    low_rank,
    make_overlay,
    official,
    official_keys,
    opened,
    random_weights,
    save,
    shapes,
)
from page_support import Page, parsed

from ltxpack.lora_bake import BakeOptions, bake, coverage_page
from ltxpack.lora_bake.adapter import LoraUse
from ltxpack.lora_bake.coverage import TargetStat, build_report, split_name
from ltxpack.manifest import Bake
from ltxpack.reporter import SilentReporter

EVIL = "\"><script>alert(1)</script>&'"
ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")


def applied(path: Path, strength: float = 1.0) -> LoraUse:
    """The LoRA in ``path``, as a bake has it."""
    return LoraUse.of(opened(path, allow_unmatched=True), strength, "ab" * 32)


def measured(change: float | None) -> TargetStat:
    """A target that changed by ``change``; None: from zero."""
    square = 1.0 if change is None else change * change
    return TargetStat(0.0 if change is None else 1.0, square, 16, 8)


def document_of(loras: Sequence[LoraUse], change: Callable[[str], float | None], rule: str = "fp32") -> dict:
    names = sorted({name for lora in loras for name in lora.adapter.targets})
    made = Bake((), rule, "fp32", "cpu", (), ())
    return build_report("x", loras, {name: measured(change(name)) for name in names}, shapes(), made)


def page_of(loras: Sequence[LoraUse], change: Callable[[str], float | None] = lambda name: 0.01) -> Page:
    return parsed(coverage_page.render(document_of(loras, change)))


@pytest.fixture
def whole(tmp_path: Path) -> LoraUse:
    """A LoRA of every linear."""
    return applied(save(tmp_path / "whole.safetensors", official_keys(low_rank(linears()))))


@pytest.fixture
def few(tmp_path: Path) -> LoraUse:
    """A LoRA of attn1's q and v in two of three blocks, with alpha 2 at rank 4."""
    modules = [f"transformer_blocks.{block}.attn1.{part}" for block in (0, 2) for part in ("to_q", "to_v")]
    tensors = official_keys(low_rank(modules))
    alphas = {f"diffusion_model.{official(module)}.alpha": torch.tensor(2.0) for module in modules}
    return applied(save(tmp_path / "few.safetensors", tensors | alphas))


def test_columns_and_their_cells_stand_in_model_order(whole: LoraUse) -> None:
    page = page_of([whole])
    parts = [cells for cells in page.rows if "q" in cells]
    assert [cell.strip() for cell in parts[0] if cell] == [
        *(["q", "k", "v", "out", "gate"] * 2 + ["in", "out"]) * 2,
        *["q", "k", "v", "out", "gate"] * 2,
    ]
    groups = coverage_page.column_groups(
        split_name(module)[1] for module in linears() if module.startswith("transformer_blocks")
    )
    assert [(group.stream, group.module) for group in groups] == [
        ("Video", "attn1"), ("Video", "attn2"), ("Video", "ff"),
        ("Audio", "audio_attn1"), ("Audio", "audio_attn2"), ("Audio", "audio_ff"),
        ("Audio and video", "audio_to_video_attn"), ("Audio and video", "video_to_audio_attn"),
    ]  # fmt: skip
    for group in groups:
        parts = ["to_q", "to_k", "to_v", "to_out.0", "to_gate_logits"]
        parts = parts if group.module in ATTENTIONS else ["net.0.proj", "net.2"]
        assert [kind for kind, _ in group.columns] == [f"{group.module}.{part}" for part in parts]
    kinds = [kind for group in groups for kind, _ in group.columns]
    assert [title.split(": ")[0] for title in page.titles] == [
        f"transformer_blocks.{block}.{kind}.weight" for block in range(3) for kind in kinds
    ]


def test_every_module_of_the_model_has_its_place() -> None:
    kinds = {split_name(module) for module in shapes()} - {(None, "scale_shift_table")}
    inside = {kind for block, kind in kinds if block is not None and "table" not in kind}
    outside = {kind for block, kind in kinds if block is None and "table" not in kind and not kind.endswith(".bias")}
    assert coverage_page.OTHER not in {group.stream for group in coverage_page.column_groups(inside)}
    assert sum(len(group.columns) for group in coverage_page.column_groups(inside)) == len(inside)
    ends = coverage_page.outside_blocks(outside)
    assert list(ends) == ["Video", "Audio"] and len(ends["Video"]) == len(ends["Audio"]) == 14
    assert ends["Video"][0] == "proj_in" and ends["Audio"][-1] == "audio_proj_out"


def test_a_bias_stands_beside_its_weight_and_an_unknown_module_at_the_end() -> None:
    first, last = coverage_page.column_groups(["zz.top", "attn1.to_k", "attn1.to_q.bias", "attn1.norm_q", "attn1.to_q"])
    assert [label for _, label in first.columns] == ["q", "q bias", "k", "q norm"]
    assert (last.stream, [label for _, label in last.columns]) == (coverage_page.OTHER, ["zz.top"])
    assert coverage_page.outside_blocks(["zz", "proj_in"]) == {"Video": ["proj_in"], coverage_page.OTHER: ["zz"]}


def test_the_scale_is_logarithmic_bounded_and_the_same_for_all_pages(whole: LoraUse, few: LoraUse) -> None:
    colours = [coverage_page.colour(10**power) for power in (-9, -4, -3, -2, -1, 0, 5)]
    assert colours[0] == colours[1] == coverage_page.RAMP[0] and colours[-1] == colours[-2] == coverage_page.RAMP[-1]
    assert colours[1:-1] == list(coverage_page.RAMP[::2]) and coverage_page.colour(None) == coverage_page.RAMP[-1]
    light = [luminance(coverage_page.colour(10 ** (-4 + step / 20))) for step in range(81)]
    assert all(darker < lighter for darker, lighter in itertools.pairwise(light))
    for document in (document_of([whole], lambda name: 1e-3), document_of([few], lambda name: 0.5)):
        shown = coverage_page.render(document).decode()
        colour = coverage_page.colour(document["largest_change"])
        assert shown.count(f"background:{colour}") >= len(document["targets"])
        ticks = parsed(shown.encode()).text
        assert "0.01 %0.1 %1 %10 %100 %" in ticks


def luminance(colour: str) -> float:
    """How light ``#rrggbb`` is: a map must also read in grey, and to who sees colours otherwise."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(share * channel**2.2 for share, channel in zip((0.2126, 0.7152, 0.0722), channels, strict=True))


def test_each_bin_of_the_distribution_counts_its_decade() -> None:
    counts = coverage_page.histogram([1e-4, 1.1e-2, 1.2e-2, 1.0, 2.0, 1e-5, 0.0, None])
    assert len(counts) == 40 and sum(counts) == 4
    assert (counts[0], counts[20], counts[39]) == (1, 2, 1)


def test_what_is_not_on_the_scale_is_clamped_and_counted(few: LoraUse) -> None:
    names = sorted(few.adapter.targets)
    changes: dict[str, float | None] = dict(zip(names, (3e-6, 2.5, 0.0, None), strict=True))
    document = document_of([few], changes.__getitem__)
    shown = coverage_page.render(document).decode()
    read = parsed(shown.encode())
    told = " ".join(read.text.split())
    for what in ("below 0.01 %", "above 100 %", "touched, and ΔW is zero", "changed from zero"):
        assert f"1{what}" in told
    assert f"{130 - 4}not touched" in told
    titles = {title.partition(": ")[0]: title for title in read.titles}
    assert "3.00e-06, below the scale" in titles[names[0]] and "2.50e+00, above the scale" in titles[names[1]]
    assert "0.00e+00," in titles[names[2]] and "from zero," in titles[names[3]]
    assert f'class=lo style="background:{coverage_page.RAMP[0]}"' in shown
    assert f'class=hi style="background:{coverage_page.RAMP[-1]}"' in shown


def test_median_and_largest_change_are_stated_and_its_target_named(few: LoraUse, tmp_path: Path) -> None:
    changes = dict(zip(sorted(few.adapter.targets), (0.01, 0.02, 0.03, 0.2), strict=True))
    document = document_of([few], changes.__getitem__)
    assert (document["median_change"], document["largest_change"]) == (0.025, 0.2)
    text = " ".join(parsed(coverage_page.render(document)).text.split())
    assert "2.5 %median ‖ΔW‖ / ‖W‖" in text and "20 %largest ‖ΔW‖ / ‖W‖" in text
    assert "block 2, attn1.to_v" in text
    modules = ["proj_in", "time_embed.emb.timestep_embedder.linear_1"]
    lora = applied(save(tmp_path / "two.safetensors", official_keys(low_rank(modules))))
    for largest in modules:
        read = page_of([lora], lambda name, most=largest: 0.9 if name == f"{most}.weight" else 1e-3)
        assert f"‖ΔW‖ / ‖W‖{largest}" in read.text


def test_untouched_modules_are_shown_and_what_matched_is_counted_by_column(few: LoraUse) -> None:
    read = page_of([few])
    assert sum("not touched" in title for title in read.titles) == 3 * 34 - 4
    assert read.row("matched")[:6] == ["2", "0", "2", "0", "0", ""]
    assert read.row("rank")[:5] == ["4", "", "4", "", ""]
    assert {cell for cell in read.row("in the model") if cell} == {"3"}
    assert "None of the 28 linears outside the blocks is touched." in read.text


def test_columns_are_summed_up_in_percent(few: LoraUse) -> None:
    changes = dict(zip(sorted(few.adapter.targets), (0.002, 5e-5, 0.25, 30.0), strict=True))
    read = page_of([few], changes.__getitem__)
    assert read.row("median, %")[:5] == ["13", "", ">999", "", ""]
    assert read.row("largest, %")[:5] == ["25", "", ">999", "", ""]
    assert page_of([few], lambda name: 5e-5).row("largest, %")[0] == "<.01"
    assert page_of([few], lambda name: None).row("largest, %")[0] == "∞"


def test_two_loras_have_their_own_rows_and_cards(whole: LoraUse, few: LoraUse) -> None:
    read = page_of([few, whole])
    assert read.row("LoRA 1 matched")[:3] == ["2", "0", "2"] and read.row("LoRA 2 matched")[:3] == ["3", "3", "3"]
    assert "1 · few" in read.text and "2 · whole" in read.text
    assert any("LoRA 1 rank 4 scale 0.5; LoRA 2 rank 4 scale 1" in title for title in read.titles)


def test_mixed_ranks_show_as_a_bound(tmp_path: Path) -> None:
    query = [module for module in linears() if module.endswith(".attn1.to_q")]
    factors = {module: low_rank([module], rank)[module] for module, rank in zip(query, (2, 3, 5), strict=True)}
    lora = applied(save(tmp_path / "mixed.safetensors", official_keys(factors)))
    assert page_of([lora]).row("rank")[0] == "≤5"
    assert "2 ×1, 3 ×1, 5 ×1" in page_of([lora]).text


def test_the_card_says_what_only_the_document_did(tmp_path: Path) -> None:
    module = "transformer_blocks.1.attn1.to_q"
    key = f"diffusion_model.{official(module)}"
    tensors = official_keys(low_rank([module])) | {
        f"{key}.alpha": torch.tensor(8.0),
        f"{key}.dora_scale": torch.ones(shapes()[f"{module}.weight"][0], 1),
        "diffusion_model.transformer_blocks.1.attn1.to_k.diff_b": torch.zeros(32),
        **dotted({"nowhere.at_all": low_rank([module])[module]}, lambda name: f"diffusion_model.{name}"),
    }
    lora = applied(save(tmp_path / "style.safetensors", tensors), 0.5)
    document = document_of([lora], lambda name: 0.01)
    assert document["loras"][0]["full_differences"] == document["loras"][0]["dora"] == 1
    text = parsed(coverage_page.render(document)).text
    for fact in (
        "strength0.5", "scale of B·A1", "alpha8", "DoRA1 target", "full differences1 target", "ranks4 ×1",
        "left out1 target, listed below", "1 of 130 linears and 1 other tensor", "rule fp32", "kernel fp32",
        "nowhere.at_all",
    ):  # fmt: skip
        assert fact in text, fact
    assert "not used by the official rule" not in text
    assert "not used by the official rule" in parsed(coverage_page.render({**document, "rule": "official"})).text


def test_a_long_list_of_left_out_keys_is_cut_on_the_page_and_whole_in_the_document(tmp_path: Path) -> None:
    count = coverage_page.MAX_LEFT_OUT + 17
    pair = low_rank(["proj_in"])["proj_in"]
    alien = {f"aliens.{i:03d}.<img src=x onerror=alert({i})>": pair for i in range(count - 1)}
    alien |= {"a" * 250: pair}
    tensors = official_keys(low_rank(linears())) | dotted(alien, lambda name: f"diffusion_model.{name}")
    overlay = make_overlay(tmp_path / "out", random_weights())
    path = save(tmp_path / "many.safetensors", tensors)
    [made] = bake(BakeOptions(overlay, (1.0,), lora=str(path), allow_unmatched=True), SilentReporter())
    folder = overlay / made.path
    left_out = json.loads((folder / "coverage.json").read_text())["loras"][0]["left_out"]
    assert sorted(left_out) == sorted(alien)
    read = parsed((folder / "coverage.html").read_bytes())
    assert "img" not in read.tags and not [name for name, _ in read.attributes if name.startswith("on")]
    assert f"{count} left out" in read.text and f"and 17 more; coverage.json lists all {count}" in read.text
    shown = [module for module in alien if module in read.text]
    assert len(shown) == coverage_page.MAX_LEFT_OUT - 1 and "a" * 201 not in read.text and "a" * 90 + " … " in read.text


def evil_document() -> dict[str, Any]:
    """A document whose every name would break a page that does not escape it."""
    kind = {"matched": 1, "total": 1}
    figures = {"targets": 1, "total": 1, "changed_weights": 1, "mean_change": 0.1, "median_change": 0.1}
    return {
        "bake": EVIL, "rule": EVIL, "kernel": EVIL, "device": EVIL, "changed_weights": 0, "targeted_weights": 0,
        "changed_tensors": 0, "blocks": 1, "block_kinds": [EVIL, f"attn1.{EVIL}", f"ff.{EVIL}.bias"],
        "median_change": 0.1, "largest_change": 0.1,
        "kinds": {EVIL: {**figures, "largest_change": 0.1}},
        "loras": [{"name": EVIL, "file": EVIL, "strength": 1.0, "scales": [1.0], "ranks": {"4": 1}, "matched": 1,
                   "total": 1, "other_tensors": 0, "namings": [EVIL], "blake3": EVIL, "alphas": [EVIL],
                   "dora": 0, "full_differences": 0, "methods": {"lora": 1}, "left_out": [EVIL],
                   "kinds": {EVIL: kind, f"proj_in.{EVIL}": kind}}],
        "targets": {f"blocks.0.{EVIL}": {"change": 0.1, "changed": 1, "elements": 1, "terms": []},
                    EVIL: {"change": None, "changed": 1, "elements": 1, "terms": []}},
    }  # fmt: skip


def test_names_are_escaped() -> None:
    read = parsed(coverage_page.render(evil_document()))
    assert "script" not in read.tags and EVIL in read.text
    # Bake, rule, kernel, device, name, naming, file, alpha, left out and its LoRA, map's columns, target, largest.
    assert read.text.count(EVIL) >= 13
    assert not [name for name, _ in read.attributes if name not in ALLOWED]


ALLOWED = {
    "charset", "class", "colspan", "content", "lang", "name", "rowspan", "scope", "span", "style", "title",
}  # fmt: skip


@pytest.mark.parametrize("name", ["a\u202eb", "\ud800", "\x00\x07", "&amp;lt;", "--><!--", "]]>", "</title></style>"])
def test_odd_characters_leave_the_page_whole(name: str) -> None:
    document = evil_document()
    document["bake"] = document["loras"][0]["name"] = document["loras"][0]["left_out"][0] = name
    read = parsed(coverage_page.render(document))
    assert "The same bake always gives the same page." in read.text and "script" not in read.tags


def test_names_may_break_between_segments_and_read_the_same(tmp_path: Path) -> None:
    stem = "my_lora.of_many-long_words_" + "x" * 150
    path = save(tmp_path / f"{stem}.safetensors", official_keys(low_rank(["proj_in"])))
    shown = coverage_page.render(document_of([applied(path)], lambda name: 0.01)).decode()
    assert "my_lora.<wbr>of_<wbr>many-<wbr>long_<wbr>words_<wbr>x" in shown and stem in parsed(shown.encode()).text


def test_a_bake_that_changes_nothing_still_shows_the_model(whole: LoraUse) -> None:
    document = build_report("x", [whole], {}, shapes(), Bake((), "fp32", "fp32", "cpu", (), ()))
    assert document["median_change"] is None and document["largest_change"] is None
    read = parsed(coverage_page.render(document))
    assert "No weight inside the blocks is touched." in read.text and "None of the 28 linears" in read.text
    assert len(read.titles) == 3 * 34 and all("not touched" in title for title in read.titles)


MIXES: dict[str, tuple[float | None, ...]] = {
    "all kinds of change": (None, 0.0, 3e-30, 1e-5, 1.23e-4, 0.0123, 0.999, 1.0, 1.01, 123.0, 123456.0),
    "none": (0.0,),
    "from zero": (None,),
    "from zero and none": (None, 0.0),
    "above": (1.11, 12345.0),
    "below": (1.11e-5,),
    "above and below": (1.11e-45, 1.11e5),
    "usual": (0.00123, 0.0456, 0.0789),
}


@pytest.mark.parametrize("mix", MIXES)
def test_no_page_is_longer_than_its_bound(whole: LoraUse, few: LoraUse, mix: str) -> None:
    """A plan takes for the reports twice the length of those with this change everywhere."""
    dice = random.Random(mix)
    for loras in ([whole], [few], [few, whole]):
        bound = 2 * len(coverage_page.render(document_of(loras, lambda name: 1.11e-100)))
        document = document_of(loras, lambda name: dice.choice(MIXES[mix]))
        assert bound / 5 < len(coverage_page.render(document)) <= bound
