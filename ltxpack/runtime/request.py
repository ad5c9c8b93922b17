"""The request for one video: parsed and checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from ltxpack.errors import UsageError
from ltxpack.files.typed import at_home
from ltxpack.ltx23.classes import TEXT_TOKENS
from ltxpack.runtime.codecs.tiles import DECODES
from ltxpack.runtime.sampling.recipes import Recipe
from ltxpack.runtime.sampling.shape import VideoShape, check_sizes
from ltxpack.runtime.settings import Settings, SettingsGiven, flag_of, recipe_named
from ltxpack.runtime.weights.plan import StageWork, Work

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
# More than the tokens that the model reads ever have; the tokenizer takes 14 s and 3 GB for ten million.
MOST_LETTERS = 100_000
WEB = ("http:/", "https:/", "hf:/", "s3:/", "data:")
# Names of --keep-steps for steps of a stage; other steps go by number, from 1.
FIRST, LAST, NONE = "first", "last", "none"


@dataclass(frozen=True)
class ImageSpec:
    """An image file that conditions pixel frame ``frame`` with ``strength`` in [0, 1]; ``path`` may be text."""

    path: Path
    frame: int = 0
    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        object.__setattr__(self, "strength", float(self.strength))

    @classmethod
    def parse(cls, text: str, num_frames: int) -> ImageSpec:
        """``PATH[@FRAME][:STRENGTH]``, read from the right; a path that exists as typed wins; ``@last`` is a frame."""
        # A shell does not expand the ~ in --image=~/a.png.
        text = text if _is_file(text) else str(at_home(text))
        rest, frame, strength = text, 0, 1.0
        head, colon, tail = text.rpartition(":")
        with suppress(ValueError):
            if colon and not _is_file(text):
                rest, strength = head, float(tail)
        head, at, tail = rest.rpartition("@")
        with suppress(ValueError):
            if at and not _is_file(rest):
                rest, frame = head, num_frames - 1 if tail == "last" else int(tail)
        return cls(Path(rest), frame, strength)

    def check(self, num_frames: int) -> None:
        """Raises UsageError for a missing file, a frame outside the video or a strength outside [0, 1]."""
        refused = functools.partial(UsageError, file=self.path, next=SEE_HELP)
        if not _is_file(self.path):
            raise _no_such_image(self.path)
        if not 0 <= self.frame < num_frames:
            wanted = f"a frame from 0 to {num_frames - 1}, or last"
            raise refused("image outside the video", expected=wanted, found=self.frame)
        if not 0 <= self.strength <= 1:
            raise refused("wrong image strength", expected="a number from 0 to 1", found=self.strength)


@dataclass(frozen=True)
class Request:
    """One video to make. Raises UsageError for values that no run can use."""

    prompt: str
    settings: Settings

    @classmethod
    def of(cls, prompt: str, **given: Unpack[SettingsGiven]) -> Request:
        """The request of ``ltxpack run`` for the same values; an image as text is ``PATH[@FRAME][:STRENGTH]``.

        Raises UsageError for values that no run can use, TypeError for a name that is no setting.
        """
        return cls(prompt, Settings.of(given))

    @property
    def recipe(self) -> Recipe:
        return recipe_named(self.settings.recipe)

    @property
    def shape(self) -> VideoShape:
        s = self.settings
        return VideoShape(s.num_frames, s.height, s.width, s.fps)

    @functools.cached_property
    def images(self) -> tuple[ImageSpec, ...]:
        frames = self.settings.num_frames
        return tuple(
            image if isinstance(image, ImageSpec) else ImageSpec.parse(str(image), frames)
            for image in self.settings.images
        )

    @property
    def prompts(self) -> tuple[str, ...]:
        """The batch to encode: the prompt, and the negative one if the recipe needs it."""
        return (self.prompt, self.negative_prompt) if self.recipe.negative else (self.prompt,)

    @property
    def named_prompts(self) -> Iterator[tuple[str, str]]:
        return zip(("prompt", "negative prompt"), self.prompts, strict=False)

    @property
    def negative_prompt(self) -> str:
        given = self.settings.negative_prompt
        return DEFAULT_NEGATIVE_PROMPT if given is None else given

    @property
    def without_effect(self) -> Iterator[str]:
        """The settings of STG that change nothing without another one, in words."""
        guidance = self.settings.guidance
        for name, one in (("video", guidance.video), ("audio", guidance.audio)):
            usual = self.recipe.defaults.get(f"{name}_stg_blocks", ())
            if one.stg and not one.stg_blocks:
                yield f"--{name}-stg {one.stg:g} perturbs no block: give --{name}-stg-blocks too"
            if not one.stg and one.stg_blocks.difference(usual):
                yield f"--{name}-stg-blocks perturb nothing: give --{name}-stg too"

    @property
    def _kept_words(self) -> list[str]:
        asked = self.settings.keep_steps
        return [] if asked in (None, NONE) else [word.strip() for word in str(asked).split(",")]

    def kept_steps(self, stage: int) -> frozenset[int]:
        """The steps of a stage, counted from 0, that decode quantised weights.

        Without a setting it is the first step of a guided stage: guidance multiplies the error of codes, and this step
        decides what the video shows.
        """
        if self.settings.keep_steps is None:
            return frozenset([0][: self.recipe.stages[stage].guided])
        count = self.recipe.stages[stage].schedule.steps(self.settings.steps)
        named = {FIRST: 0, LAST: count - 1}
        return frozenset(named[word] if word in named else int(word) - 1 for word in self._kept_words)

    def work(self, transformers: Sequence[str], *, prompts: int = 1, once: bool = False) -> Work:
        """The work for the planner: the stages with their ``transformers``, and their amount of computing.

        ``prompts`` and ``once`` as in :class:`Work`.
        """
        s, shape, guidance = self.settings, self.shape, self.settings.guidance
        stages = tuple(
            StageWork(
                name, stage.shape(shape), stage.evaluations(s.steps), stage.passes(guidance), stage.isolated(guidance)
            )
            for stage, name in zip(self.recipe.stages, transformers, strict=True)
        )
        return Work(shape, stages, len(self.images), s.decode, prompts, once)

    def __post_init__(self) -> None:
        s = self.settings
        check_sizes(s.height, s.width, self.recipe.multiple)
        frames = self.shape.frames
        for image in self.images:
            image.check(frames)
        if s.steps < 2:
            raise UsageError("too few steps", expected="2 or more", found=s.steps, next="choose --steps 15")
        if s.decode not in DECODES:
            raise UsageError("unknown decode", expected=" or ".join(DECODES), found=s.decode, next=SEE_HELP)
        if not -(2**63) <= s.seed < 2**64:
            raise UsageError("wrong seed", expected="a 64-bit integer", found=s.seed, next="choose --seed 10")
        for one in dataclasses.fields(s):
            if "guides" in one.metadata:
                _check_strength(one, getattr(s, one.name))
        for text in (self.prompt, self.negative_prompt):
            _check_text(text)
        most = max(stage.schedule.steps(s.steps) for stage in self.recipe.stages)
        for word in self._kept_words:
            if word not in (FIRST, LAST) and not (word.isdecimal() and len(word) < 10 and 1 <= int(word) <= most):
                wanted = f"{NONE}, or {FIRST}, {LAST} or numbers from 1 to {most}, with commas"
                raise UsageError("wrong --keep-steps", expected=wanted, found=s.keep_steps, next=SEE_HELP)


def _is_file(path: str | Path) -> bool:
    """Whether the file exists; False also for text that cannot be a path."""
    try:
        return Path(path).is_file()
    except OSError:
        return False


def _no_such_image(path: Path) -> UsageError:
    """The error for a path that is no file. In a Path, a web address has only one of its two slashes."""
    try:
        path.stat()
        found, better = "a folder or a device", "give a picture in it"
    except (OSError, ValueError) as error:
        found, better = getattr(error, "strerror", None) or str(error), SEE_HELP
    if str(path).startswith(WEB):
        better = "download the picture first, and give its path"
    return UsageError("there is no such image", file=path, found=found, next=better)


def _check_strength(one: dataclasses.Field[Any], value: float | tuple[int, ...]) -> None:
    """Raises UsageError for a number that is not finite or below the least one."""
    least = one.metadata.get("least", -math.inf)
    for number in value if isinstance(value, tuple) else (value,):
        if not math.isfinite(number) or number < least:
            wanted = "a finite number" if least == -math.inf else f"{least} or more"
            raise UsageError(f"wrong {flag_of(one)}", expected=wanted, found=number, next=SEE_HELP)


def _check_text(text: str) -> None:
    """Raises UsageError for no text, bytes of the command line that are not UTF-8, and more than the tokenizer gets."""
    try:
        if not isinstance(text, str):
            raise UsageError("a prompt that is no text", found=repr(text), next=SEE_HELP)
        if len(text) > MOST_LETTERS:
            problem, most = "a prompt that is too long", f"at most {MOST_LETTERS} letters"
            expected = f"{most}, of which the model reads {TEXT_TOKENS} tokens"
            raise UsageError(problem, expected=expected, found=len(text), next="shorten the prompt to some 700 words")
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError("a prompt that is not UTF-8 text", found=ascii(text[: error.end]), next=SEE_HELP) from None
