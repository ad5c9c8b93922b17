"""What one request may hold, how many jobs may wait and how long videos stay: a server answers people who did not
start it.
"""

from __future__ import annotations

from dataclasses import dataclass

MEBIBYTE = 1024 * 1024


@dataclass(frozen=True)
class ServeLimits:
    """``queue``: jobs that wait. ``body`` and ``picture`` in bytes, ``picture_pixels`` and ``pixels`` (of a frame of
    video) in pixels, ``prompt`` in characters. A ``body`` has room for the largest picture in base64. Jobs that ended
    stay for ``keep_seconds`` and their videos within ``keep_bytes``; None: until a client deletes them.
    """

    queue: int = 100
    body: int = 48 * MEBIBYTE
    picture: int = 32 * MEBIBYTE
    picture_pixels: int = 50_000_000
    pictures: int = 8
    prompt: int = 20_000
    pixels: int = 4096 * 2304
    frames: int = 1025
    steps: int = 100
    keep_seconds: float | None = None
    keep_bytes: int | None = None


# Settings of a session that a server does not take: the model's name picks the transformers, each worker has one
# device, and activations are of one process.
FIXED = ("stage1", "stage2", "devices", "parallel", "save_activations")
# Seconds that a job which ended stays at least, so that whoever waits for it can fetch its video.
LEAST_KEPT = 60.0
# Values and lists that a JSON body may hold; each field of a form; and the most fields of one.
MAX_VALUES, MAX_CONTAINERS = 50_000, 1_000
MAX_FIELD, MAX_FIELDS = MEBIBYTE, 100
