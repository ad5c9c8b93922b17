"""Makes checkpoints with made-up weights for the demo, the tests and the benchmarks.

Every file has the official layout: names and shapes follow from a config, the published one with other widths and
depths. The demo's numbers follow from a tensor's name and keep activations near one. Knows nothing of overlays; only
the text encoder imports torch.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ltxpack.files.publish import Temporary, atomic_write
from ltxpack.files.tensorfile import build_header, tensor_nbytes
from ltxpack.imports import uncollected
from ltxpack.ltx23.configs import Shapes, checkpoint_configs, upsampler_config
from ltxpack.ltx23.expected import published_files, source_inventory
from ltxpack.ltx23.renames import CHECKPOINT_TABLES, component_of
from ltxpack.repack.items import round_to_bfloat16

# What the names of the inputs begin with.
NAME, ENCODER = "ltx-2.3-demo", "gemma"
RANK = 8
VERSION = {"model_version": "2.3.0"}
Entries = Iterable[tuple[str, str, tuple[int, ...]]]

# Published Gemma 3 files still have the key roots of an older transformers.
GEMMA_ROOTS = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


TEXT_WIDTH, TEXT_LAYERS = 32, 4
REGISTERS = 128


@dataclass(frozen=True)
class StreamWidths:
    """Attention heads and channels per head of the transformer's video and audio stream."""

    heads: int
    head_dim: int
    audio_head_dim: int


DEMO = StreamWidths(heads=4, head_dim=16, audio_head_dim=8)
PUBLISHED = StreamWidths(heads=32, head_dim=128, audio_head_dim=64)


def blocks(text: str) -> list[list[Any]]:
    """``res_x:1 compress_space:2`` as the official lists spell it."""
    pairs = (word.split(":") for word in text.split())
    return [[kind, {"num_layers" if kind == "res_x" else "multiplier": int(count)}] for kind, count in pairs]


def checkpoint_config(widths: StreamWidths = DEMO, layers: int = 2, connector_layers: int = 2) -> dict[str, Any]:
    """The official config of a checkpoint with this transformer; all other components have the smallest sizes."""
    config: dict[str, Any] = published_files()["checkpoint"]
    config["transformer"].update(caption_channels=TEXT_WIDTH, num_layers=layers, connector_num_layers=connector_layers)
    for prefix, head_dim in (("", widths.head_dim), ("audio_", widths.audio_head_dim)):
        config["transformer"].update(
            {
                f"{prefix}num_attention_heads": widths.heads,
                f"{prefix}attention_head_dim": head_dim,
                f"{prefix}cross_attention_dim": widths.heads * head_dim,
                f"{prefix}connector_num_attention_heads": widths.heads,
                f"{prefix}connector_attention_head_dim": head_dim,
            }
        )
    config["vae"].update(
        decoder_base_channels=8,
        decoder_blocks=blocks(
            "res_x:1 compress_space:2 res_x:1 compress_time:2 res_x:1 compress_all:1 res_x:1 compress_all:2 res_x:1"
        ),
        encoder_blocks=blocks(
            "res_x:1 compress_space_res:1 res_x:0 compress_time_res:1 res_x:0 "
            "compress_all_res:1 res_x:0 compress_all_res:1 res_x:1"
        ),
    )
    config["audio_vae"]["model"]["params"]["ddconfig"].update(ch_mult=[1, 1, 1], num_res_blocks=1)
    for generator in ("vocoder", "bwe"):
        config["vocoder"][generator].update(
            upsample_initial_channel=64, resblock_kernel_sizes=[3, 5], resblock_dilation_sizes=[[1, 3], [1]]
        )
    return config


