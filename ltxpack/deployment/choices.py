"""The choices of the deployment page: the machines, videos and forms of its grid, in the order of the page.

An earlier choice limits the later ones. Sizes are multiples of 64, which every recipe takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ltxpack.manifest import BF16, FP8, INT8
from ltxpack.runtime.sampling.recipes import DISTILLED, HQ, ONE_STAGE, TWO_STAGE
from ltxpack.runtime.settings import Settings

GB = 10**9
# Memory in GB -> cards that have it.
CARDS = {
    12: "RTX 3060, RTX 4070",
    16: "RTX 4080, RTX 5080",
    24: "RTX 3090, RTX 4090, L4",
    32: "RTX 5090",
    48: "RTX A6000, L40S",
    80: "A100, H100",
    96: "RTX PRO 6000",
    141: "H200",
    180: "B200",
}
HOSTS = (32, 64, 128, 256)
# Numbers of cards that make a video together, each with a process (``--devices``).
DEVICES = (1, 2, 4)
RECIPES = {
    HQ.name: "the best picture",
    DISTILLED.name: "speed",
    TWO_STAGE.name: "the official default",
    ONE_STAGE.name: "trying a prompt",
}
FORMS = {
    BF16: "the official result",
    FP8: "about half the bytes, for cards from SM 8.9 (RTX 40, H100)",
    INT8: "about half the bytes, for older cards too, from SM 7.5",
}
SIZES = ((512, 768), (704, 1280), (1024, 1536), (1088, 1920))
FRAMES = (49, 121, 241, 481)
# Examples of a user's own LoRAs with their strengths, in the order of the stack.
LORAS = (("lora-1.safetensors", 0.8), ("lora-2.safetensors", 0.6), ("lora-3.safetensors", 0.4))


@dataclass(frozen=True)
class Choice:
    """A choice: label of each option -> the note beside it. The page begins with the option ``first``."""

    name: str
    legend: str
    options: Mapping[str, str]
    first: str


def choices() -> tuple[Choice, ...]:
    """All choices, in the order of the page."""
    fps, usual = Settings.fps, Settings.of({})
    sizes = {size_label(size): "" for size in SIZES}
    frames = {f"{count}": f"{count / fps:.0f} s" for count in FRAMES}
    loras = {f"{count or 'none'}": "" for count in range(len(LORAS) + 1)}
    return (
        Choice("card", "Card", {f"{size} GB": sold for size, sold in CARDS.items()}, "24 GB"),
        Choice("host", "Host memory", {f"{size} GB": "" for size in HOSTS}, "64 GB"),
        Choice("recipe", "Recipe", RECIPES, usual.recipe),
        Choice("devices", "Number of cards", {f"{count}": "" for count in DEVICES}, "1"),
        Choice("form", "Weights", FORMS, BF16),
        Choice("size", "Size, height × width", sizes, size_label((usual.height, usual.width))),
        Choice("frames", f"Frames, at {fps:g} a second", frames, f"{usual.num_frames}"),
        Choice("loras", "LoRAs of your own", loras, "none"),
    )


def size_label(size: tuple[int, int]) -> str:
    """``1088×1920``."""
    return "{}×{}".format(*size)
