"""The page of ``plan --page``, and the input of its script, one JSON document: every plan of the grid.

The page is plan.html, plan.css, plan.js and the document in one file. Its policy lets the browser neither load nor send
anything.

In the document, sizes are in tenths of a GB, rounded as ``ltxpack plan`` prints them. Several plans share the entries
of four tables, and a number stands for an entry: ``texts``; ``sizes``, rows with a size for each phase; ``ways``;
``lines``, rows of texts.

- ``choices``: name -> labels of the options. ``system``: the memory that the host keeps for itself.
- ``cases`` by recipe and form: ``no``, why it cannot run; or ``stages``; ``disk``: bytes of the overlay without bakes,
  of the bakes, and of both, first without LoRAs of the user and then with them; ``before`` by number of these LoRAs:
  the commands before a run.
- ``works`` of each case, by size and frames. ``phases``: a row of ``lines``. ``petaflop``: in tenths. ``gains`` by
  number of cards: in hundredths, 0 if fewer cards gain as much. For each number of cards with a gain: ``beside``, the
  row of memory on the card beside the weights; ``free``, the row of memory that must stay free; ``runs`` by number of
  LoRAs: a command, as a row of ``lines``; ``grid`` by card and host: a plan, or the text of a refusal. A list of
  ``grid`` leaves out what is equal to its last entry.
- A plan is three numbers: its row of ``ways``, and its rows of card and host. A way has the mode, the bytes that the
  first video and each further one read, and the parts of the description.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Hashable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from ltxpack.deployment.choices import DEVICES, FORMS, FRAMES, LORAS, RECIPES, SIZES, Choice, choices
from ltxpack.deployment.grid import Case, Subject, Video, gains, machine_of, plans, share_of
from ltxpack.errors import OverlayError
from ltxpack.files.units import gigabytes
from ltxpack.page import style
from ltxpack.runtime.overlay import Overlay
from ltxpack.runtime.parallel.schemes import video_flops
from ltxpack.runtime.sampling.recipes import RECIPES as EVERY_RECIPE
from ltxpack.runtime.sampling.recipes import stage_label
from ltxpack.runtime.weights.machine import SYSTEM
from ltxpack.runtime.weights.plan import Plan, smallest_plan
from ltxpack.runtime.weights.report import described

# The separators of a description and of a command: their parts are in the tables once.
CLAUSE, FLAG = ", ", " --"
# Numbers of LoRAs of the user.
COUNTS = range(len(LORAS) + 1)
FOLDER = Path(__file__).parent
# Choices that are drop-down lists; the others show all options.
LISTED = ("card",)
Row: TypeAlias = tuple[int, ...]
T = TypeVar("T", bound=Hashable)


class Numbered(dict[T, int]):
    """Entry -> its number, in the order of first use."""

    def __missing__(self, entry: T) -> int:
        self[entry] = len(self)
        return self[entry]


class Tables:
    """The tables of the document, and the numbers of their entries."""

    def __init__(self) -> None:
        self.texts = Numbered[str]()
        self.sizes, self.ways, self.lines = Numbered[Row](), Numbered[Row](), Numbered[Row]()

    def parts(self, text: str, separator: str) -> Row:
        return tuple(self.texts[part] for part in text.split(separator))

    def cell(self, plan: Plan | str) -> Row | int:
        """The three numbers of a plan, or the text of a refusal."""
        if isinstance(plan, str):
            return self.texts[plan]
        card, host = (self.row(getattr(phase, memory) for phase in plan.phases) for memory in ("card", "host"))
        reads = tenths(plan.first_read), tenths(plan.next_read)
        return self.ways[self.texts[plan.mode], *reads, *self.parts(described(plan), CLAUSE)], card, host

    def row(self, sizes: Iterable[int]) -> int:
        """A row of bytes for each phase."""
        return self.sizes[tuple(map(tenths, sizes))]

    def line(self, command: str) -> int:
        return self.lines[self.parts(command, FLAG)]


def document(subject: Subject) -> dict[str, Any]:
    tables = Tables()
    cases: list[dict[str, Any]] = []
    works: list[list[dict[str, Any]]] = []
    for recipe, form in product(RECIPES, FORMS):
        try:
            case = subject.case(EVERY_RECIPE[recipe], form)
        except OverlayError as error:
            cases.append({"no": tables.texts[error.problem]})
            works.append([])
        else:
            cases.append(_case(subject, case, tables))
            works.append([_work(subject, case, video, tables) for video in product(SIZES, FRAMES)])
    return {
        "install": "pip install ltxpack",
        "choices": {choice.name: list(choice.options) for choice in choices()},
        "system": tenths(SYSTEM),
        "cases": cases,
        "works": works,
        **{name: list(table) for name, table in vars(tables).items()},
    }


def _case(subject: Subject, case: Case, tables: Tables) -> dict[str, Any]:
    stages = [f"{stage_label(number)}: {name}" for number, name in enumerate(case.stages)]
    disk = [subject.disk(case, loras) for loras in (0, 1)]
    before = (subject.commands(case, (SIZES[0], FRAMES[0]), 1, loras)[:-1] for loras in COUNTS)
    return {
        "stages": tables.texts[", ".join(stages)],
        "disk": [[*map(tenths, (base, bakes, base + bakes))] for base, bakes in disk],
        "before": [[tables.texts[line] for line in lines] for lines in before],
    }


def _work(subject: Subject, case: Case, video: Video, tables: Tables) -> dict[str, Any]:
    work = case.request(video).work(case.stages)
    found = gains(subject.dit, work, case.model.itemsize)
    useful = [count for count, gain in zip(DEVICES, found, strict=True) if gain is not None]
    shares = {count: share_of(subject.dit, work, case.model.itemsize, count) for count in useful}
    grid = [
        shortened([shortened(list(map(tables.cell, row))) for row in plans(case.model, share, count)])
        for count, share in shares.items()
    ]
    phases = {count: smallest_plan(case.model, share).phases for count, share in shares.items()}
    others = {count: machine_of(0, 0, count).context for count in useful}
    runs = [[subject.commands(case, video, count, loras)[-1] for loras in COUNTS] for count in useful]
    return {
        "phases": tables.lines[tuple(tables.texts[phase.name] for phase in phases[1])],
        "beside": [tables.row(phase.activations for phase in phases[count]) for count in useful],
        "free": [tables.row(phase.needed - phase.card + others[count] for phase in phases[count]) for count in useful],
        "forwards": sum(stage.evaluations * stage.passes for stage in work.stages),
        "petaflop": round(video_flops(subject.dit, work) / 1e14),
        "gains": [round(100 * (gain or 0)) for gain in found],
        "runs": [[*map(tables.line, lines)] for lines in runs],
        "grid": grid,
    }


def shortened(row: list[Any]) -> list[Any]:
    """``row`` without the entries at its end that are equal to the one before them."""
    while len(row) > 1 and row[-1] == row[-2]:
        row.pop()
    return row


def tenths(count: float) -> int:
    """``count`` bytes in tenths of a GB, as :func:`gigabytes` rounds them."""
    return int(gigabytes(count).removesuffix(" GB").replace(".", ""))


def render(overlay: Overlay | None = None) -> bytes:
    """The page for ``overlay``, or for the published LTX-2.3. Raises LtxpackError for headers that cannot be read."""
    subject = Subject(overlay)
    looks, script = style(FOLDER / "plan.css"), (FOLDER / "plan.js").read_text(encoding="utf-8")
    data = json.dumps(document(subject), ensure_ascii=False, separators=(",", ":"))
    # No text may end its element. Each video begins a line, so that no line is too long for tools that read lines.
    data = data.replace("<", "\\u003c").replace(',{"phases"', ',\n{"phases"')
    page = (FOLDER / "plan.html").read_text(encoding="utf-8")
    return page.format(
        policy=f"default-src 'none'; style-src {_hash(looks)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'",
        subject=html.escape(subject.name),
        choices="\n".join(line for choice in choices() for line in _choice(choice)),
        style=looks,
        script=script,
        data=data,
    ).encode(errors="backslashreplace")  # the name of a folder may not be UTF-8


def _hash(text: str) -> str:
    """The source of the page's policy that allows an element with this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _choice(choice: Choice) -> Iterator[str]:
    """A drop-down list or a group of buttons, with a place for the reasons why some options cannot be chosen."""
    name, why = choice.name, f"{choice.name}-why"
    if name in LISTED:
        yield f"<div class=choice>\n<label for={name} id={name}-legend>{choice.legend}</label>"
        yield f"<select id={name} name={name} aria-describedby={why}>"
        for label, note in choice.options.items():
            picked = " selected" if label == choice.first else ""
            yield f"<option{picked}>{label}: {html.escape(note)}</option>"
        yield f"</select>\n<ul class=why id={why}></ul>\n</div>"
        return
    yield f"<fieldset class=choice aria-describedby={why}>\n<legend id={name}-legend>{choice.legend}</legend>"
    yield "<div class=options>"
    for number, (label, note) in enumerate(choice.options.items()):
        picked = " checked" if label == choice.first else ""
        said = f"<span>{html.escape(note)}</span>" if note else ""
        yield f"<label><input type=radio name={name} value={number}{picked}><b>{label}</b>{said}</label>"
    yield f"</div>\n<ul class=why id={why}></ul>\n</fieldset>"
