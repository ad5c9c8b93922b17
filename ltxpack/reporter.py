"""Long work reports notes and progress to a Reporter; the one of the cli prints them."""

from __future__ import annotations

from collections.abc import Callable


class Reporter:
    """Receives notes and progress and drops them. Only the subclass of ltxpack/cli writes to a terminal."""

    def note(self, message: str) -> None:
        """A fact the user should see once."""

    def detail(self, message: str) -> None:
        """A fact for ``-v``."""

    def warn(self, message: str) -> None:
        """A fact that the user probably does not want."""

    def begin(self, label: str, total: int, unit: str) -> None:
        """A phase of ``total`` units (``"B"`` bytes, ``"step"`` …) starts."""

    def advance(self, amount: int = 1) -> None:
        """The phase moved on."""

    def end(self) -> None:
        """The phase is over."""


class SilentReporter(Reporter):
    """Drops everything; for use from Python and in tests."""


class ProgressReporter(Reporter):
    """Calls ``progress(phase, done, total)`` for each phase; passes notes and warnings to ``beyond``."""

    def __init__(self, progress: Callable[[str, int, int], object], beyond: Reporter) -> None:
        self.progress = progress
        self.note, self.detail, self.warn = beyond.note, beyond.detail, beyond.warn  # type: ignore[method-assign]
        self._phase, self._done, self._total = "", 0, 0

    def begin(self, label: str, total: int, unit: str) -> None:
        self._phase, self._done, self._total = label, 0, total
        self.progress(label, 0, total)

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        self.progress(self._phase, self._done, self._total)
