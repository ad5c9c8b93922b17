"""What the page's script works from, as one JSON document: every plan of the grid, each text once.

Sizes are tenths of a GB, rounded as ``ltxpack plan`` prints them. ``texts`` holds words, ``sizes`` rows of sizes, one a
phase, ``ways`` what many plans have in common, and ``lines`` rows of texts; a number stands for one of them.

- ``choices``: name -> labels of its options. ``system``: what the host keeps for itself.
- ``cases`` by recipe and form: ``no``, why it cannot be run, or ``stages``; ``disk``: the overlay without bakes, the
  bakes, and both, without LoRAs of the user's and with some; ``before`` by number of these: what is typed before a run.
- ``works`` of each case by size and frames. ``phases``: a row of ``lines``. ``petaflop``: in tenths. ``gains`` by
  number of cards in hundredths, 0 where fewer gain as much. By number of cards, where there is a gain: ``beside``, the
  row of what phases take on the card beside weights, and ``free``, of what must be free beyond; ``runs`` by number of
  LoRAs, each a row of ``lines``, which is a command in parts; and ``grid`` by card and host, the index of the plan, or
  -1 less that of the refusal.
- A plan, three numbers in ``plans``: its row of ``ways``, and the rows of the card and of the host. A way: the mode,
  what the first video and each further one read, the parts of the description.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import chain, product
from typing import Any, Generic, TypeAlias, TypeVar

from ltxpack.deployment.choices import DEVICES, FORMS, FRAMES, LORAS, RECIPES, SIZES, choices
from ltxpack.deployment.grid import Case, Subject, Video, gains, machine_of, plans, share_of
from ltxpack.errors import OverlayError
from ltxpack.files.units import gigabytes
from ltxpack.runtime.parallel.schemes import video_flops
from ltxpack.runtime.sampling.recipes import RECIPES as EVERY_RECIPE
from ltxpack.runtime.sampling.recipes import stage_label
from ltxpack.runtime.weights.machine import SYSTEM
from ltxpack.runtime.weights.plan import Plan, smallest_plan
from ltxpack.runtime.weights.report import described

# Where a description and a command are parted, so that what many have in common is there once.
CLAUSE, FLAG = ", ", " --"
INSTALL = "pip install ltxpack"
# Of LoRAs of the user's.
COUNTS = range(len(LORAS) + 1)
Row: TypeAlias = tuple[int, ...]
T = TypeVar("T", bound=Hashable)


class Numbered(Generic[T]):
    """Things by number, in the order they were met first."""

    def __init__(self) -> None:
        self.numbers: dict[T, int] = {}

    def __call__(self, thing: T) -> int:
        return self.numbers.setdefault(thing, len(self.numbers))


class Tables:
    """What many plans have in common, once."""

    def __init__(self) -> None:
        self.texts = Numbered[str]()
        self.sizes, self.ways, self.lines = Numbered[Row](), Numbered[Row](), Numbered[Row]()

    def parts(self, text: str, separator: str) -> Row:
        """``text`` parted, each part by its number."""
        return tuple(map(self.texts, text.split(separator)))

    def plan(self, plan: Plan) -> Row:
        """A plan as the document has it."""
        card, host = (self.row(getattr(phase, memory) for phase in plan.phases) for memory in ("card", "host"))
        reads = tenths(plan.first_read), tenths(plan.next_read)
        return self.ways((self.texts(plan.mode), *reads, *self.parts(described(plan), CLAUSE))), card, host

    def row(self, sizes: Iterable[int]) -> int:
        """Bytes, one for each phase."""
        return self.sizes(tuple(map(tenths, sizes)))

    def line(self, command: str) -> int:
        """A command that runs a video."""
        return self.lines(self.parts(command, FLAG))


def document(subject: Subject) -> dict[str, Any]:
    """The document for ``subject``."""
    tables = Tables()
    cases: list[dict[str, Any]] = []
    works: list[list[dict[str, Any]]] = []
    for recipe, form in product(RECIPES, FORMS):
        try:
            case = subject.case(EVERY_RECIPE[recipe], form)
        except OverlayError as error:
            cases.append({"no": tables.texts(error.problem)})
            works.append([])
            continue
        cases.append(_case(subject, case, tables))
        works.append([_work(subject, case, video, tables) for video in product(SIZES, FRAMES)])
    return {
        "install": INSTALL,
        "choices": {choice.name: list(choice.options) for choice in choices()},
        "system": tenths(SYSTEM),
        "cases": cases,
        "works": works,
        "texts": list(tables.texts.numbers),
        "sizes": list(tables.sizes.numbers),
        "ways": list(tables.ways.numbers),
        "lines": list(tables.lines.numbers),
    }


def _case(subject: Subject, case: Case, tables: Tables) -> dict[str, Any]:
    """A recipe in a form."""
    stages = [f"{stage_label(number)}: {name}" for number, name in enumerate(case.stages)]
    disk = [subject.disk(case, loras) for loras in (0, 1)]
    before = (subject.commands(case, (SIZES[0], FRAMES[0]), 1, loras)[:-1] for loras in COUNTS)
    return {
        "stages": tables.texts(", ".join(stages)),
        "disk": [[*map(tenths, (base, bakes, base + bakes))] for base, bakes in disk],
        "before": [[*map(tables.texts, lines)] for lines in before],
    }


def _work(subject: Subject, case: Case, video: Video, tables: Tables) -> dict[str, Any]:
    """One video in a recipe and a form."""
    work = case.work(video)
    found = gains(subject.dit, work, case.model.itemsize)
    useful = [count for count, gain in zip(DEVICES, found, strict=True) if gain is not None]
    shares = {count: share_of(subject.dit, work, case.model.itemsize, count) for count in useful}
    kept, refusals = Numbered[Row](), Numbered[int]()
    grid = [
        -1 - refusals(tables.texts(plan)) if isinstance(plan, str) else kept(tables.plan(plan))
        for count, share in shares.items()
        for plan in plans(case.model, share, count)
    ]
    phases = {count: smallest_plan(case.model, share).phases for count, share in shares.items()}
    others = {count: machine_of(0, 0, count).context for count in useful}
    runs = [[subject.commands(case, video, count, loras)[-1] for loras in COUNTS] for count in useful]
    return {
        "phases": tables.lines(tuple(tables.texts(phase.name) for phase in phases[1])),
        "beside": [tables.row(phase.activations for phase in phases[count]) for count in useful],
        "free": [tables.row(phase.needed - phase.card + others[count] for phase in phases[count]) for count in useful],
        "forwards": sum(stage.evaluations * stage.passes for stage in work.stages),
        "petaflop": round(video_flops(subject.dit, work) / 1e14),
        "gains": [round(100 * (gain or 0)) for gain in found],
        "runs": [[*map(tables.line, lines)] for lines in runs],
        "plans": [*chain.from_iterable(kept.numbers)],
        "refusals": list(refusals.numbers),
        "grid": grid,
    }


def tenths(count: float) -> int:
    """``count`` bytes in tenths of a GB, as :func:`gigabytes` rounds them."""
    return int(gigabytes(count).removesuffix(" GB").replace(".", ""))
