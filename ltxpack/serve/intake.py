"""From the fields of a request to a job: everything that can be wrong with a video is told before it is accepted."""

from __future__ import annotations

import base64
import binascii
import math
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltxpack.errors import LtxpackError
from ltxpack.files.publish import fsync_file, fsync_folder
from ltxpack.ltx23.classes import TEMPORAL_FACTOR
from ltxpack.runtime.media.pictures import read_image
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling.shape import frame_rate
from ltxpack.runtime.settings import Settings
from ltxpack.serve.jobs import Image, Job, Jobs, QueueFullError, VideoTask, request_of
from ltxpack.serve.limits import ServeLimits
from ltxpack.serve.models import ServedModel
from ltxpack.serve.refusal import Refusal, field_at_fault, told
from ltxpack.serve.schema import IMAGES, REFERENCE

# What is not a setting by itself.
OTHER_FIELDS = ("prompt", "model", "size", "seconds", REFERENCE, IMAGES)
LAST = "last"
NO_PATHS = "a picture is uploaded or given as a data: URL with base64; this server opens no path and no address"
RETRY_SECONDS, LONGEST_RETRY = 10, 600


@dataclass(frozen=True)
class Picture:
    """A picture that came with a request, and what it conditions; ``param`` is the field it came in."""

    param: str
    data: bytes
    frame: int | str = 0
    strength: float = 1.0


@dataclass
class Intake:
    """Accepts jobs for ``models``, the first of which is the default. For several threads."""

    jobs: Jobs
    models: Mapping[str, ServedModel]
    limits: ServeLimits
    workers: int = 1
    # Pictures are decoded one after another: each may take a gigabyte for a moment.
    _decoding: threading.Lock = field(default_factory=threading.Lock)

    def accept(self, said: Mapping[str, Any], uploaded: bytes | None = None) -> Job:
        """The job that the fields ``said`` ask for, with the picture ``uploaded``. Raises Refusal."""
        if self.jobs.is_full():
            raise self._busy()
        model = self._model(said.get("model"))
        settings = {name: value for name, value in said.items() if name not in OTHER_FIELDS}
        settings |= {"recipe": model.recipe} | _sized(said)
        pictures = self._pictures(said, uploaded)
        job_id = f"video_{secrets.token_hex(16)}"
        try:
            if "seconds" in said:
                settings["num_frames"] = self._frames(said, settings)
            images = self._written(job_id, pictures, Settings.of(settings).num_frames)
            request = request_of(said["prompt"], settings, images, self.jobs.pictures)
            self._check(request, pictures)
            shape = request.shape
            length = str(said["seconds"]).strip() if "seconds" in said else f"{shape.frames / shape.fps:g}"
            size = f"{shape.width}x{shape.height}"
            task = VideoTask(model.name, said["prompt"], settings, model.stages, images, size, length)
            return self.jobs.add(job_id, task)
        except QueueFullError:
            self.jobs.discard(job_id)
            raise self._busy() from None
        except LtxpackError as error:
            self.jobs.discard(job_id)
            raise Refusal(400, told(error), param=field_at_fault(error, said), code="invalid_value") from None
        except BaseException:
            self.jobs.discard(job_id)
            raise

    def _model(self, name: str | None) -> ServedModel:
        model = next(iter(self.models.values())) if name is None else self.models.get(name)
        if model is None:
            known = ", ".join(self.models)
            raise Refusal(404, f"there is no model {name!r}; there are {known}", param="model", code="model_not_found")
        return model

    def _busy(self) -> Refusal:
        mean = self.jobs.mean_seconds() or RETRY_SECONDS
        wait = min(LONGEST_RETRY, max(1, math.ceil(mean / self.workers)))
        message = f"{self.limits.queue} videos wait already; try again in {wait} s"
        return Refusal(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(wait)})

    def _frames(self, said: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
        """The nearest number of frames that a video can have to ``seconds``."""
        if "num_frames" in said:
            raise Refusal(400, "seconds and num_frames are two answers to one question", param="seconds")
        try:
            seconds = float(said["seconds"])
        except (ValueError, OverflowError):
            seconds = math.nan
        frames = seconds * float(Settings.of(settings).fps)
        if not 0 < frames <= self.limits.frames:
            wanted = f"a number above 0 that makes at most {self.limits.frames} frames"
            raise Refusal(400, f"seconds: expected {wanted}, found {said['seconds']!r}", param="seconds")
        return max(1, round((frames - 1) / TEMPORAL_FACTOR)) * TEMPORAL_FACTOR + 1

    def _pictures(self, said: Mapping[str, Any], uploaded: bytes | None) -> list[Picture]:
        """The pictures of a request, within the limits of their bytes."""
        found = [] if uploaded is None else [Picture(REFERENCE, uploaded)]
        if REFERENCE in said:
            if uploaded is not None:
                raise Refusal(400, f"{REFERENCE} is said twice", param=REFERENCE)
            url = said[REFERENCE]
            found.append(Picture(REFERENCE, _decoded(url if isinstance(url, str) else url["image_url"], REFERENCE)))
        for number, image in enumerate(said.get(IMAGES, ())):
            param = f"{IMAGES}.{number}"
            data = _decoded(image["image_url"], param)
            found.append(Picture(param, data, image.get("frame", 0), float(image.get("strength", 1.0))))
        for picture in found:
            if len(picture.data) > self.limits.picture:
                message = f"{picture.param}: a picture may have {self.limits.picture} bytes"
                raise Refusal(413, message, param=picture.param)
        if len(found) > self.limits.pictures:
            raise Refusal(400, f"at most {self.limits.pictures} pictures", param=IMAGES)
        return found

    def _written(self, job_id: str, pictures: Sequence[Picture], frames: int) -> list[Image]:
        """The pictures as files, of a video of so many ``frames``."""
        images = []
        for number, picture in enumerate(pictures):
            name = f"{job_id}-{number}"
            (self.jobs.pictures / name).write_bytes(picture.data)
            images.append((name, frames - 1 if picture.frame == LAST else int(picture.frame), picture.strength))
        return images

    def _check(self, request: Request, pictures: Sequence[Picture]) -> None:
        """Look at what a request does not check by itself. Raises Refusal, UsageError."""
        shape = request.shape
        frame_rate(shape.fps)
        if shape.width * shape.height > self.limits.pixels:
            message = f"{shape.width}x{shape.height}: a frame may have {self.limits.pixels} pixels"
            raise Refusal(400, message, param="size", code="invalid_value")
        for picture, image in zip(pictures, request.images, strict=True):
            self._look_at(image.path, picture.param)
        fsync_folder(self.jobs.pictures)

    def _look_at(self, path: Path, param: str) -> None:
        try:
            with self._decoding:
                read_image(path, self.limits.picture_pixels)
        except LtxpackError as error:
            raise Refusal(400, f"{param}: {told(error)}", param=param, code="invalid_image") from None
        fsync_file(path)


def _sized(said: Mapping[str, Any]) -> dict[str, int]:
    """Width and height of ``size``."""
    if "size" not in said:
        return {}
    width, height = map(int, said["size"].split("x"))
    for name, value in (("width", width), ("height", height)):
        if said.get(name, value) != value:
            raise Refusal(400, f"size and {name} are two answers to one question", param="size")
    return {"width": width, "height": height}


def _decoded(url: str, param: str) -> bytes:
    """The bytes of a data: URL."""
    head, comma, text = url.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise Refusal(400, NO_PATHS, param=param, code="invalid_value")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, f"{param}: not sound base64", param=param, code="invalid_value") from None
