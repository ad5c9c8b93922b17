"""The recipes as data: which stages a video passes through, and what each of them is.

A recipe is a frozen value. The planner, the session, the loop over the stages, records and summaries read it and count
nothing themselves: another recipe is another value in ``RECIPES``. Needs no torch, so that ``ltxpack plan`` and the
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
NO_BLOCKS: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Guidance:
    """Strengths for one modality; ``cfg`` 1, ``modality`` 1, ``stg`` 0 and ``rescale`` 0 each turn theirs off.

    ``stg_blocks`` are the blocks whose self-attention is replaced by its value projection in the perturbed pass.
    ``skip``: so many steps after each one reuse its result (spec 08, section 6).
    """

    cfg: float
    rescale: float
    modality: float
    stg: float = 0.0
    stg_blocks: frozenset[int] = NO_BLOCKS
    skip: int = 0

    @property
    def needs_uncond(self) -> bool:
        return not math.isclose(self.cfg, 1.0)

    @property
    def needs_perturbed(self) -> bool:
        return self.stg != 0

    def skips(self, step: int) -> bool:
        """Whether ``step``, counted from 0, reuses an earlier result."""
        return step % (self.skip + 1) != 0

    @property
    def perturbed(self) -> frozenset[int]:
        """The blocks that the perturbed pass perturbs in this modality: none where ``stg`` is 0, whatever the list."""
        return self.stg_blocks if self.needs_perturbed else NO_BLOCKS

    @property
    def needs_isolated(self) -> bool:
        return not math.isclose(self.modality, 1.0)


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a stage.

    ``fixed`` are given; otherwise they follow the number of video tokens (spec 05, section 2): ``tokens``, or those of
    the stage where that is None. :func:`ltxpack.runtime.sampling.schedule.sigmas` makes them.
    """

    fixed: tuple[float, ...] | None = None
    tokens: int | None = None

    def steps(self, asked: int) -> int:
        """The number of steps; ``asked`` counts where the noise levels are not fixed."""
        return asked if self.fixed is None else len(self.fixed) - 1


@dataclass(frozen=True)
class TransformerRule:
    """Which transformer ``auto`` takes for a stage: the first of these that the overlay has.

    1. The base, if ``base_if_distilled`` and the checkpoint is a distilled one.
    2. The bake of the distilled LoRA at one of ``strengths``, in this order; the first is the official one. Without
       strengths the base is.
    3. The base, if ``else_base``; otherwise the only bake that is at none of the strengths ``besides``.
    """

    strengths: tuple[float, ...] = ()
    else_base: bool = False
    besides: tuple[float, ...] = ()
    base_if_distilled: bool = False


@dataclass(frozen=True)
class Stage:
    """One sampling loop of a recipe.

    ``divide``: the request's height and width are divided by it. ``upsampled``: the stage begins from the latents of
    the stage before in twice their size, noised to its first sigma; otherwise from pure noise. ``guided``: it runs
    with the request's guidance, otherwise the positive pass alone.
    """

    transformer: TransformerRule
    schedule: Schedule
    sampler: str
    divide: int = 1
    guided: bool = False
    upsampled: bool = False

    def shape(self, whole: VideoShape) -> VideoShape:
        """The shape that this stage samples of a video of shape ``whole``."""
        return whole.divided(self.divide)

    def evaluations(self, steps: int) -> int:
        """How often the denoiser is called, where ``steps`` were asked for."""
        count = self.schedule.steps(steps)
        return 2 * count + 1 if self.sampler == RES2S else count

    def passes(self, guidance: AV[Guidance]) -> int:
        """Forwards of the model per evaluation: each pass of the guidance runs if either modality needs it."""
        if not self.guided:
            return 1
        both = (guidance.video, guidance.audio)
        needs = ([g.needs_uncond for g in both], [g.needs_perturbed for g in both], [g.needs_isolated for g in both])
        return 1 + sum(map(any, needs))

    def isolated(self, guidance: AV[Guidance]) -> bool:
        """Whether the last of the passes has no attention between the modalities."""
        return self.guided and (guidance.video.needs_isolated or guidance.audio.needs_isolated)


@dataclass(frozen=True)
class Recipe:
    """A way to make a video: its stages in order, and the stage whose sound is decoded.

    ``defaults`` are the settings in which it differs from those of :class:`ltxpack.runtime.settings.Settings`;
    ``unused`` are the settings it has no use for.
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
        """What height and width must be multiples of."""
        return SPATIAL_FACTOR * max(stage.divide for stage in self.stages)

    @property
    def negative(self) -> bool:
        """Whether the negative prompt is encoded."""
        return any(stage.guided for stage in self.stages)


# The noise levels with which every recipe refines upsampled latents.
REFINING = Schedule(fixed=(0.909375, 0.725, 0.421875, 0.0))

SKIPS = frozenset({"video_skip_step", "audio_skip_step"})

HQ = Recipe(
    name="hq",
    stages=(
        Stage(TransformerRule((0.25,), else_base=True), Schedule(), RES2S, divide=2, guided=True),
        Stage(TransformerRule((0.5,), besides=(0.25,)), REFINING, RES2S, upsampled=True),
    ),
    sound=0,
    # A step has two evaluations, and no result that the next step could reuse.
    unused=SKIPS,
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
        Stage(TransformerRule((1.0, 0.5), besides=(0.25,)), REFINING, EULER, upsampled=True),
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
    """Stage ``number`` (from 0) as phases, notes and summaries call it."""
    return f"stage {number + 1}"


def stage_flag(number: int) -> str:
    """Stage ``number`` (from 0) as flags, records and tensors call it."""
    return f"stage{number + 1}"
