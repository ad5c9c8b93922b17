"""The lines of a prompts file as tasks for one device, and the outcome of each line.

One worker carries out a task, which gives an outcome or the next task for each of its lines. Tasks and their results
can be pickled: another process, or another machine with the same files, may carry out the next one.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ltxpack.errors import LtxpackError, UnwrittenError
from ltxpack.reporter import Reporter
from ltxpack.runtime import record
from ltxpack.runtime.overlay import Overlay, chosen
from ltxpack.runtime.prompts_file import PromptsLine, in_a_line
from ltxpack.runtime.recipe_run import Halfway, encode_ahead, first_stage, work_of
from ltxpack.runtime.request import Request
from ltxpack.runtime.run import write_video
from ltxpack.runtime.session import Session, Timings
from ltxpack.runtime.settings import SessionSettings
from ltxpack.runtime.text.prompt_cache import Contexts

DONE, SKIPPED, FAILED = "done", "skipped", "failed"


@dataclass(frozen=True)
class Outcome:
    """The end of a line: ``status`` is done, skipped or failed; with seconds per phase and the decoder's tiles."""

    line: PromptsLine
    status: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    problem: str | None = None
    decoding: str = ""


@dataclass
class TaskResult:
    """The result of a task: outcomes of lines that ended, next tasks of the others, seconds of encoding prompts."""

    outcomes: list[Outcome] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    encoding: float = 0.0


@dataclass(frozen=True, eq=False)
class Encode:
    """Encode the prompts of ``lines`` in one go. ``by_stages``: a separate task makes their first stage."""

    lines: tuple[PromptsLine, ...]
    by_stages: bool = False

    def carry_out(self, session: Session, following: Request | None = None) -> TaskResult:
        """Carry out this task with ``session``; the fault of a line is in its outcome. Raises no Exception.

        ``following`` is the next video, if known.
        """
        result, then = TaskResult(), Begin if self.by_stages else Make
        for line in self.lines:
            with _attempt(session, [line], result):
                session.residency.plan_for(work_of(session, line.request, len(self.lines)))
        without = {outcome.line.number for outcome in result.outcomes}
        left = [line for line in self.lines if line.number not in without]
        with _attempt(session, left, result):
            result.encoding = encode_ahead(session, [line.request for line in left])
            result.tasks += [then(line, session.prompts.held(line.request.prompts)) for line in left]
        return result


@dataclass(frozen=True, eq=False)
class Begin:
    """Make the first stage of a line's video from its ``contexts``, which are on the host."""

    line: PromptsLine
    contexts: Contexts

    @property
    def lines(self) -> tuple[PromptsLine, ...]:
        return (self.line,)

    def carry_out(self, session: Session, following: Request | None = None) -> TaskResult:
        line, result = self.line, TaskResult()
        with _attempt(session, [line], result):
            session.reporter.note(f"{line.name}: {line.output}")
            session.prompts.hold(line.request.prompts, self.contexts)
            result.tasks.append(Make(line, self.contexts, first_stage(session, line.request, following)))
        return result


@dataclass(frozen=True, eq=False)
class Make(Begin):
    """Make the video of a line; ``halfway``: its first stage, if it is made already."""

    halfway: Halfway | None = None

    def carry_out(self, session: Session, following: Request | None = None) -> TaskResult:
        line, result = self.line, TaskResult()
        with _attempt(session, [line], result):
            if self.halfway is None:
                session.reporter.note(f"{line.name}: {line.output}")
            description, fingerprint = identity(session.overlay, session.settings, line)
            session.prompts.hold(line.request.prompts, self.contexts)
            digest = write_video(session, line.request, line.output, following=following, halfway=self.halfway)
            seconds = {**(self.halfway.seconds if self.halfway else {}), **session.timings.seconds}
            assert session.attention is not None
            try:
                record.write_record(line.output, digest, description, fingerprint, seconds, session.attention.name)
            except UnwrittenError as error:
                raise error.keeping(line.output) from None
            result.outcomes.append(Outcome(line, DONE, seconds, decoding=session.decoding))
        return result


Task: TypeAlias = Encode | Begin | Make


@contextmanager
def _attempt(session: Session, lines: Sequence[PromptsLine], result: TaskResult) -> Iterator[None]:
    """Work for ``lines``: if the block raises, all of them fail, and their outcomes go to ``result``."""
    session.timings = Timings()
    try:
        yield
    except Exception as error:
        session.reporter.end()
        seconds = dict(session.timings.seconds)
        result.outcomes += [failed(line, error, session.reporter, seconds) for line in lines]


def failed(
    line: PromptsLine, error: Exception, reporter: Reporter, seconds: Mapping[str, float] | None = None
) -> Outcome:
    """The outcome of a line that ``error`` ended; warns of it at once.

    The outcome holds the failure as text: the exception would keep the tensors of the failed work alive.
    """
    ours = _as_ours(error, line.output)
    if ours is not error:
        reporter.detail("".join(traceback.format_exception(error)))
    reporter.warn(f"{line.name} failed: {ours.render()}")
    return Outcome(line, FAILED, seconds or {}, in_a_line(ours))


def identity(overlay: Overlay, settings: SessionSettings, line: PromptsLine) -> tuple[dict[str, Any], str]:
    """All inputs of the video of ``line``, and their fingerprint with the weights. Raises LtxpackError."""
    found = chosen(overlay, settings, line.request.recipe)
    description = record.described(line.request, overlay, found.stages, settings.dtype, settings.fp8)
    return description, record.fingerprint(description, found.stages, overlay)


def _as_ours(error: Exception, output: Path) -> LtxpackError:
    if isinstance(error, LtxpackError):
        return error
    if isinstance(error, OSError):
        advice = "make room there, or choose another output"
        return LtxpackError(error.strerror or str(error), file=error.filename or output, next=advice)
    problem = f"failed unexpectedly: {type(error).__name__}: {error}"
    return LtxpackError(problem, file=output, next="the same command with -v says more")
