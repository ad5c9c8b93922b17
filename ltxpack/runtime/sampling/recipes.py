"""The recipes as data: the stages of a video, and the facts of each stage.

A recipe is a frozen value. The planner, the session, the loop over the stages, records and summaries read it and count
nothing themselves: a new recipe is a new value in ``RECIPES``. Needs no torch, so that ``ltxpack plan`` and the
command line can read it. Sources: spec 05 (hq) and spec 08 (the others).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ltxpack.ltx23.classes import SPATIAL_FACTOR
from ltxpack.runtime.sampling.shape import AV, VideoShape

RES2S, EULER = "res2s", "euler"
# The conditional pass of an evaluation, and those that guidance may add, in the official order.
COND = "cond"
OTHER_PASSES = UNCOND, PERTURBED, ISOLATED = ("uncond", "perturbed", "isolated")
NO_BLOCKS: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Guidance:
    """Strengths for one modality; ``cfg`` 1, ``modality`` 1, ``stg`` 0 and ``rescale`` 0 each turn their term off.

    ``stg_blocks`` are the blocks whose self-attention is replaced by its value projection in the perturbed pass.
    ``skip``: the number of steps after each computed one that reuse the result before (spec 08, section 6).
    """

    cfg: float
    rescale: float
    modality: float
    stg: float = 0.0
    stg_blocks: frozenset[int] = NO_BLOCKS
    skip: int = 0

    def needs(self, name: str) -> bool:
        """Whether this modality needs the pass ``name`` beside the conditional one."""
        if name == PERTURBED:
            return self.stg != 0
        return not math.isclose(self.cfg if name == UNCOND else self.modality, 1.0)

    def skips(self, step: int) -> bool:
        """Whether ``step``, counted from 0, reuses an earlier result."""
        return step % (self.skip + 1) != 0

    @property
    def perturbed(self) -> frozenset[int]:
        """The blocks that the perturbed pass perturbs in this modality; none if ``stg`` is 0."""
        return self.stg_blocks if self.needs(PERTURBED) else NO_BLOCKS


def passes_of(guidance: AV[Guidance] | None) -> tuple[str, ...]:
    """The passes of an evaluation: those that either modality needs; without guidance the conditional one alone."""
    both = () if guidance is None else (guidance.video, guidance.audio)
    return COND, *(name for name in OTHER_PASSES if any(one.needs(name) for one in both))


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a stage.

    ``fixed`` are the levels themselves; without them they follow from a number of video tokens (spec 05, section 2):
    ``tokens``, or the stage's if that is None. :func:`ltxpack.runtime.sampling.schedule.sigmas` makes them.
    """

    fixed: tuple[float, ...] | None = None
    tokens: int | None = None

    def steps(self, asked: int) -> int:
        """The number of steps: that of the fixed levels, else ``asked``."""
        return asked if self.fixed is None else len(self.fixed) - 1


@dataclass(frozen=True)
class TransformerRule:
    """The transformer that ``auto`` takes for a stage: the first of these in the overlay.

    1. The base, if the checkpoint is a distilled one. Without ``base_if_distilled`` the first stage refuses that.
    2. The bake of the distilled LoRA at one of ``strengths``, in this order; the first is the official one. Without
       strengths the base is official.
    3. The base, if ``else_base``; otherwise the only bake whose strength is not in ``besides``.
    """

    strengths: tuple[float, ...] = ()
    else_base: bool = False
    besides: tuple[float, ...] = ()
    base_if_distilled: bool = False


@dataclass(frozen=True)
class Stage:
    """One sampling loop of a recipe.

    ``divide``: the divisor of the request's height and width. ``upsampled``: the stage begins from the latents of the
    stage before, at twice their size and noised to its first sigma; otherwise from pure noise. ``guided``: the stage
    uses the request's guidance; otherwise only the positive pass.
    """

    transformer: TransformerRule
    schedule: Schedule
    sampler: str
    divide: int = 1
    guided: bool = False
    upsampled: bool = False

    def shape(self, whole: VideoShape) -> VideoShape:
        """The shape of this stage for a video of shape ``whole``."""
        return whole.divided(self.divide)

    def evaluations(self, steps: int) -> int:
        """The number of calls of the denoiser for ``steps`` requested steps."""
        count = self.schedule.steps(steps)
        return 2 * count + 1 if self.sampler == RES2S else count

    def passes(self, guidance: AV[Guidance]) -> int:
        """Forwards of the model per evaluation."""
        return len(passes_of(guidance if self.guided else None))

    def isolated(self, guidance: AV[Guidance]) -> bool:
        """Whether the last of the passes has no attention between the modalities."""
        return self.guided and ISOLATED in passes_of(guidance)


