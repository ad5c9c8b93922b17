"""Video and audio as one value: almost everything in the sampler is done to both alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class AV(Generic[T]):
    """One thing per modality, always both."""

    video: T
    audio: T

    def map(self, function: Callable[..., U], *others: AV[Any]) -> AV[U]:
        """``function`` applied to the video parts, then to the audio parts (draw order of the noise)."""
        return AV(
            function(self.video, *(other.video for other in others)),
            function(self.audio, *(other.audio for other in others)),
        )
