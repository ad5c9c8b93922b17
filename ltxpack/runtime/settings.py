"""The settings of a video, and those of the session that makes it. Each setting is defined once, here.

The fields of these two classes give the flags of ``ltxpack run`` and ``ltxpack plan``, the arguments from Python, the
fields of a prompts file, the record of a video and the commands that ``ltxpack plan`` prints. Needs no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ltxpack.errors import UsageError
from ltxpack.files.direct import READS
from ltxpack.ltx23.codes import CODES
from ltxpack.runtime.codecs.tiles import DECODES, OFFICIAL
from ltxpack.runtime.parallel.schemes import PARALLEL
from ltxpack.runtime.sampling.recipes import HQ, RECIPES, Guidance, Recipe
from ltxpack.runtime.sampling.shape import AV

if TYPE_CHECKING:
    import torch

    from ltxpack.runtime.request import ImageSpec

AUTO = "auto"
DTYPES = ("bfloat16", "float32")
# From the mode that takes the most memory on the card to the one that takes the least; auto tries them in this order.
RESIDENT, SWAP, STREAM = MODES = ("resident", "swap", "stream")
RESIDENCIES = (AUTO, *MODES)
# How the linears of an fp8 bake compute.
TOKEN, STATIC, WEIGHTS = FP8_MODES = ("token", "static", "weights")
# The plain types, and how messages call their values; the settings without one are paths.
KINDS: dict[type | None, str] = {
    int: "a whole number", float: "a number", str: "text", bool: "True or False", tuple: "a list", None: "a path",
}  # fmt: skip
TYPES = {kind.__name__: kind for kind in KINDS if kind is not None}


def _setting(default: Any, help: str | None = None, **more: Any) -> Any:
    """A field that is a setting. ``more``:

    ``flag``: the flag, if it differs from the name. ``metavar``: the value in the help. ``shown``: the default in the
    help, if it differs from the value. ``choices``, ``bounds``: the values and the range that the command line takes.
    ``least``: the smallest value, from Python too. ``plan``: ``ltxpack plan`` has the flag too. ``line``: the limits
    and description of the field in a prompts file, if a line may have it. ``guides``: the strengths of the guidance
    that it sets, as (modality, strength).
    """
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Settings:
    """The choices for one video beside its prompt. The defaults are those of the recipe hq."""

    recipe: str = _setting(
        HQ.name, "How to make the video; sets the defaults of other options.", choices=tuple(RECIPES), plan=True,
        line={"enum": list(RECIPES), "description": "The recipe."},
    )  # fmt: skip
    negative_prompt: str | None = _setting(
        None, "What to avoid; default: the official one.", line={"description": "What to avoid."}
    )
    seed: int = _setting(10, "Seed of the noise.", line={"minimum": -(2**63), "maximum": 2**64 - 1})
    height: int = _setting(1088, "Pixels.", plan=True, line={"minimum": 32, "multipleOf": 32, "description": "Pixels."})
    width: int = _setting(1920, "Pixels.", plan=True, line={"minimum": 32, "multipleOf": 32, "description": "Pixels."})
    num_frames: int = _setting(
        121, "A multiple of 8 plus 1.", plan=True, line={"minimum": 1, "description": "Frames, a multiple of 8 plus 1."}
    )
    fps: float = _setting(
        24.0, "Frames per second.", plan=True, line={"exclusiveMinimum": 0, "description": "Frames per second."}
    )
    steps: int = _setting(15, "Steps of stage 1.", plan=True, line={"minimum": 2, "description": "Steps of stage 1."})
    images: Sequence[ImageSpec | str | Path] = _setting(
        (), "Condition on an image.", flag="--image", metavar="PATH[@FRAME][:STRENGTH]"
    )
    image_crf: int | None = _setting(
        None, "x264 CRF that images pass through; default: the checkpoint's.", bounds=(0, 51)
    )
    video_cfg: float = _setting(3.0, "CFG of the video; 1: off.", guides=[("video", "cfg")])
    audio_cfg: float = _setting(7.0, "CFG of the sound; 1: off.", guides=[("audio", "cfg")])
    video_rescale: float = _setting(0.45, "Rescale of the guided video; 0: off.", guides=[("video", "rescale")])
    audio_rescale: float = _setting(1.0, "Rescale of the guided sound; 0: off.", guides=[("audio", "rescale")])
    video_stg: float = _setting(0.0, "STG of the video; 0: off.", least=0, guides=[("video", "stg")])
    audio_stg: float = _setting(0.0, "STG of the sound; 0: off.", least=0, guides=[("audio", "stg")])
    video_stg_blocks: tuple[int, ...] = _setting(
        (), "Blocks whose self-attention STG perturbs for the video.",
        metavar="N,N", least=0, guides=[("video", "stg_blocks")],
    )  # fmt: skip
    audio_stg_blocks: tuple[int, ...] = _setting(
        (), "The same for the sound.", metavar="N,N", least=0, guides=[("audio", "stg_blocks")]
    )
    video_skip_step: int = _setting(
        0, "Steps after each guided one that reuse its video; 0: none.", least=0, guides=[("video", "skip")]
    )
    audio_skip_step: int = _setting(0, "The same for the sound.", least=0, guides=[("audio", "skip")])
    modality: float = _setting(
        3.0, "Modality guidance of video and sound; 1: off.", guides=[("video", "modality"), ("audio", "modality")]
    )
    decode: str = _setting(
        OFFICIAL, "fast: larger tiles if memory allows; pixels near seams differ.", choices=DECODES, plan=True
    )
    keep_steps: str | None = _setting(
        None,
        "Steps of each stage that decode quantised weights: none, or first, last, N. Default: the first step of a "
        "guided stage.",
        metavar="first,last",
    )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """The settings ``given``, and the defaults of their recipe for the others.

        Numbers may be of any type, a tuple a list. Raises UsageError for an unknown recipe, a setting that the recipe
        does not use or a value of another kind, TypeError for a name that is no setting.
        """
        known = {one.name: flag_of(one) for one in dataclasses.fields(cls)}
        unknown = sorted(given.keys() - known.keys())
        if unknown:
            raise TypeError(f"no such setting: {', '.join(unknown)}; there are {', '.join(known)}")
        recipe = recipe_named(given.get("recipe", HQ.name))
        for name, flag in known.items():
            if name in given and name in recipe.unused:
                raise UsageError(f"{flag} has no use in the recipe {recipe.name}", next=f"leave {flag} out")
        plain = {one.name: _plain(one, given[one.name]) for one in dataclasses.fields(cls) if one.name in given}
        return cls(**{**recipe.defaults, **plain})

    @property
    def guidance(self) -> AV[Guidance]:
        strengths: dict[str, dict[str, Any]] = {"video": {}, "audio": {}}
        for one in dataclasses.fields(self):
            for modality, name in one.metadata.get("guides", ()):
                value = getattr(self, one.name)
                strengths[modality][name] = frozenset(value) if isinstance(value, tuple) else value
        return AV(Guidance(**strengths["video"]), Guidance(**strengths["audio"]))


class SettingsGiven(TypedDict, total=False):
    """Some of the :class:`Settings`, as arguments from Python; a test holds both to the same names and types."""

    recipe: str
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
    video_stg: float
    audio_stg: float
    video_stg_blocks: tuple[int, ...]
    audio_stg_blocks: tuple[int, ...]
    video_skip_step: int
    audio_skip_step: int
    modality: float
    decode: str
    keep_steps: str | None


@dataclass(frozen=True)
class SessionSettings:
    """How an overlay is opened: which transformers, on what device, and what stays where."""

    stage1: str = _setting(AUTO, "base, or a bake's name.", plan=True)
    stage2: str = _setting(AUTO, "base, or a bake's name.", plan=True)
    text_encoder: str | None = _setting(
        None, "A text encoder that bake-lora --text made, in place of the base's.", metavar="NAME"
    )
    format: str = _setting("bf16", "The form of the bakes that auto takes.", choices=("bf16", *CODES), plan=True)
    fp8: str = _setting(
        TOKEN, "fp8 bakes: inputs in codes with a scale for each token, or the bake's; or decoded weights.",
        choices=FP8_MODES,
    )  # fmt: skip
    device: str = _setting(AUTO, "auto, cuda, cuda:N or cpu.")
    devices: str | None = _setting(None, "Several cards, which share the work as --parallel says.", metavar="0,1,…")
    parallel: str = _setting(
        AUTO,
        "What several cards share: the passes of a guided step, the tokens of a pass, or both; with --prompts the "
        "stages, or whole videos (data); auto: the fastest.",
        choices=PARALLEL,
    )
    dtype: str = _setting(DTYPES[0], "Dtype of weights and results.", choices=DTYPES, plan=True)
    residency: str = _setting(
        AUTO, "Transformers stay on the card, take turns there, or stream block by block; auto: the first that fits.",
        choices=RESIDENCIES, plan=True,
    )  # fmt: skip
    reads: str = _setting(
        AUTO, "Read weights through the page cache or past it; auto: past it, unless they are in it.", choices=READS
    )
    warm_cache: bool = _setting(False, "Read the files into free memory while the device computes, for the next run.")
    attention: str | None = _setting(
        None, "auto (the fastest here), flash3, cudnn, flash, efficient, sdpa or math; wins over LTXPACK_ATTENTION.",
        shown=AUTO, metavar="KERNEL",
    )  # fmt: skip
    compile: bool = _setting(False, "Compile the transformer's blocks with torch.compile.")
    cache: bool | str | Path = _setting(True, "Keep encoded prompts on disk.")  # noqa: RUF009
    save_activations: str | Path | None = _setting(  # noqa: RUF009
        None, "Add the largest input of each linear to this file, for the scales of fp8 bakes.", metavar="FILE"
    )

    @classmethod
    def of(cls, given: SessionGiven) -> SessionSettings:
        """The settings ``given``; dtype and device may be torch's own. Raises UsageError for another kind of value."""
        plain: dict[str, Any] = dict(given)
        plain |= {name: str(plain[name]).removeprefix("torch.") for name in ("dtype", "device") if name in plain}
        plain |= {one.name: _plain(one, plain[one.name]) for one in dataclasses.fields(cls) if one.name in plain}
        return cls(**plain)

    def check(self) -> None:
        """Raises UsageError for a value that is not among the choices of its setting."""
        for one in dataclasses.fields(self):
            choices, found = one.metadata.get("choices"), getattr(self, one.name)
            if choices and found not in choices:
                usual = f"choose {flag_of(one)} {one.default}"
                raise UsageError(f"unknown {one.name}", expected=" or ".join(choices), found=found, next=usual)

    @property
    def transformers(self) -> tuple[str, ...]:
        """The transformer that the user asked for, for each stage."""
        return self.stage1, self.stage2


