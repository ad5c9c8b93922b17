"""What the page's script works from, as one JSON document: every plan of the grid, each text once.

Sizes are tenths of a GB, rounded as ``ltxpack plan`` prints them. ``texts`` holds words, ``sizes`` rows of sizes, one a
phase; a number stands for either.

- ``choices``: name -> labels of its options. ``system``: what the host keeps for itself.
- ``cases`` by recipe and form: ``no``, why it cannot be run, or ``stages`` and ``disk``: the overlay without bakes, the
  bakes, and both, without LoRAs of the user's and with some.
- ``works`` of each case by size and frames. ``phases``, and for each ``beside``, what it takes on the card beside
  weights, and ``free``, what must be free beyond. ``petaflop`` in tenths. ``gains`` by number of cards in hundredths,
  or -1 less the number of the text that says why not so many. ``commands`` by number of cards, where there is a gain,
  and of LoRAs; each is one text, the last one its parts. ``grid``: for each number of cards, where there is a gain,
  each card and each host the index of the plan, or -1 less that of the refusal.
- A plan: the mode, the parts of its description, the rows of the card and of the host, what the first video and each
  further one read.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import product
from typing import Any

from ltxpack.deployment.choices import DEVICES, FORMS, FRAMES, LORAS, RECIPES, SIZES, choices
from ltxpack.deployment.grid import Case, Subject, Video, gains, plans, refusal
from ltxpack.errors import OverlayError
from ltxpack.files.units import gigabytes
from ltxpack.runtime.parallel.schemes import video_flops
from ltxpack.runtime.sampling.recipes import RECIPES as EVERY_RECIPE
from ltxpack.runtime.sampling.recipes import stage_label
from ltxpack.runtime.weights.machine import CONTEXT, SYSTEM
from ltxpack.runtime.weights.plan import Plan, smallest_plan
from ltxpack.runtime.weights.report import described

# Where a description and a command are parted, so that what many have in common is there once.
CLAUSE, FLAG = ", ", " --"
INSTALL = "pip install ltxpack"


class Numbered:
    """Things by number, in the order they were met first."""

    def __init__(self) -> None:
        self.numbers: dict[Hashable, int] = {}

    def __call__(self, thing: Hashable) -> int:
        return self.numbers.setdefault(thing, len(self.numbers))

    def parts(self, text: str, separator: str) -> list[int]:
        """``text`` parted, each part by its number."""
        return [self(part) for part in text.split(separator)]


def document(subject: Subject) -> dict[str, Any]:
    """The document for ``subject``."""
    texts, sizes = Numbered(), Numbered()
    cases: list[dict[str, Any]] = []
    works: list[list[dict[str, Any]]] = []
    for recipe, form in product(RECIPES, FORMS):
        try:
            case = subject.case(EVERY_RECIPE[recipe], form)
        except OverlayError as error:
            cases.append({"no": texts(error.problem)})
            works.append([])
            continue
        stages = [f"{stage_label(number)}: {name}" for number, name in enumerate(case.stages)]
        disk = [[*map(tenths, (base, bakes, base + bakes))] for base, bakes in (subject.disk(case, n) for n in (0, 1))]
        cases.append({"stages": texts(", ".join(stages)), "disk": disk})
        works.append([_work(subject, case, video, texts, sizes) for video in product(SIZES, FRAMES)])
    return {
        "install": INSTALL,
        "choices": {choice.name: list(choice.options) for choice in choices()},
        "system": tenths(SYSTEM),
        "cases": cases,
        "works": works,
        "texts": list(texts.numbers),
        "sizes": list(sizes.numbers),
    }


def _work(subject: Subject, case: Case, video: Video, texts: Numbered, sizes: Numbered) -> dict[str, Any]:
    """One video in a recipe and a form."""
    work = case.work(video)
    found = gains(subject.dit, work, case.model.itemsize)
    useful = [count for count, gain in zip(DEVICES, found, strict=True) if isinstance(gain, float)]
    kept, refusals, numbers = Numbered(), Numbered(), []
    for machine, plan in plans(case.model, work, useful):
        if plan is None:
            numbers.append(-1 - refusals(texts(refusal(case.model, work, machine, "each card"))))
        else:
            numbers.append(kept(_plan(plan, texts, sizes)))
    phases = smallest_plan(case.model, work).phases
    return {
        "phases": [texts(phase.name) for phase in phases],
        "beside": [tenths(phase.activations) for phase in phases],
        "free": [tenths(phase.needed - phase.card + CONTEXT) for phase in phases],
        "forwards": sum(stage.evaluations * stage.passes for stage in work.stages),
        "petaflop": round(video_flops(subject.dit, work) / 1e14),
        "gains": [round(100 * gain) if isinstance(gain, float) else -1 - texts(gain) for gain in found],
        "commands": [
            [_commands(subject.commands(case, video, count, loras), texts) for loras in range(len(LORAS) + 1)]
            for count in useful
        ],
        "plans": list(kept.numbers),
        "refusals": list(refusals.numbers),
        "grid": numbers,
    }


def _plan(plan: Plan, texts: Numbered, phases: Numbered) -> tuple[Any, ...]:
    card, host = (phases(tuple(tenths(getattr(phase, memory)) for phase in plan.phases)) for memory in ("card", "host"))
    reads = map(tenths, (plan.first_read, plan.next_read))
    return texts(plan.mode), tuple(texts.parts(described(plan), CLAUSE)), card, host, *reads


def _commands(lines: Sequence[str], texts: Numbered) -> list[int | list[int]]:
    """All but the last, which runs the video, are the same for many videos."""
    *before, run = lines
    return [*map(texts, before), texts.parts(run, FLAG)]


def tenths(count: float) -> int:
    """``count`` bytes in tenths of a GB, as :func:`gigabytes` rounds them."""
    return int(gigabytes(count).removesuffix(" GB").replace(".", ""))
