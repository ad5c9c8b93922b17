"""What a user asks a run for: parsed and checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from ltxpack.errors import UsageError
from ltxpack.runtime.large_tiles import DECODES, OFFICIAL
from ltxpack.runtime.sampling.av import AV
from ltxpack.runtime.sampling.conditioning import VideoShape
from ltxpack.runtime.sampling.guidance import Guidance

DEFAULT_NEGATIVE_PROMPT = (
    "has_subtitles, has_blurbox, transition from black, transition to black, speech_ending_short, blurry, out of "
    "focus, overexposed, underexposed, low contrast, washed out colors, excessive noise, grainy texture, poor "
    "lighting, flickering, motion blur, distorted proportions, unnatural skin tones, deformed facial features, "
    "asymmetrical face, missing facial features, extra limbs, disfigured hands, wrong hand count, artifacts around "
    "text, inconsistent perspective, camera shake, incorrect depth of field, background too sharp, background "
    "clutter, distracting reflections, harsh shadows, inconsistent lighting direction, color banding, cartoonish "
    "rendering, 3D CGI look, unrealistic materials, uncanny valley effect, incorrect ethnicity, wrong gender, "
    "exaggerated expressions, wrong gaze direction, mismatched lip sync, silent or muted audio, distorted voice, "
    "robotic voice, echo, background noise, off-sync audio, incorrect dialogue, added dialogue, repetitive speech, "
    "jittery movement, awkward pauses, incorrect timing, unnatural transitions, inconsistent framing, tilted "
    "camera, flat lighting, inconsistent tone, cinematic oversaturation, stylized filters, or AI artifacts."
)
SEE_HELP = "ltxpack run --help"


@dataclass(frozen=True)
class ImageSpec:
    """An image file that pixel frame ``frame`` is held to, with ``strength`` in [0, 1]; ``path`` may be text."""

    path: Path
    frame: int = 0
    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @classmethod
    def parse(cls, text: str, num_frames: int) -> ImageSpec:
        """``PATH[@FRAME][:STRENGTH]``, read from the right; a path that exists as typed wins; ``@last`` is a frame.

        Raises UsageError for a missing file, a frame outside the video or a strength outside [0, 1].
        """
        if Path(text).is_file():
            return cls(Path(text))
        rest, strength = _strength(text)
        if Path(rest).is_file():
            return cls(Path(rest), strength=strength)
        name, frame = _frame(rest, num_frames)
        if not Path(name).is_file():
            raise UsageError("there is no such image", file=name, next=f"{SEE_HELP} (--image PATH[@FRAME][:STRENGTH])")
        return cls(Path(name), frame, strength)

    def check(self, num_frames: int) -> None:
        """Raises UsageError for a missing file, a frame outside the video or a strength outside [0, 1]."""
        if not self.path.is_file():
            raise UsageError("there is no such image", file=self.path, next=f"{SEE_HELP} (--image PATH[@FRAME])")
        _check_frame(self.path, self.frame, num_frames, self.frame)
        _check_strength(self.path, self.strength, self.strength)


def _strength(text: str) -> tuple[str, float]:
    head, colon, tail = text.rpartition(":")
    try:
        strength = float(tail) if colon else 1.0
    except ValueError:
        return text, 1.0
    _check_strength(head, strength, tail)
    return (head, strength) if colon else (text, strength)


def _frame(text: str, num_frames: int) -> tuple[str, int]:
    head, at, tail = text.rpartition("@")
    if not at:
        return text, 0
    try:
        frame = num_frames - 1 if tail == "last" else int(tail)
    except ValueError:
        return text, 0
    _check_frame(head, frame, num_frames, tail)
    return head, frame


def _check_strength(file: str | Path, strength: float, typed: object) -> None:
    if not 0 <= strength <= 1:
        raise UsageError("wrong image strength", file=file, expected="a number from 0 to 1", found=typed, next=SEE_HELP)


def _check_frame(file: str | Path, frame: int, num_frames: int, typed: object) -> None:
    if not 0 <= frame < num_frames:
        raise UsageError(
            "image outside the video",
            file=file,
            expected=f"a frame from 0 to {num_frames - 1}, or last",
            found=typed,
            next=SEE_HELP,
        )


class Settings(TypedDict, total=False):
    """What may be said of a video beside its prompt, by the names of the flags; DEFAULTS for the rest."""

    negative_prompt: str | None
    seed: int
    height: int
    width: int
    num_frames: int
    fps: float
    steps: int
    images: Sequence[ImageSpec | str | Path]
    image_crf: int | None
    video_cfg: float
    audio_cfg: float
    video_rescale: float
    audio_rescale: float
    modality: float
    decode: str


DEFAULTS = Settings(
    negative_prompt=None,
    seed=10,
    height=1088,
    width=1920,
    num_frames=121,
    fps=24.0,
    steps=15,
    images=(),
    image_crf=None,
    video_cfg=3.0,
    audio_cfg=7.0,
    video_rescale=0.45,
    audio_rescale=1.0,
    modality=3.0,
    decode=OFFICIAL,
)


@dataclass(frozen=True)
class Request:
    """One video to make. Raises UsageError for values no run could use."""

    prompt: str
    shape: VideoShape
    guidance: AV[Guidance]
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    seed: int = 10
    steps: int = 15
    images: Sequence[ImageSpec] = ()
    image_crf: int | None = None
    decode: str = OFFICIAL

    @classmethod
    def of(cls, prompt: str, **settings: Unpack[Settings]) -> Request:
        """The request that ``ltxpack run`` makes of the same values; an image as text is ``PATH[@FRAME][:STRENGTH]``.

        Raises UsageError for values no run could use, TypeError for a name that is no setting.
        """
        unknown = sorted(set(settings) - set(DEFAULTS))
        if unknown:
            raise TypeError(f"no such setting: {', '.join(unknown)}; there are {', '.join(DEFAULTS)}")
        s: Settings = {**DEFAULTS, **settings}
        frames, negative = s["num_frames"], s["negative_prompt"]
        return cls(
            prompt=prompt,
            negative_prompt=DEFAULT_NEGATIVE_PROMPT if negative is None else negative,
            shape=VideoShape(frames, s["height"], s["width"], s["fps"]),
            guidance=AV(
                Guidance(s["video_cfg"], s["video_rescale"], s["modality"]),
                Guidance(s["audio_cfg"], s["audio_rescale"], s["modality"]),
            ),
            seed=s["seed"],
            steps=s["steps"],
            images=tuple(i if isinstance(i, ImageSpec) else ImageSpec.parse(str(i), frames) for i in s["images"]),
            image_crf=s["image_crf"],
            decode=s["decode"],
        )

    @property
    def prompts(self) -> tuple[str, str]:
        """The batch that is encoded: the prompt and its negative."""
        return self.prompt, self.negative_prompt

    def __post_init__(self) -> None:
        self.shape.half()
        for image in self.images:
            image.check(self.shape.frames)
        if self.steps < 2:
            raise UsageError("too few steps", expected="2 or more", found=self.steps, next="choose --steps 15")
        if self.decode not in DECODES:
            raise UsageError("unknown decode", expected=" or ".join(DECODES), found=self.decode, next=SEE_HELP)
        if not -(2**63) <= self.seed < 2**64:
            raise UsageError("wrong seed", expected="a 64-bit integer", found=self.seed, next="choose --seed 10")
        for guidance in (self.guidance.video, self.guidance.audio):
            for name in ("cfg", "rescale", "modality"):
                value = getattr(guidance, name)
                if not math.isfinite(value):
                    raise UsageError(f"wrong {name}", expected="a finite number", found=value, next=SEE_HELP)
        for text in self.prompts:
            _check_text(text)


def _check_text(text: Any) -> None:
    """Raises UsageError for what no tokenizer takes: bytes of the command line that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError("a prompt that is not UTF-8 text", found=ascii(text[: error.end]), next=SEE_HELP) from None