UPSAMPLER: dict[str, Any] = {**published_files()["upsampler"], "mid_channels": 32, "num_blocks_per_stage": 1}
GEMMA: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "dtype": "bfloat16",
    "boi_token_index": 7, "eoi_token_index": 8, "image_token_index": 9, "eos_token_id": [1, 6],
    "initializer_range": 0.02, "mm_tokens_per_image": 4,
    "text_config": {
        "model_type": "gemma3_text", "vocab_size": 272, "pad_token_id": 0, "max_position_embeddings": 131072,
        "hidden_size": TEXT_WIDTH, "intermediate_size": 64, "num_hidden_layers": TEXT_LAYERS, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": False, "query_pre_attn_scalar": 8,
        "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
        "sliding_window": 16, "sliding_window_pattern": 2, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "vision_config": {
        "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7, "hidden_size": 16,
        "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    },
}  # fmt: skip
SPECIAL_TOKENS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
)


def write_source(folder: Path) -> None:
    """Write the demo's four inputs of ``materialize`` to ``folder``; keeps existing files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = checkpoint_config()
    shapes = checkpoint_shapes(config)
    write_tensors(folder / f"{NAME}-dev.safetensors", shapes, checkpoint_metadata(config))
    factors = lora_shapes(shapes, RANK)
    write_tensors(folder / f"{NAME}-distilled-lora-{RANK}.safetensors", factors, VERSION, values=_factor)
    upsampler = source_inventory("latent_upsampler", upsampler_config(UPSAMPLER, 128, NAME))
    write_tensors(folder / f"{NAME}-spatial-upscaler-x2.safetensors", upsampler, {"config": json.dumps(UPSAMPLER)})
    _write_gemma(folder / ENCODER)


def checkpoint_metadata(config: Mapping[str, Any]) -> dict[str, str]:
    return {"config": json.dumps(config), **VERSION, "license": "random weights, no licence"}


def checkpoint_shapes(
    config: Mapping[str, Any], *, registers: int = REGISTERS, states: int = TEXT_LAYERS + 1
) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint with ``config`` under its official name.

    ``registers`` and ``states`` (hidden states per text token) are stated only by shapes in a checkpoint.
    """
    transformer = config["transformer"]
    stated: dict[str, tuple[int, ...]] = {}
    for stream, prefix in (("video", ""), ("audio", "audio_")):
        width = transformer[f"{prefix}cross_attention_dim"]
        projection = f"text_embedding_projection.{stream}_aggregate_embed.weight"
        stated[projection] = (width, transformer["caption_channels"] * states)
        stated[f"model.diffusion_model.{stream}_embeddings_connector.learnable_registers"] = (registers, width)
    configs = checkpoint_configs(config, stated, NAME)
    return {
        name: shape
        for component in CHECKPOINT_TABLES
        for name, shape in source_inventory(component, configs[component]).items()
    }


def lora_shapes(shapes: Shapes, rank: int) -> dict[str, tuple[int, ...]]:
    """Both factors for every linear of a checkpoint's transformer, as the distilled LoRA has them."""
    factors: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if component_of(name) == "transformer" and len(shape) == 2 and name.endswith(".weight"):
            module = name.removeprefix("model.").removesuffix(".weight")
            own = min(rank, *shape)
            factors[f"{module}.lora_A.weight"] = (own, shape[1])
            factors[f"{module}.lora_B.weight"] = (shape[0], own)
    return factors


Values = Callable[[str, tuple[int, ...]], NDArray[np.float32]]


def write_tensors(
    path: Path,
    shapes: Shapes,
    metadata: Mapping[str, str],
    values: Values | None = None,
    dtypes: Callable[[str], str] = lambda name: "BF16",
) -> None:
    """Write a safetensors file, whole or not at all; keeps an existing one.

    ``values`` gives the numbers of a tensor. They are rounded to bfloat16, also where F32 stores them; other dtypes
    than these two store zeros.
    """
    if path.exists():
        return
    entries = [(name, dtypes(name), shape) for name, shape in shapes.items()]
    make = values or _values
    write_payload(path, entries, metadata, (_stored(make(name, shape), dtype) for name, dtype, shape in entries))


