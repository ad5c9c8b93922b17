"""What each of several cards has of a video, in every way to share it out: bytes, tokens, passes, FLOP.

The planner counts them, without torch; a test holds them to what a rank computes and exchanges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

from ltxpack.ltx23.expected import published_configs
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.overlay import official_transformers
from ltxpack.runtime.parallel.schemes import AUTO, OF_ONE, STAGES, WHOLE, Counted, counted, shared, stage_flops
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling.recipes import RECIPES, stage_label
from ltxpack.runtime.weights.plan import Work

CARDS = (2, 3, 4)
ITEMSIZE = 2


def cards(_: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Of the busiest card, where a scheme has a use for so many cards; ``auto`` as if bytes took no time."""
    config = DiTConfig.from_dict(published_configs()["transformer"])
    for recipe, scheme, count in product(RECIPES.values(), (AUTO, *OF_ONE, STAGES), CARDS):
        work = Request.of("", recipe=recipe.name).work(official_transformers(recipe))
        by = shared if scheme == AUTO else counted
        found = by(scheme, config, work, count, ITEMSIZE)
        if found is not None:
            yield from _told(f"{recipe.name}, {scheme} on {count}", config, work, found)


def _told(name: str, config: DiTConfig, work: Work, found: Counted) -> Iterator[tuple[str, int]]:
    yield f"{name}: bytes received", found.received
    splits = found.splits or [WHOLE] * len(work.stages)
    flops = [stage_flops(config, work, stage, split) for stage, split in zip(work.stages, splits, strict=True)]
    yield f"{name}: FLOP", sum(flops) if found.splits else max(flops)
    for number, (stage, split) in enumerate(zip(work.stages, found.splits, strict=False)):
        yield f"{name}, {stage_label(number)}: passes", stage.evaluations * -(-stage.passes // split.groups)
        yield f"{name}, {stage_label(number)}: tokens", split.own(stage.shape.tokens)
