"""How long work tells what it is doing, without printing: the cli hands in a Reporter that prints."""

from __future__ import annotations

from collections.abc import Callable


class Reporter:
    """Receives notes and progress; this one drops them. Only ltxpack/cli has one that writes to a terminal."""

    def note(self, message: str) -> None:
        """A fact the user should see once."""

    def detail(self, message: str) -> None:
        """A fact for ``-v``."""

    def warn(self, message: str) -> None:
        """Something that is probably not what the user wants."""

    def begin(self, label: str, total: int, unit: str) -> None:
        """A phase of ``total`` units (``"B"`` bytes, ``"step"`` …) starts."""

    def advance(self, amount: int = 1) -> None:
        """The phase moved on."""

    def end(self) -> None:
        """The phase is over."""


class SilentReporter(Reporter):
    """Drops everything; for use from Python and in tests."""


class ProgressReporter(Reporter):
    """Tells ``progress(phase, done, total)`` how far each phase is; all else goes to ``beyond``."""

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
