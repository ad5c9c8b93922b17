"""Makes the videos of a prompts file: opens the overlay once, encodes prompts ahead, writes each video to its file.

A line that fails does not stop the others; it does not make a finished video again (see :mod:`record`).
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ltxpack.errors import UsageError, listed
from ltxpack.files.tensorfile import open_source
from ltxpack.imports import import_libraries
from ltxpack.reporter import Reporter
from ltxpack.runtime import record
from ltxpack.runtime.lines import SKIPPED, Outcome, Task, failed, identity
from ltxpack.runtime.overlay import Overlay, chosen
from ltxpack.runtime.parallel.crew import actors, goes_by_stages, processes
from ltxpack.runtime.parallel.devices import TORCHRUN
from ltxpack.runtime.parallel.schemes import DATA, OF_MANY, OF_ONE, STAGES
from ltxpack.runtime.parallel.share import Carried, Crew, Event, Ready, Sharing
from ltxpack.runtime.prompts_file import PromptsLine, read_lines
from ltxpack.runtime.request import Request
from ltxpack.runtime.run import RunOptions, check_outputs, peak_memory
from ltxpack.runtime.sampling.recipes import Recipe
from ltxpack.runtime.session import Session, devices_of
from ltxpack.runtime.settings import SessionSettings
from ltxpack.runtime.text.gemma import tell_cut


@dataclass(frozen=True)
class Batch:
    """The ``outcomes`` of the lines of a prompts file, in their order.

    ``choices``: the transformers of the stages, one entry for each recipe. ``ahead``: the seconds of encoding prompts
    ahead. ``summary``: further lines for the user.
    """

    choices: Sequence[tuple[str, ...]]
    outcomes: Sequence[Outcome]
    ahead: float = 0.0
    summary: Sequence[str] = ()

    def of(self, status: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == status]


def run_batch(options: RunOptions, prompts: Path, output: Path | None, reporter: Reporter) -> Batch:
    """Make the videos of the file ``prompts``; ``options`` and ``output`` are the defaults of its lines.

    Raises BadLinesError before it loads anything if a line cannot be used; UsageError, OverlayError, DeviceError for
    faults that stop all lines. The fault of one line is in its outcome.
    """
    with _claimed(prompts):
        lines = read_lines(prompts, options.given, output)
        if options.ray is not None:
            lines = [line.from_anywhere() for line in lines]
        check_outputs(options, [(line.name, line.output) for line in lines], reporter)
        options.session.check()
        overlay = Overlay.open(options.overlay, options.session.text_encoder)
        choices = [chosen(overlay, options.session, recipe) for recipe in _recipes(lines)]
        for choice in choices:
            reporter.note(choice.note)
        wanted: dict[int, str] = {}
        found = {line.number: _known(overlay, options.session, line, wanted, reporter) for line in lines}
        found |= _told_cut(overlay, [line for line in lines if found[line.number] is None], reporter)
        pending = [line for line in lines if found[line.number] is None]
        skipped = sum(outcome is not None and outcome.status == SKIPPED for outcome in found.values())
        if skipped:
            reporter.note(f"{skipped} of {len(lines)} videos are done already")
        ahead, summary = 0.0, list[str]()
        if pending:
            _tell_replaced(pending, wanted, reporter)
            sharing = Sharing(_crew(overlay, options, pending, reporter), pending, reporter)
            summary = sharing.run()
            ahead = sharing.ahead
            found |= sharing.outcomes
    outcomes = [outcome for outcome in found.values() if outcome is not None]
    return Batch([choice.stages for choice in choices], outcomes, ahead, summary)


class Here(Crew):
    """This process, with one session on one device, or on several that make each video together."""

    elsewhere = False

    def __init__(self, session: Session) -> None:
        session.process_ends = True
        self.names = (str(session.device),)
        self._session = session
        self._work: tuple[Task, Request | None] | None = None

    def begin(self, worker: int, task: Task, following: Request | None) -> None:
        """:meth:`next` carries the task out."""
        self._work = task, following

    def next(self) -> Event:
        if self._work is None:
            return Ready(0)
        task, following = self._work
        return Carried(0, task.carry_out(self._session, following))

    def replace(self, worker: int) -> None:
        """Does nothing: the one worker is this process."""

    def close(self) -> list[str]:
        self._session.close()
        recorder = self._session.activations
        return [peak_memory(self._session.device), *([recorder.summary] if recorder and recorder.summary else [])]


def _crew(overlay: Overlay, options: RunOptions, lines: Sequence[PromptsLine], reporter: Reporter) -> Crew:
    """The crew for ``lines``: several processes if there are several devices that do not share a video."""
    if options.ray is not None:
        return actors(options.ray, options.overlay.absolute(), options.session, lines, reporter)
    settings, devices = options.session, devices_of(options.session)
    way, apart = settings.parallel, len(devices) > 1 and settings.devices != TORCHRUN
    if apart and (way in OF_MANY or (len(lines) > 1 and way not in OF_ONE)):
        by_stages = goes_by_stages(overlay, settings, [line.request for line in lines], devices)
        told = f"{STAGES}: each device makes a stage" if by_stages else f"{DATA}: each device makes whole videos"
        reporter.note(f"parallel {told}")
        return processes(options.overlay, settings, devices if by_stages else devices[: len(lines)], by_stages)
    session = Session(options.overlay, settings, reporter)
    for recipe in _recipes(lines):
        session.transformers(recipe)  # before loading, refuses a recipe that the session cannot make
    import_libraries()
    return Here(session)


def _recipes(lines: Sequence[PromptsLine]) -> list[Recipe]:
    return [*{line.request.recipe.name: line.request.recipe for line in lines}.values()]


def _known(
    overlay: Overlay, settings: SessionSettings, line: PromptsLine, wanted: dict[int, str], reporter: Reporter
) -> Outcome | None:
    """The outcome of a line that is done already, or that cannot be made; None for a line to make.

    ``wanted`` gets the fingerprint of its video.
    """
    try:
        wanted[line.number] = identity(overlay, settings, line)[1]
        # A finished video may lack the activations to save.
        if settings.save_activations is None and record.is_done(line.output, wanted[line.number]):
            return Outcome(line, SKIPPED)
    except Exception as error:
        return failed(line, error, reporter)
    return None


def _tell_replaced(lines: Sequence[PromptsLine], wanted: Mapping[int, str], reporter: Reporter) -> None:
    """Tell which videos ``lines`` will replace by others; ``wanted``: the fingerprint of each line's video.

    Raises UsageError if one is what another of the lines wants: lines were put in or taken out since it was made.
    """
    there = {line.number: record.made_as(line.output) for line in lines}
    replacing = [line for line in lines if there[line.number] not in (None, wanted[line.number])]
    missing = {wanted[line.number]: line for line in replacing}
    for line in replacing:
        moved = missing.get(there[line.number] or "")
        if moved is not None:
            problem = f"{line.name} would replace the video of {moved.name}, which was made here before lines moved"
            advice = "put new lines at the end and keep the old ones, or move the finished videos to another folder"
            raise UsageError(problem, file=line.output, next=advice)
    if replacing:
        counted = "1 video replaces one" if len(replacing) == 1 else f"{len(replacing)} videos replace ones"
        names = listed([str(line.output) for line in replacing])
        reporter.note(f"{counted} of another prompt, setting or overlay: {names}")


def _told_cut(overlay: Overlay, lines: Sequence[PromptsLine], reporter: Reporter) -> dict[int, Outcome]:
    """Warns of prompts longer than the model reads; if that cannot be checked, returns failures for ``lines``."""
    try:
        named = ((f"{line.name}: {name}", text) for line in lines for name, text in line.request.named_prompts)
        tell_cut(overlay, named, reporter)
    except Exception as error:
        return {line.number: failed(line, error, reporter) for line in lines}
    return {}


@contextmanager
def _claimed(prompts: Path) -> Iterator[None]:
    """Lock the prompts file, so that two runs of it never write the same video. Raises UsageError."""
    with open_source(prompts) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError("another ltxpack run has this prompts file", file=prompts, next="wait for it") from None
        except OSError:  # a filesystem without locks
            pass
        yield