def write_payload(path: Path, entries: Entries, metadata: Mapping[str, str], payload: Iterable[Any]) -> None:
    """A safetensors file of ``entries`` with ``payload``, its bytes in parts of any length."""
    with Temporary(path) as temporary, temporary.open("wb") as file:
        file.write(build_header(entries, metadata))
        for part in payload:
            file.write(part)


def _factor(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A factor of the demo's LoRA, from the module's name."""
    module, _, which = name.removesuffix(".weight").rpartition(".lora_")
    gain = 1.0 if which == "A" else 0.3
    return gain * normal(f"{module}.{which}", shape) / math.sqrt(shape[1])


def _values(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Weights that keep activations near one, from the tensor's name; other tensors get their real values."""
    last = name.rsplit(".", 1)[-1]
    real = REAL_VALUES.get(last)
    if real is not None:
        return real(shape)
    noise = normal(name, shape)
    if "std-of-means" in name:
        return (1 + 0.2 * np.abs(noise)).astype(np.float32)
    if last in ("learnable_registers", "alpha", "beta") or "scale_shift_table" in name or "mean-of-means" in name:
        return noise if last == "learnable_registers" else 0.2 * noise
    if len(shape) == 1:
        centre = 1.0 if "norm" in name and last == "weight" and "layernorm" not in name else 0.0
        return centre + 0.05 * noise
    fan_in = 2 * shape[0] if ".ups." in name else math.prod(shape[1:])
    # Random vocoders are loud; this last layer keeps the sound below the clamp.
    gain = 0.003 if "conv_post" in name else 1.0
    return noise * np.float32(gain / math.sqrt(fan_in))


def normal(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal numbers that follow from ``name``."""
    generator = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
    return generator.standard_normal(shape, dtype=np.float32)


def _low_pass(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The anti-aliasing filter of a 2x resampler: a sinc cut at a quarter of the rate, in a Kaiser window."""
    taps = shape[-1]
    # Kaiser's formula for an attenuation over 50 dB, which 12 taps and more reach.
    beta = 0.1102 * (2.285 * (taps // 2 - 1) * math.pi * 4 * 0.3 + 7.95 - 8.7)
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
    with uncollected():
        import torch
        from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    folder.mkdir(exist_ok=True)
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(Gemma3Config.from_dict(GEMMA))
    shapes = {
        published + name.removeprefix(root): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        for root, published in GEMMA_ROOTS.items()
        if name.startswith(root)
    }
    write_tensors(folder / "model.safetensors", shapes, {"format": "pt"})
    documents = {
        "config.json": GEMMA,
        "generation_config.json": {"bos_token_id": 2, "eos_token_id": [1, 6], "pad_token_id": 0},
        "processor_config.json": {"image_seq_length": 4, "processor_class": "Gemma3Processor"},
    }
    for file, document in {**documents, **tokenizer_documents()}.items():
        atomic_write(folder / file, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())


def tokenizer_documents() -> dict[str, dict[str, Any]]:
    """The files of a byte-level tokenizer, by name."""
    settings = {
        "add_bos_token": True,
        "model_max_length": 10**30,
        "tokenizer_class": "GemmaTokenizer",
        **{f"{kind}_token": f"<{kind}>" for kind in ("bos", "eos", "pad", "unk")},
    }
    return {"tokenizer.json": json.loads(_tokenizer()), "tokenizer_config.json": settings}


def _tokenizer() -> str:
    """A BPE tokenizer without merges, as JSON: every byte is a token of its own, after the special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    begin = ("<bos>", vocabulary["<bos>"])
    made.post_processor = processors.TemplateProcessing("<bos> $A", "$A $B:1", [begin])
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return str(made.to_str())


def _stored(values: NDArray[np.float32], dtype: str) -> bytes:
    """The bytes of ``values`` rounded to bfloat16, to nearest even."""
    rounded = round_to_bfloat16(np.atleast_1d(values))
    if dtype == "BF16":
        return rounded.tobytes()
    return (rounded.astype("<u4") << 16).tobytes() if dtype == "F32" else bytes(tensor_nbytes(dtype, values.shape))