class SessionGiven(TypedDict, total=False):
    """Some of the :class:`SessionSettings`, as arguments from Python; a test holds both to the same names and types."""

    stage1: str
    stage2: str
    text_encoder: str | None
    format: str
    fp8: str
    device: str | torch.device
    devices: str | None
    parallel: str
    dtype: str | torch.dtype
    residency: str
    reads: str
    warm_cache: bool
    attention: str | None
    compile: bool
    cache: bool | str | Path
    save_activations: str | Path | None


def _plain(one: dataclasses.Field[Any], value: Any) -> Any:
    """``value`` in the plain type of the setting ``one``. Raises UsageError if it has none."""
    kind = type_of(one)
    wanted = KINDS[kind]
    if value is one.default is None or (kind is None and isinstance(value, type(one.default))):
        return value
    try:
        if one.name == "images":
            wanted = "a list"
            return (value,) if isinstance(value, str | Path) else tuple(value)
        if kind is str and not isinstance(value, str):
            raise TypeError(value)
        if kind is tuple:
            return tuple(map(_whole, value))
        if kind in (int, bool):
            return kind(_whole(value))
        if kind is None and "\0" in str(value):
            raise ValueError(value)
        return Path(value) if kind is None else kind(value)
    except (TypeError, ValueError, OverflowError):
        problem, advice = f"wrong {flag_of(one)}", "ltxpack run --help"
        raise UsageError(problem, expected=wanted, found=repr(value), next=advice) from None


