"""The video that a job asks for, as it is kept in the database and handed to a worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltxpack.runtime.request import ImageSpec, Request

# A picture: the name of its file, the frame it conditions, and how strongly.
Image = tuple[str, int, float]


@dataclass(frozen=True)
class VideoTask:
    """``settings`` with the recipe, ``stages`` the transformers; ``size`` and ``seconds`` as the client is told."""

    model: str
    prompt: str
    settings: Mapping[str, Any]
    stages: Sequence[str]
    images: Sequence[Image]
    size: str
    seconds: str


def request_of(prompt: str, settings: Mapping[str, Any], images: Sequence[Image], pictures: Path) -> Request:
    """The request of a task, whose pictures are in the folder ``pictures``. Raises UsageError."""
    # JSON has no tuples.
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    specs = [ImageSpec(pictures / name, frame, strength) for name, frame, strength in images]
    given["images"] = specs
    return Request.of(prompt, **given)
