"""coverage.json and coverage.html: what they say, that they are reproducible, and that names cannot break the page."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch
from lora_support import STYLE, linears, low_rank, make_overlay, official_keys, random_weights, save, shapes
from page_support import parsed
from support import load_all

from ltxpack.lora_bake import BakeOptions, BakeReport, bake, coverage, coverage_page
from ltxpack.lora_bake.coverage import TargetStat, split_name
from ltxpack.manifest import Bake
from ltxpack.reporter import SilentReporter

BASE = random_weights()
FACTORS = low_rank(linears())


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BakeReport]:
    folder = tmp_path_factory.mktemp("report")
    overlay = make_overlay(folder / "out", BASE, shards=2, distilled=official_keys(FACTORS))
    style = save(folder / "style.safetensors", official_keys(STYLE))
    [made] = bake(BakeOptions(overlay, (0.5,), added=((str(style), 0.8),)), SilentReporter())
    return overlay / made.path, made


def document_of(folder: Path) -> dict:
    return json.loads((folder / "coverage.json").read_text())


def test_the_document_on_disk_is_the_one_returned_and_summed_up(baked: tuple[Path, BakeReport]) -> None:
    folder, made = baked
    assert document_of(folder) == json.loads(json.dumps(made.document))
    summary = made.to_json()
    assert summary["made"] and summary["path"] == f"bakes/{made.name}" and "targets" not in summary
    assert json.loads(json.dumps(summary)) == summary
    lines = "\n".join(made.lines())
    matched = ("130 of 130 linears", f"{len(STYLE)} of 130 linears")
    assert all(part in lines for part in (*matched, "rank 4", "scale 0.8", "rule fp32", "kernel fp32"))


def test_matched_ranks_and_scales(baked: tuple[Path, BakeReport]) -> None:
    style, distilled = document_of(baked[0])["loras"]
    assert (distilled["matched"], distilled["total"]) == (130, 130)
    assert (style["matched"], style["total"]) == (len(STYLE), 130)
    assert distilled["ranks"] == {"4": 130} and style["ranks"] == {"2": len(STYLE)}
    assert distilled["scales"] == [0.5] and style["scales"] == [0.8]
    assert style["kinds"]["attn1.to_q"] == {"matched": 3, "total": 3}
    assert style["kinds"]["ff.net.2"] == {"matched": 0, "total": 3}
    assert sum(kind["total"] for kind in distilled["kinds"].values()) == 130
    assert style["namings"] == ["diffusion_model lora_A"]


def test_figures_agree_with_the_weights(baked: tuple[Path, BakeReport]) -> None:
    folder, _ = baked
    document = document_of(folder)
    found = load_all(folder)
    changed = {name: int((found[name] != BASE[name]).sum()) for name in BASE}
    assert document["changed_weights"] == sum(changed.values())
    assert document["changed_tensors"] == sum(count > 0 for count in changed.values())
    assert document["targeted_weights"] == sum(BASE[name].numel() for name in document["targets"])
    for name, target in document["targets"].items():
        module = name.removesuffix(".weight")
        delta = 0.5 * FACTORS[module][1].double() @ FACTORS[module][0].double()
        if module in STYLE:
            delta += 0.8 * STYLE[module][1].double() @ STYLE[module][0].double()
        assert target["changed"] == changed[name] and target["elements"] == BASE[name].numel()
        assert target["change"] == pytest.approx((delta.norm() / BASE[name].double().norm()).item(), rel=6e-3)
        assert [term["rank"] for term in target["terms"]] == ([2, 4] if module in STYLE else [4])
        assert [term["scale"] for term in target["terms"]] == ([0.8, 0.5] if module in STYLE else [0.5])


def test_kinds_and_the_whole_sum_up_their_targets(baked: tuple[Path, BakeReport]) -> None:
    document = document_of(baked[0])
    for kind, value in document["kinds"].items():
        targets = [target for name, target in document["targets"].items() if split_name(name)[1] == kind]
        assert value["targets"] == len(targets)
        assert value["changed_weights"] == sum(target["changed"] for target in targets)
        assert value["largest_change"] == max(target["change"] for target in targets)
        assert value["median_change"] == pytest.approx(
            statistics.median(target["change"] for target in targets), rel=5e-3
        )
    assert document["blocks"] == 3 and len(document["block_kinds"]) == 34
    changes = [target["change"] for target in document["targets"].values()]
    assert document["median_change"] == pytest.approx(statistics.median(changes), rel=5e-3)
    assert document["largest_change"] == max(changes)
    assert {lora["full_differences"] for lora in document["loras"]} == {0}


def test_per_target_alpha_shows_as_a_span_of_scales(tmp_path: Path) -> None:
    overlay = make_overlay(tmp_path / "out", BASE, distilled=official_keys(FACTORS))
    tensors = official_keys(FACTORS)
    alphas = {
        key.replace("lora_A.weight", "alpha"): float(2 ** (i % 3)) for i, key in enumerate(tensors) if "lora_A" in key
    }
    path = save(tmp_path / "alpha.safetensors", tensors | {key: torch.tensor(value) for key, value in alphas.items()})
    [made] = bake(BakeOptions(overlay, (1.0,), lora=str(path)), SilentReporter())
    [lora] = made.document["loras"]
    assert lora["scales"] == [0.25, 0.5, 1.0] and lora["alphas"] == ["1", "2", "4"]
    assert "scale 0.25 to 1" in "\n".join(made.lines())


def test_block_and_kind() -> None:
    embedder = "time_embed.emb.timestep_embedder.linear_1"
    assert split_name("transformer_blocks.7.attn1.to_q.weight") == (7, "attn1.to_q")
    assert split_name("transformer_blocks.12.ff.net.0.proj.bias") == (12, "ff.net.0.proj.bias")
    assert split_name("proj_in.weight") == (None, "proj_in")
    assert split_name(f"{embedder}.weight") == (None, embedder)


def test_a_change_from_zero_has_no_ratio() -> None:
    assert TargetStat(0.0, 1.0, 4, 4).change is None
    assert TargetStat(0.0, 0.0, 4, 0).change == 0.0
    assert TargetStat(4.0, 1.0, 4, 4).change == 0.5
    stats = {"proj_in.weight": TargetStat(0.0, 1.0, 256, 256)}
    document = coverage.build_report("x", [], stats, shapes(), Bake((), "fp32", "fp32", "cpu", (), ()))
    assert "from zero" in coverage_page.render(document).decode()
    assert json.loads(coverage.dump(document))["targets"]["proj_in.weight"]["change"] is None


def test_the_page_stands_alone(baked: tuple[Path, BakeReport]) -> None:
    data = (baked[0] / "coverage.html").read_bytes()
    page = parsed(data)
    assert not {"script", "link", "img", "iframe", "object", "form", "base"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert b"http" not in data and b"url(" not in data and b"@import" not in data
    assert baked[1].name in page.text and "130 of 130 linears" in page.text
    assert "proj_in.weight" in page.text and len(page.titles) == 3 * 34