@dataclass(frozen=True)
class Recipe:
    """A way to make a video: its stages in order, and the stage whose sound is decoded.

    ``defaults``: the defaults in which it differs from :class:`ltxpack.runtime.settings.Settings`. ``unused``: the
    settings that it does not use.
    """

    name: str
    stages: tuple[Stage, ...]
    sound: int
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()

    @property
    def strengths(self) -> tuple[float, ...]:
        """The official strengths of the distilled LoRA, each once, in the order of the stages."""
        rules = [stage.transformer for stage in self.stages]
        return tuple(dict.fromkeys(rule.strengths[0] for rule in rules if rule.strengths))

    @property
    def multiple(self) -> int:
        """The number that must divide height and width."""
        return SPATIAL_FACTOR * max(stage.divide for stage in self.stages)

    @property
    def negative(self) -> bool:
        """Whether the negative prompt is encoded."""
        return any(stage.guided for stage in self.stages)


# The noise levels with which every recipe refines upsampled latents.
REFINING = Schedule(fixed=(0.909375, 0.725, 0.421875, 0.0))

# The strength of hq's first stage; no second stage takes a bake at it.
FIRST_STRENGTH = 0.25

HQ = Recipe(
    name="hq",
    stages=(
        Stage(TransformerRule((FIRST_STRENGTH,), else_base=True), Schedule(), RES2S, divide=2, guided=True),
        Stage(TransformerRule((0.5,), besides=(FIRST_STRENGTH,)), REFINING, RES2S, upsampled=True),
    ),
    sound=0,
)

# The schedule of the Euler recipes ignores the size.
ANCHORED = Schedule(tokens=4096)
FULL_MODEL = TransformerRule(else_base=True)
DISTILLED_MODEL = TransformerRule((0.5,), base_if_distilled=True)
EULER_GUIDANCE = {
    "steps": 30,
    **{"video_stg": 1.0, "video_rescale": 0.7, "video_stg_blocks": (28,)},
    **{"audio_stg": 1.0, "audio_rescale": 0.7, "audio_stg_blocks": (28,)},
}
STRENGTHS = ("cfg", "rescale", "stg", "stg_blocks", "skip_step")
GUIDANCE_SETTINGS = frozenset({"modality"} | {f"{one}_{name}" for one in ("video", "audio") for name in STRENGTHS})

DISTILLED = Recipe(
    name="distilled",
    stages=(
        Stage(
            DISTILLED_MODEL,
            Schedule(fixed=(1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)),
            EULER,
            divide=2,
        ),
        Stage(DISTILLED_MODEL, REFINING, EULER, upsampled=True),
    ),
    sound=1,
    defaults={"height": 1024, "width": 1536},
    unused=frozenset({"steps", "negative_prompt"}) | GUIDANCE_SETTINGS,
)

TWO_STAGE = Recipe(
    name="two-stage",
    stages=(
        Stage(FULL_MODEL, ANCHORED, EULER, divide=2, guided=True),
        Stage(TransformerRule((1.0, 0.5), besides=(FIRST_STRENGTH,)), REFINING, EULER, upsampled=True),
    ),
    sound=0,
    defaults={"height": 1024, "width": 1536, **EULER_GUIDANCE},
)

ONE_STAGE = Recipe(
    name="one-stage",
    stages=(Stage(FULL_MODEL, ANCHORED, EULER, guided=True),),
    sound=0,
    defaults={"height": 512, "width": 768, **EULER_GUIDANCE},
)

RECIPES = {recipe.name: recipe for recipe in (HQ, DISTILLED, TWO_STAGE, ONE_STAGE)}


def stage_label(number: int) -> str:
    """The name of stage ``number`` (from 0) in phases, notes and summaries."""
    return f"stage {number + 1}"


def stage_flag(number: int) -> str:
    """The name of stage ``number`` (from 0) in flags, records and tensors."""
    return f"stage{number + 1}"
