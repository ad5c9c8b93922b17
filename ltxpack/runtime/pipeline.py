"""The public interface of the runtime: an overlay from which Python makes videos, one after another.

:mod:`session` has the state of a pipeline, :mod:`recipe_run` the steps of a video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Unpack

from torch import Tensor

from ltxpack.imports import import_libraries
from ltxpack.reporter import ProgressReporter, Reporter
from ltxpack.runtime import recipe_run
from ltxpack.runtime.overlay import TransformerChoice
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling.recipes import HQ
from ltxpack.runtime.session import Session
from ltxpack.runtime.settings import SessionGiven, SessionSettings, SettingsGiven, recipe_named
from ltxpack.runtime.text.gemma import tell_cut
from ltxpack.runtime.video import Video

Progress = Callable[[str, int, int], object]


class Pipeline:
    """An overlay ready to make videos, one after another: ``with Pipeline.from_overlay("out") as make: make("...")``.

    Weights that fit stay loaded between calls. Not for several threads at once.
    """

    def __init__(self, session: Session, recipe: str = HQ.name) -> None:
        self.session = session
        self.recipe = recipe
        self.choice: TransformerChoice = session.transformers(recipe_named(recipe))
        import_libraries()
        # Requests whose prompts are encoded and whose videos are not made yet.
        self._waiting: list[Request] = []

    @classmethod
    def from_overlay(
        cls, path: str | Path, *, recipe: str = HQ.name, reporter: Reporter | None = None, **given: Unpack[SessionGiven]
    ) -> Pipeline:
        """Open the overlay at ``path`` without reading large files.

        ``recipe`` is the recipe of a call that names none. ``given`` are settings of ``ltxpack run`` by the names of
        their flags, see :class:`ltxpack.runtime.settings.SessionSettings`. ``cache`` may be a folder. Raises
        OverlayError, UsageError, DeviceError.
        """
        session = Session(Path(path), SessionSettings.of(given), reporter)
        try:
            return cls(session, recipe)
        except BaseException:
            session.close()
            raise

    def __call__(self, prompt: str, *, progress: Progress | None = None, **given: Unpack[SettingsGiven]) -> Video:
        """Make a video of ``prompt``; ``given`` are settings of ``ltxpack run`` by the names of their flags.

        It calls ``progress(phase, done, total)`` as the work goes on; an exception there ends the call. Raises
        UsageError for unusable values, DeviceError for too little memory, OverlayError for an overlay that changed. The
        pipeline can be called again after any error.
        """
        given.setdefault("recipe", self.recipe)
        return self.make(Request.of(prompt, **given), progress)

    def make(self, request: Request, progress: Progress | None = None) -> Video:
        """The video of ``request``, in memory; see :meth:`__call__`."""
        session, frames = self.session, list[Tensor]()
        if request in self._waiting:
            self._waiting.remove(request)
        following = self._waiting[0] if self._waiting else None
        reporter = session.reporter if progress is None else ProgressReporter(progress, session.reporter)
        with session.reporting(reporter):
            tell_cut(session.overlay, request.named_prompts, reporter)
            latents, waveform, rate = recipe_run.generate(session, request, following=following)
            session.within_memory(
                lambda: recipe_run.decode_video(session, latents.video, lambda part: frames.append(part.cpu()))
            )
        session.end_video()
        return recipe_run.finish(session, request, latents, frames, waveform, rate)

    def encode_ahead(self, requests: Sequence[Request]) -> float:
        """Encode the prompts of all ``requests`` with one load of the text encoder; returns the seconds."""
        seconds = recipe_run.encode_ahead(self.session, requests)
        self._waiting = list(requests)
        return seconds

    @property
    def decoding(self) -> str:
        """The tiles of the last decoded video, in words; empty before there is one."""
        return self.session.decoding

    def close(self) -> None:
        """Free the memory; a closed pipeline makes no more videos."""
        self._waiting = []
        self.session.close()

    def __enter__(self) -> Pipeline:
        self.session.check_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
