"""Which bakes ``auto`` picks (DESIGN, Commands)."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ltxpack.errors import OverlayError, UsageError
from ltxpack.manifest import Bake, BakedLora, FileRecord, Lora, Manifest, Source
from ltxpack.runtime.overlay import Overlay, Stack, choose, stacks
from ltxpack.runtime.sampling.recipes import DISTILLED as DISTILLED_RECIPE
from ltxpack.runtime.sampling.recipes import HQ, ONE_STAGE, TWO_STAGE, Recipe

DISTILLED, STYLE, OTHER = "d" * 64, "5" * 64, "0" * 64


def lora(digest: str, strength: float) -> BakedLora:
    return BakedLora("x", "x.safetensors", 1, digest, strength, strength)


def bake(*loras: BakedLora, form: str = "bf16") -> Bake:
    return Bake(loras, "fp32", "fp32", "cpu", (FileRecord("x.json", 1, "0" * 64),), (), form)


CODED = {
    f"distilled-{s:g}-{form}": bake(lora(DISTILLED, s), form=form)
    for s in (0, 0.25, 0.5, 0.8) for form in ("fp8", "int8")
} | {"base-fp8": bake(form="fp8")}  # fmt: skip
ALONE = {f"distilled-{s:g}": bake(lora(DISTILLED, s)) for s in (0.25, 0.5, 0.8, 1.0)}
STACKED = {f"distilled-{s:g}+style-0.8": bake(lora(STYLE, 0.8), lora(DISTILLED, s)) for s in (0.25, 0.5)}


def manifest(bakes: dict[str, Bake]) -> Manifest:
    kept = (Lora("distilled", FileRecord("loras/x.safetensors", 1, DISTILLED)),)
    return Manifest("2.3.0", 33, None, Source(None, None, ()), {}, kept, (), bakes)


def at_out(manifest: Manifest) -> Overlay:
    return Overlay(Path("out"), manifest)


def pick(bakes: dict[str, Bake], stage1: str = "auto", stage2: str = "auto") -> tuple[str, ...]:
    choice = choose(at_out(manifest(bakes)), HQ, (stage1, stage2))
    official = choice.stages == ("distilled-0.25", "distilled-0.5")
    assert ("official pair" in choice.note) == (not official and "style" not in choice.note)
    return choice.stages


def some(*names: str) -> dict[str, Bake]:
    return {name: {**ALONE, **STACKED, **CODED}[name] for name in names}


def test_a_bake_whose_folder_was_removed_counts_as_not_made(overlay: Path) -> None:
    """A lost file of a bake is damage."""
    shutil.rmtree(overlay / "bakes/distilled-0.25")
    found = choose(Overlay.open(overlay), HQ, ("auto", "auto"))
    assert found.stages == ("base", "distilled-0.5")
    assert found.note.endswith("; without bakes/distilled-0.25, whose folders were removed")
    with pytest.raises(OverlayError, match=r"bakes/distilled-0\.25") as refused:
        choose(Overlay.open(overlay), HQ, ("distilled-0.25", "auto"))
    assert "verify" in refused.value.next
    (overlay / "bakes/distilled-0.5/config.json").unlink()
    with pytest.raises(OverlayError, match="has changed"):
        Overlay.open(overlay)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["distilled-0.25", "distilled-0.5"], ("distilled-0.25", "distilled-0.5")),
        (["distilled-1"], ("base", "distilled-1")),
        (["distilled-0.25", "distilled-1"], ("distilled-0.25", "distilled-1")),
        (["distilled-0.5", "distilled-1", "distilled-0.8"], ("base", "distilled-0.5")),
        (["distilled-0.25+style-0.8", "distilled-0.5+style-0.8"],) * 2,
        (["distilled-0.5+style-0.8", "distilled-1"], ("base", "distilled-1")),
    ],
)
def test_auto(names: list[str], expected: tuple[str, str]) -> None:
    assert pick(some(*names)) == tuple(expected)


@pytest.mark.parametrize("names", [[], ["distilled-0.25"], ["distilled-0.8", "distilled-1"]])
def test_no_bake_for_stage_2_is_refused_with_the_command(names: list[str]) -> None:
    with pytest.raises(OverlayError) as caught:
        pick(some(*names))
    assert "next: ltxpack" in str(caught.value)
    assert all(name in str(caught.value) for name in names)


def test_stacked_bakes_with_two_suffixes_are_not_guessed_among() -> None:
    other = {"distilled-0.5+other-1": bake(lora(OTHER, 1.0), lora(DISTILLED, 0.5))}
    with pytest.raises(OverlayError):
        pick({**some("distilled-0.5+style-0.8"), **other})


def test_bakes_of_another_lora_do_not_count() -> None:
    with pytest.raises(OverlayError):
        pick({"mine-0.5": bake(lora(OTHER, 0.5))})


def test_a_distilled_checkpoint_needs_no_bake_and_one_stage_has_no_second() -> None:
    distilled = replace(manifest({}), transformer_kind="distilled")
    assert choose(at_out(distilled), DISTILLED_RECIPE, ("auto", "auto")).stages == ("base", "base")
    with pytest.raises(UsageError, match="has no stage 2"):
        choose(at_out(manifest({})), ONE_STAGE, ("base", "base"))


@pytest.mark.parametrize("recipe", [HQ, TWO_STAGE, ONE_STAGE], ids=lambda recipe: recipe.name)
def test_recipes_of_the_full_model_are_refused_on_a_distilled_base_unless_forced(recipe: Recipe) -> None:
    distilled = replace(manifest({}), transformer_kind="distilled")
    with pytest.raises(OverlayError, match="wants the full model") as caught:
        choose(at_out(distilled), recipe, ())
    assert "next: ltxpack run out --recipe distilled --prompt TEXT" in str(caught.value)
    assert set(choose(at_out(distilled), recipe, ("base",)).stages) == {"base"}


def test_a_stack_is_taken_from_its_own_bakes_alone() -> None:
    """In place of the base the one with the distilled LoRA at 0: the base would lack the stacked LoRA."""
    style: Stack = ((STYLE, 0.8),)
    zero = {"distilled-0+style-0.8": bake(lora(STYLE, 0.8), lora(DISTILLED, 0.0))}
    holds = manifest({**some(*ALONE, *STACKED), **zero})
    assert set(stacks(holds)) == {(), style}

    def taken(recipe: Recipe, holds: Manifest) -> tuple[str, ...]:
        return choose(at_out(holds), recipe, ("auto", "auto"), stack=style).stages

    assert taken(HQ, holds) == tuple(STACKED)
    assert taken(DISTILLED_RECIPE, holds) == ("distilled-0.5+style-0.8",) * 2
    assert taken(TWO_STAGE, holds) == ("distilled-0+style-0.8", "distilled-0.5+style-0.8")
    assert taken(ONE_STAGE, holds) == ("distilled-0+style-0.8",)
    for recipe in (TWO_STAGE, ONE_STAGE):
        with pytest.raises(OverlayError, match="holds no bake that stage 1 could use"):
            taken(recipe, manifest(some(*ALONE, *STACKED)))


def test_named_stages_win_and_must_exist() -> None:
    assert pick(some("distilled-0.25"), stage2="base") == ("distilled-0.25", "base")
    assert pick(some("distilled-0.25"), "base", "distilled-0.25") == ("base", "distilled-0.25")
    with pytest.raises(UsageError):
        pick(some("distilled-0.5"), stage1="distilled-0.7")


FP8_PAIR, INT8_PAIR = (tuple(f"distilled-{s}-{form}" for s in ("0.25", "0.5")) for form in ("fp8", "int8"))


@pytest.mark.parametrize(
    ("recipe", "form", "names", "expected", "told"),
    [
        (HQ, "bf16", [*FP8_PAIR, "distilled-0.25", "distilled-0.5"], ("distilled-0.25", "distilled-0.5"), None),
        (HQ, "fp8", [*FP8_PAIR, *INT8_PAIR, "distilled-0.25", "distilled-0.5"], FP8_PAIR, None),
        (HQ, "int8", [*FP8_PAIR, *INT8_PAIR], INT8_PAIR, None),
        (HQ, "bf16", FP8_PAIR, FP8_PAIR, "there is no bf16 bake in place of distilled-0.25-fp8"),
        (HQ, "bf16", ["distilled-0.25", FP8_PAIR[1]], ("distilled-0.25", FP8_PAIR[1]), f"in place of {FP8_PAIR[1]}"),
        (HQ, "fp8", ["distilled-0.8", "distilled-0.8-fp8"], ("base", "distilled-0.8-fp8"), "no fp8 bake in"),
        (TWO_STAGE, "fp8", ["distilled-0-fp8", FP8_PAIR[1]], ("distilled-0-fp8", FP8_PAIR[1]), None),
        (TWO_STAGE, "bf16", ["distilled-0-fp8", FP8_PAIR[1]], ("base", FP8_PAIR[1]), "no bf16 bake in place of dist"),
        (ONE_STAGE, "int8", ["distilled-0-int8", "distilled-0-fp8"], ("distilled-0-int8",), None),
        (DISTILLED_RECIPE, "bf16", ["distilled-0.25", "distilled-0.5"], ("distilled-0.5",) * 2, None),
        (DISTILLED_RECIPE, "bf16", ["distilled-0.8"], ("distilled-0.8",) * 2, None),
        (TWO_STAGE, "bf16", ["distilled-0.25", "distilled-0.5"], ("base", "distilled-0.5"), None),
        (TWO_STAGE, "bf16", ["distilled-0.5", "distilled-1"], ("base", "distilled-1"), None),
        (ONE_STAGE, "bf16", [], ("base",), None),
    ],
)  # fmt: skip
def test_recipe_and_form_choose_among_the_bakes(
    recipe: Recipe, form: str, names: list[str], expected: tuple[str, ...], told: str | None
) -> None:
    choice = choose(at_out(manifest(some(*names))), recipe, ("auto", "auto"), form)
    assert choice.stages == tuple(expected)
    assert (told in choice.note) if told else ("in place of" not in choice.note)


def test_bakes_of_several_strengths_are_not_guessed_among_by_their_form() -> None:
    with pytest.raises(OverlayError, match="several bakes"):
        choose(at_out(manifest(some("distilled-0.8-fp8", "distilled-1"))), HQ, ("auto", "auto"), "fp8")
    with pytest.raises(OverlayError, match=r"--strength 0\.5 --format fp8"):
        choose(at_out(manifest({})), DISTILLED_RECIPE, ("auto", "auto"), "fp8")
    distilled = replace(manifest(some("base-fp8")), transformer_kind="distilled")
    assert choose(at_out(distilled), DISTILLED_RECIPE, (), "fp8").stages == ("base-fp8",) * 2
    assert choose(at_out(distilled), DISTILLED_RECIPE, ()).stages == ("base", "base")
