"""Many videos from one prompts file: the overlay opened once, prompts encoded ahead, each video a file of its own.

A line that fails does not stop the rest; one that is done already is not made again (see :mod:`record`).
"""

from __future__ import annotations

import fcntl
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltxpack.errors import LtxpackError, UnwrittenError, UsageError
from ltxpack.files.tensorfile import open_source
from ltxpack.reporter import Reporter
from ltxpack.runtime import record
from ltxpack.runtime.prompts_file import PromptsLine, in_a_line, read_lines
from ltxpack.runtime.recipe_run import encode_ahead, work_of
from ltxpack.runtime.run import RunOptions, outputs_of, tell_inside, write_video
from ltxpack.runtime.session import Session, Timings
from ltxpack.runtime.text.length import tell_cut

# Videos whose prompts are encoded in one go: so many contexts of the 22B model take 1.6 GB on the host, as planned.
AHEAD = 64
DONE, SKIPPED, FAILED = "done", "skipped", "failed"


@dataclass(frozen=True)
class Outcome:
    """How a line ended: ``status`` is done, skipped or failed; with seconds per phase and the decoder's tiles."""

    line: PromptsLine
    status: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    problem: str | None = None
    decoding: str = ""


def run_batch(options: RunOptions, prompts: Path, output: Path | None, reporter: Reporter) -> Batch:
    """Make the videos of the file ``prompts``; ``options`` and ``output`` for what a line leaves out.

    Raises BadLinesError before anything is loaded if any line cannot be used, UsageError, OverlayError, DeviceError
    for what no line could be made with. What goes wrong with one line is in its outcome.
    """
    with _claimed(prompts):
        lines = read_lines(prompts, options.given, output)
        tell_inside(outputs_of(options, [(line.name, line.output) for line in lines]), reporter)
        with Session(options.overlay, options.session, reporter) as session:
            session.process_ends = True
            recipes = {line.request.recipe.name: line.request.recipe for line in lines}
            choices = [session.transformers(recipe) for recipe in recipes.values()]
            for choice in choices:
                reporter.note(choice.note)
            batch = Batch(session, reporter, [choice.stages for choice in choices])
            batch.run(lines)
    return batch


@dataclass
class Batch:
    """The lines of one prompts file on their way, and what became of each, by its number.

    ``choices`` are the transformers of the stages, one entry for each recipe that a line has; ``ahead`` are the seconds
    of encoding prompts ahead.
    """

    session: Session
    reporter: Reporter
    choices: Sequence[tuple[str, ...]]
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    ahead: float = 0.0

    def of(self, status: str) -> list[Outcome]:
        """What became of the lines that ended so."""
        return [outcome for outcome in self.outcomes.values() if outcome.status == status]

    def run(self, lines: Sequence[PromptsLine]) -> None:
        """Make the videos of ``lines``; the outcomes are then in the order of the file."""
        for line in lines:
            with self._attempt([line]):
                # What is done may be without what is to be recorded of it.
                if self.session.activations is None and record.is_done(line.output, self._identity(line)[1]):
                    self.outcomes[line.number] = Outcome(line, SKIPPED)
                else:
                    self.session.residency.plan_for(work_of(self.session, line.request, min(len(lines), AHEAD)))
        done = sum(outcome.status == SKIPPED for outcome in self.outcomes.values())
        if done:
            self.reporter.note(f"{done} of {len(lines)} videos are done already")
        pending = [line for line in lines if line.number not in self.outcomes]
        named = ((f"{line.name}: {name}", text) for line in pending for name, text in line.request.named_prompts)
        with self._attempt(pending):
            tell_cut(self.session.overlay, named, self.reporter)
        for start in range(0, len(pending), AHEAD):
            group = pending[start : start + AHEAD]
            with self._attempt(group):
                self.ahead += encode_ahead(self.session, [line.request for line in group])
            if group[0].number in self.outcomes:  # the prompts of all could not be encoded
                continue
            for line, following in zip(group, (*group[1:], None), strict=True):
                with self._attempt([line]):
                    self._make(line, following)
        self.outcomes = dict(sorted(self.outcomes.items()))

    def _make(self, line: PromptsLine, following: PromptsLine | None) -> None:
        self.reporter.note(f"{line.name}: {line.output}")
        session = self.session
        description, fingerprint = self._identity(line)
        next_request = None if following is None else following.request
        digest = write_video(session, line.request, line.output, following=next_request)
        seconds = dict(session.timings.seconds)
        assert session.attention is not None
        kernel = session.attention.name
        try:
            record.write_record(line.output, digest, description, fingerprint, seconds, kernel)
        except UnwrittenError as error:
            raise error.keeping(line.output) from None
        self.outcomes[line.number] = Outcome(line, DONE, seconds, decoding=session.decoding)

    @contextmanager
    def _attempt(self, lines: Sequence[PromptsLine]) -> Iterator[None]:
        """Work for ``lines``, which all fail if the block raises."""
        self.session.timings = Timings()
        try:
            yield
        except Exception as error:
            for line in lines:
                self._failed(line, error)

    def _failed(self, line: PromptsLine, error: Exception) -> None:
        """Note the failure as text: the exception itself would keep the tensors of the failed work alive."""
        self.reporter.end()
        ours = _as_ours(error, line.output)
        if ours is not error:
            self.reporter.detail("".join(traceback.format_exception(error)))
        self.reporter.warn(f"{line.name} failed: {ours.render()}")
        self.outcomes[line.number] = Outcome(line, FAILED, dict(self.session.timings.seconds), in_a_line(ours))

    def _identity(self, line: PromptsLine) -> tuple[dict[str, Any], str]:
        session = self.session
        names = session.transformers(line.request.recipe).stages
        settings = session.settings
        description = record.described(line.request, session.overlay, names, settings.dtype, settings.fp8)
        return description, record.fingerprint(description, names, session.overlay)


def _as_ours(error: Exception, output: Path) -> LtxpackError:
    if isinstance(error, LtxpackError):
        return error
    if isinstance(error, OSError):
        advice = "make room there, or choose another output"
        return LtxpackError(error.strerror or str(error), file=error.filename or output, next=advice)
    problem = f"failed unexpectedly: {type(error).__name__}: {error}"
    return LtxpackError(problem, file=output, next="the same command with -v says more")


@contextmanager
def _claimed(prompts: Path) -> Iterator[None]:
    """Hold the prompts file, so that two runs of it never write the same video. Raises UsageError."""
    with open_source(prompts) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError("another ltxpack run is at these prompts", file=prompts, next="wait for it") from None
        except OSError:  # a filesystem without locks
            pass
        yield
