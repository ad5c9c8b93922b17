"""The demo: a tiny checkpoint of the real architecture with random weights, taken through the whole path.

Nothing is downloaded. The checkpoint, LoRA, upsampler and text encoder are real files in the official layout, made
from a fixed seed, so ``materialize``, ``bake-lora`` and ``run`` treat them as they would the 22B model's.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ltxpack.demo.config import (
    AUDIO_HEAD_DIM,
    CONFIG,
    GEMMA,
    HEAD_DIM,
    HEADS,
    REGISTERS,
    SPECIAL_TOKENS,
    TEXT_LAYERS,
    TEXT_WIDTH,
    UPSAMPLER,
)
from ltxpack.errors import OverlayError
from ltxpack.files.publish import atomic_write
from ltxpack.files.tensorfile import build_header
from ltxpack.lora_bake import BakeOptions, bake
from ltxpack.ltx23.configs import Shapes, checkpoint_configs, upsampler_config
from ltxpack.ltx23.expected import source_inventory
from ltxpack.ltx23.renames import CHECKPOINT_TABLES, component_of
from ltxpack.materialize import Options, materialize
from ltxpack.reporter import Reporter

NAME = "ltx-2.3-demo"
RANK = 8
PROMPT = "A paper boat drifts down a rainy street while a street organ plays."

# Published Gemma 3 files still have the key roots of an older transformers.
GEMMA_ROOTS = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


def run_demo(folder: Path, reporter: Reporter) -> Path:
    """Source files, overlay, two bakes, one video; what is done already is kept. Returns the video's path.

    Raises OverlayError if ``folder`` holds something that is not a demo.
    """
    source, overlay = folder / "source", folder / "overlay"
    if folder.exists() and any(folder.iterdir()) and not source.is_dir():
        raise OverlayError(
            "is not empty and not a demo", file=folder, expected="a new folder", next="ltxpack demo OTHER_FOLDER"
        )
    reporter.note(f"1/4 tiny checkpoint of the real architecture: {source}")
    write_source(source)
    reporter.note(f"2/4 materialize: {overlay}")
    materialize(Options(str(source), overlay), reporter)
    reporter.note("3/4 bake-lora: strengths 0.25 and 0.5")
    bake(BakeOptions(overlay, (0.25, 0.5)), reporter)
    reporter.note("4/4 run")
    # The runtime imports torch; the steps before do without.
    from ltxpack.runtime.run import RunOptions, run_to_file
    from ltxpack.runtime.settings import SessionSettings

    options = RunOptions(
        overlay,
        PROMPT,
        output=folder / "video.mp4",
        save_tensors=folder / "video.safetensors",
        given={"height": 192, "width": 320, "num_frames": 25, "steps": 4},
        session=SessionSettings(device="cpu", dtype="float32", cache=False),
    )
    return run_to_file(options, reporter).output


def write_source(folder: Path) -> None:
    """The four inputs of ``materialize`` in ``folder``, file by file; those that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = checkpoint_shapes()
    _write_tensors(
        folder / f"{NAME}-dev.safetensors",
        {name: _values(name, shape) for name, shape in shapes.items()},
        {"config": json.dumps(CONFIG), "model_version": "2.3.0", "license": "random weights, no licence"},
    )
    _write_tensors(folder / f"{NAME}-distilled-lora-{RANK}.safetensors", _lora(shapes), {"model_version": "2.3.0"})
    upsampler = source_inventory("latent_upsampler", upsampler_config(UPSAMPLER, 128, NAME))
    _write_tensors(
        folder / f"{NAME}-spatial-upscaler-x2.safetensors",
        {name: _values(name, shape) for name, shape in upsampler.items()},
        {"config": json.dumps(UPSAMPLER)},
    )
    _write_gemma(folder / "gemma")


def checkpoint_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the demo's checkpoint under its official name."""
    factor = TEXT_WIDTH * (TEXT_LAYERS + 1)
    widths = {"video": HEADS * HEAD_DIM, "audio": HEADS * AUDIO_HEAD_DIM}
    stated: Shapes = {
        **{f"text_embedding_projection.{s}_aggregate_embed.weight": (w, factor) for s, w in widths.items()},
        **{
            f"model.diffusion_model.{s}_embeddings_connector.learnable_registers": (REGISTERS, w)
            for s, w in widths.items()
        },
    }
    configs = checkpoint_configs(CONFIG, stated, NAME)
    return {
        name: shape
        for component in CHECKPOINT_TABLES
        for name, shape in source_inventory(component, configs[component]).items()
    }


def _lora(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[np.float32]]:
    """A LoRA over every linear of the transformer, as the distilled one has."""
    factors: dict[str, NDArray[np.float32]] = {}
    for name, shape in shapes.items():
        if component_of(name) != "transformer" or len(shape) != 2 or not name.endswith(".weight"):
            continue
        module = name.removeprefix("model.").removesuffix(".weight")
        rank = min(RANK, *shape)
        factors[f"{module}.lora_A.weight"] = _normal(f"{module}.A", (rank, shape[1])) / math.sqrt(shape[1])
        factors[f"{module}.lora_B.weight"] = 0.3 * _normal(f"{module}.B", (shape[0], rank)) / math.sqrt(rank)
    return factors


