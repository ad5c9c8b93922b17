"""Recognises the model for which a LoRA says it was made, by the names that trainers write. Untrusted."""

from __future__ import annotations

import re

from ltxpack.ltx23.releases import SUPPORTED, parse_version

SUPPORTED_BASE = "LTX-" + ".".join(map(str, SUPPORTED))
LONGEST = 300

# 22b, 19b: sizes, not versions.
_SIZE = re.compile(r"(?<![\d.])\d+(?:\.\d+)?b(?![a-z0-9])")
_LTX = re.compile(r"(?<![a-z])ltx(?P<video>[-_ ]?video|v)?[-_ .]*v?(?P<major>\d+)?(?:[._-](?P<minor>\d+))?")
# Words that name other models, each alone or before a number.
_OTHERS = {
    "Wan": r"wan(?:[-_ ]?(?:ai|video))?", "Flux": r"flux", "Hunyuan": r"hunyuan(?:[-_ ]?video)?",
    "Stable Diffusion": r"sdxl|sd|stable[-_ ]?diffusion|illustrious|pony", "Qwen": r"qwen(?:[-_ ]?(?:vl|image))?",
    "Z-Image": r"z[-_ ]?image", "CogVideo": r"cogvideox?", "Mochi": r"mochi", "PixArt": r"pixart", "Sana": r"sana",
    "Chroma": r"chroma", "HiDream": r"hidream", "Lumina": r"lumina", "Kolors": r"kolors", "Cosmos": r"cosmos",
    "Kandinsky": r"kandinsky", "FramePack": r"framepack", "SkyReels": r"skyreels", "AuraFlow": r"auraflow",
    "Gemma": r"gemma", "Llama": r"llama", "Mistral": r"mistral",
}  # fmt: skip
_FAMILIES = [(name, re.compile(rf"(?<![a-z])(?:{words})(?![a-z])")) for name, words in _OTHERS.items()]
# The first folder of a name that is a path of the trainer's machine.
_PLACES = ("models", "model", "checkpoints", "ckpts", "weights", "output", "outputs", "data", "pretrained")
_PATH = re.compile(r"[/~.]|[a-z]:[\\/]|.*\\|.*/.*/|.*\.(?:safetensors|ckpt|pt|pth|gguf)\Z", re.IGNORECASE | re.DOTALL)
_HUB = re.compile(r"(?:hf://|https?://(?:www\.)?huggingface\.co/)", re.IGNORECASE)


def named_base(field: str, value: str) -> str | None:
    """The model that a field names, such as LTX-2.3, LTX-2 or Wan; None for an unknown name or a path."""
    text = _HUB.sub("", value.strip()[:LONGEST])
    if field == "model_version":
        return family(text) or _generation(parse_version(text.lstrip("vV")))
    if field.startswith("base_model") and (_PATH.match(text) or text.partition("/")[0].lower() in _PLACES):
        return None
    return family(text)


def family(text: str) -> str | None:
    """The model that a text names; None if it names none that is known here."""
    text = _SIZE.sub("", text.lower())
    found = [_generation_of(match) for match in _LTX.finditer(text)]
    if found:
        return next((name for name in found if name), None)
    return next((name for name, words in _FAMILIES if words.search(text)), None)


def _generation_of(match: re.Match[str]) -> str | None:
    major, minor = match["major"], match["minor"]
    if major is None:
        return "LTX-Video" if match["video"] else None
    if minor is None and len(major) == 2:  # ltx23
        major, minor = major[0], major[1]
    return _generation(parse_version(f"{major}.{minor or 0}"))


def _generation(version: tuple[int, ...]) -> str | None:
    """The model of a version; None for other numbers: some LoRAs count their own versions in that field, from 1 on."""
    major, minor = (*version, 0, 0)[:2]
    if (major, minor) == (0, 9):
        return "LTX-Video"
    return f"LTX-{major}" + (f".{minor}" if minor else "") if major == SUPPORTED[0] else None