def _whole(value: Any) -> int:
    if int(value) != value:
        raise ValueError(value)
    return int(value)


def recipe_named(name: str) -> Recipe:
    """The recipe called ``name``. Raises UsageError if there is none."""
    if name not in RECIPES:
        raise UsageError("unknown recipe", expected=" or ".join(RECIPES), found=name, next=f"choose --recipe {HQ.name}")
    return RECIPES[name]


def flag_of(one: dataclasses.Field[Any]) -> str:
    return str(one.metadata.get("flag", f"--{one.name.replace('_', '-')}"))


def type_of(one: dataclasses.Field[Any]) -> type | None:
    """The plain type of a setting's value; None if it is not plain."""
    return TYPES.get(str(one.type).removesuffix(" | None").removesuffix("[int, ...]"))


def planned_by(table: type) -> list[dataclasses.Field[Any]]:
    """The settings of ``table`` that ``ltxpack plan`` takes."""
    return [one for one in dataclasses.fields(table) if one.metadata.get("plan")]


def words(chosen: Settings | SessionSettings, usual: Settings | SessionSettings) -> Iterator[str]:
    """The flags to type for the settings in which ``chosen`` differs from ``usual``: ``--height 576``."""
    for one in dataclasses.fields(chosen):
        value = getattr(chosen, one.name)
        if value != getattr(usual, one.name) and type_of(one) in (int, float, str):
            yield f"{flag_of(one)} {value:g}" if isinstance(value, float) else f"{flag_of(one)} {value}"