def _values(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Weights that keep activations near one, from the tensor's name alone; what is no weight gets its real value."""
    last = name.rsplit(".", 1)[-1]
    real = REAL_VALUES.get(last)
    if real is not None:
        return real(shape)
    noise = _normal(name, shape)
    if "std-of-means" in name:
        return (1 + 0.2 * np.abs(noise)).astype(np.float32)
    if last in ("learnable_registers", "alpha", "beta") or "scale_shift_table" in name or "mean-of-means" in name:
        return noise if last == "learnable_registers" else 0.2 * noise
    if len(shape) == 1:
        centre = 1.0 if "norm" in name and last == "weight" and "layernorm" not in name else 0.0
        return centre + 0.05 * noise
    fan_in = 2 * shape[0] if ".ups." in name else math.prod(shape[1:])
    # Random vocoders are loud; their last layer keeps the sound off the clamp.
    gain = 0.003 if "conv_post" in name else 1.0
    return noise * np.float32(gain / math.sqrt(fan_in))


def _normal(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    generator = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
    return generator.standard_normal(shape, dtype=np.float32)


def _low_pass(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The anti-aliasing filter of a 2x resampler: a sinc cut at a quarter of the rate, in a Kaiser window."""
    taps = shape[-1]
    attenuation = 2.285 * (taps // 2 - 1) * math.pi * 4 * 0.3 + 7.95
    beta = 0.1102 * (attenuation - 8.7) if attenuation > 50 else 0.5842 * (attenuation - 21) ** 0.4
    beta += 0 if attenuation > 50 else 0.07886 * (attenuation - 21)
    time = np.arange(taps) - (taps - 1) / 2
    response = np.kaiser(taps, beta) * np.sinc(0.5 * time)
    return np.broadcast_to(response / response.sum(), shape).astype(np.float32)


def _fourier_basis(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Cosines over negative sines in a Hann window: a short-time Fourier transform as a convolution."""
    rows, _, window = shape
    angles = 2 * np.pi * np.outer(np.arange(rows // 2), np.arange(window)) / window
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    return (np.concatenate([np.cos(angles), -np.sin(angles)]) * hann).reshape(shape).astype(np.float32)


def _mel_basis(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Triangles evenly spaced in mel, 0 to 8 kHz, each of unit area."""
    bands, bins = shape
    top = 2595 * math.log10(1 + 8000 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    frequencies = np.linspace(0, 8000, bins)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.minimum((frequencies - low) / (middle - low), (high - frequencies) / (high - middle))
    return (np.maximum(triangles, 0) * 2 / (high - low)).astype(np.float32)


REAL_VALUES = {
    "filter": _low_pass,
    "forward_basis": _fourier_basis,
    "inverse_basis": _fourier_basis,
    "mel_basis": _mel_basis,
}


def _write_gemma(folder: Path) -> None:
    """A Gemma 3 folder as published: configs, a byte-level tokenizer, weights."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    folder.mkdir(exist_ok=True)
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(Gemma3Config.from_dict(GEMMA))
    tensors = {}
    for name, tensor in model.state_dict().items():
        root = next((root for root in GEMMA_ROOTS if name.startswith(root)), None)
        if root is not None:
            published = GEMMA_ROOTS[root] + name.removeprefix(root)
            tensors[published] = _values(published, tuple(tensor.shape))
    _write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    processor = {"image_seq_length": 4, "processor_class": "Gemma3Processor"}
    names = {kind: f"<{kind}>" for kind in ("bos", "eos", "pad", "unk")}
    settings = {
        "add_bos_token": True,
        "model_max_length": 10**30,
        "tokenizer_class": "GemmaTokenizer",
        **{f"{kind}_token": token for kind, token in names.items()},
    }
    for file, document in {
        "config.json": GEMMA,
        "generation_config.json": {"bos_token_id": 2, "eos_token_id": [1, 6], "pad_token_id": 0},
        "processor_config.json": processor,
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": settings,
    }.items():
        atomic_write(folder / file, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())


def _tokenizer() -> dict[str, Any]:
    """A BPE tokenizer without merges: every byte is a token of its own, after the special ones."""
    tokens = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **special} for i, token in enumerate(SPECIAL_TOKENS)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [],
        },
    }


def _write_tensors(path: Path, tensors: Mapping[str, NDArray[np.float32]], metadata: Mapping[str, str]) -> None:
    """A safetensors file in bfloat16, whole or not at all."""
    if path.exists():
        return
    header = build_header(((name, "BF16", values.shape) for name, values in tensors.items()), metadata)
    atomic_write(path, header + b"".join(_bfloat16(values) for values in tensors.values()))


def _bfloat16(values: NDArray[np.float32]) -> bytes:
    """Rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
