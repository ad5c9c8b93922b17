"""A complete source folder in miniature: checkpoint, distilled LoRA, upsampler and text encoder, no torch involved.

The checkpoint's tensors are not listed here: its config is, and names and shapes follow from it. Numbers are random
from a seed. ``make_source`` writes the folder; ``Tiny`` lets a test change one thing before it is written.
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltxpack.demo import checkpoint
from ltxpack.demo.checkpoint import blocks
from ltxpack.ltx23.configs import upsampler_config
from ltxpack.ltx23.expected import inventory, published_files, source_inventory

Shape = tuple[int, ...]
CHECKPOINT = "ltx-2.3-mini-dev.safetensors"
LORA = "ltx-2.3-mini-distilled-lora-2.safetensors"
UPSAMPLER = "ltx-2.3-mini-spatial-upscaler-x2.safetensors"
NAMES = {"checkpoint": CHECKPOINT, "lora": LORA, "upsampler": UPSAMPLER}
GEMMA = "gemma"
GEMMA_WIDTH, GEMMA_LAYERS = 24, 2
GEMMA_TEXT = {
    "hidden_size": GEMMA_WIDTH, "num_hidden_layers": GEMMA_LAYERS, "vocab_size": 32, "intermediate_size": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
}  # fmt: skip

OPTIONAL = ("attention_type", "cross_attention_norm", "double_self_attention", "only_cross_attention", "share_ff",
            "use_linear_projection", "num_vector_embeds")  # fmt: skip

# The published configs in tiny widths, and without the fields that a checkpoint may leave out.
CONFIG: dict[str, Any] = published_files()["checkpoint"]
UPSAMPLER_CONFIG = {**published_files()["upsampler"], "in_channels": 16, "mid_channels": 32, "num_blocks_per_stage": 1}
CONFIG["transformer"] = {name: value for name, value in CONFIG["transformer"].items() if name not in OPTIONAL} | {
    "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24, "in_channels": 16,
    "out_channels": 16, "audio_num_attention_heads": 2, "audio_attention_head_dim": 6, "audio_cross_attention_dim": 12,
    "audio_in_channels": 8, "audio_out_channels": 8, "caption_channels": GEMMA_WIDTH, "connector_num_layers": 1,
    "connector_num_attention_heads": 4, "connector_attention_head_dim": 6, "audio_connector_num_attention_heads": 2,
    "audio_connector_attention_head_dim": 6,
}  # fmt: skip
CONFIG["vae"] |= {
    "latent_channels": 16, "encoder_base_channels": 16, "decoder_base_channels": 4,
    "encoder_blocks": blocks("res_x:1 compress_space_res:2 res_x:0 compress_time_res:1 res_x:1 "
                             "compress_all_res:1 res_x:0 compress_all_res:1 res_x:1"),
    "decoder_blocks": blocks("res_x:1 compress_space:2 res_x:2 compress_time:2 res_x:0 "
                             "compress_all:1 res_x:1 compress_all:2 res_x:1"),
}  # fmt: skip
CONFIG["audio_vae"]["model"]["params"]["ddconfig"] |= {
    "ch": 8, "ch_mult": [1, 2, 1], "mel_bins": 16, "num_res_blocks": 1, "resolution": 64, "z_channels": 2,
}  # fmt: skip
CONFIG["audio_vae"]["preprocessing"]["mel"]["n_mel_channels"] = 16
_RESBLOCKS = {"resblock_kernel_sizes": [3, 7], "resblock_dilation_sizes": [[1, 3], [1, 3]]}
CONFIG["vocoder"]["vocoder"] |= _RESBLOCKS | {
    "upsample_initial_channel": 16, "upsample_rates": [10, 16], "upsample_kernel_sizes": [20, 32],
}  # fmt: skip
CONFIG["vocoder"]["bwe"] |= _RESBLOCKS | {
    "upsample_initial_channel": 8, "upsample_rates": [10, 24], "upsample_kernel_sizes": [20, 48],
    "n_fft": 64, "win_size": 64, "num_mels": 16,
}  # fmt: skip


def tensor_shapes(config: Mapping[str, Any], registers: int = 128, factor: int = GEMMA_LAYERS + 1) -> dict[str, Shape]:
    """The tensors of a checkpoint with ``config``, under its own names; ``factor``: hidden states per token."""
    return checkpoint.checkpoint_shapes(config, registers=registers, states=factor)


@dataclass
class Tiny:
    """What is about to be written; every part may be changed."""

    config: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(CONFIG))
    metadata: dict[str, str] = field(default_factory=lambda: {"model_version": "2.3.0", "license": "none, random"})
    upsampler_config: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(UPSAMPLER_CONFIG))
    dtypes: Callable[[str], str] = lambda name: "BF16"
    upsampler_dtype: str = "BF16"
    shapes: dict[str, Shape] | None = None
    gemma: dict[str, Any] = field(default_factory=lambda: {"model_type": "gemma3"})
    seed: int = 0

    def write(self, folder: Path) -> Path:
        """Write the source into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        shapes = self.shapes if self.shapes is not None else tensor_shapes(self.config)
        metadata = {"config": json.dumps(self.config), **self.metadata}
        write_tensors(folder / CHECKPOINT, shapes, metadata, self.seed, self.dtypes)
        upsampled = source_inventory("latent_upsampler", upsampler_config(UPSAMPLER_CONFIG, 16, "upsampler"))
        config = {"config": json.dumps(self.upsampler_config)}
        write_tensors(folder / UPSAMPLER, upsampled, config, self.seed, lambda name: self.upsampler_dtype)
        write_tensors(folder / LORA, lora_shapes(shapes), {"model_version": "2.3.0"}, self.seed)
        write_gemma(folder / GEMMA, self.gemma, self.seed)
        return folder


def make_source(folder: Path, **changes: Any) -> Path:
    """A source folder; ``changes`` are fields of Tiny. Without any it is a copy of one that is made once."""
    if changes:
        return Tiny(**changes).write(folder)
    return Path(shutil.copytree(_template().name, folder, dirs_exist_ok=True))


@functools.cache
def _template() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    Tiny().write(Path(folder.name))
    return folder


def f32_tables(name: str) -> str:
    """The dtypes of the published checkpoint: modulation tables in F32, the rest BF16."""
    return "F32" if name.startswith("model.diffusion_model.") and "scale_shift_table" in name else "BF16"


def lora_shapes(shapes: Mapping[str, Shape], rank: int = 2) -> dict[str, Shape]:
    """A LoRA on the self-attention of the first block."""
    root = "model.diffusion_model.transformer_blocks.0.attn1.to_q"
    rows, columns = shapes.get(f"{root}.weight", (24, 24))
    module = root.removeprefix("model.")
    return {f"{module}.lora_A.weight": (rank, columns), f"{module}.lora_B.weight": (rows, rank)}


def write_tensors(
    path: Path,
    shapes: Mapping[str, Shape],
    metadata: Mapping[str, str],
    seed: int = 0,
    dtypes: Callable[[str], str] = lambda name: "BF16",
) -> None:
    """A safetensors file of small random numbers, wider dtypes first as the library writes them.

    The numbers are BF16 ones whatever the dtype, and depend on the names and the seed alone.
    """
    path.unlink(missing_ok=True)
    ordered = {name: shapes[name] for name in sorted(shapes, key=lambda name: (dtypes(name) != "F32", name))}
    checkpoint.write_tensors(path, ordered, metadata, functools.partial(_small, seed), dtypes)


@functools.cache
def _small(seed: int, name: str, shape: Shape) -> Any:
    return 0.05 * checkpoint.normal(f"{seed} {name}", shape)


def write_gemma(folder: Path, config: Mapping[str, Any], seed: int) -> None:
    """A text encoder's folder: weights of a whole language model, index, configs, and a tokenizer in name only."""
    folder.mkdir(exist_ok=True)
    text = {"text_config": GEMMA_TEXT, **config}
    shapes = inventory("text_encoder", text)
    table = "language_model.model.embed_tokens.weight"
    shards = {
        "model-00001-of-00002.safetensors": {table: shapes.pop(table)},
        "model-00002-of-00002.safetensors": shapes,
    }
    for name, own in shards.items():
        write_tensors(folder / name, own, {"format": "pt"}, seed)
    weight_map = {tensor: name for name, own in shards.items() for tensor in own}
    documents: dict[str, Any] = {
        "config.json": text,
        "generation_config.json": {"do_sample": True},
        "tokenizer.json": {"version": "1.0"},
        "tokenizer_config.json": {"model_max_length": 10**30, "tokenizer_class": "GemmaTokenizer"},
        "processor_config.json": {"processor_class": "Gemma3Processor"},
        "preprocessor_config.json": {"do_resize": True},
        "special_tokens_map.json": {"bos_token": "<bos>", "eos_token": "<eos>"},
        "model.safetensors.index.json": {"metadata": {"total_size": 1}, "weight_map": weight_map},
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    # What must never enter an overlay.
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "tokenizer.model").write_bytes(b"\x0a")
    (folder / "README.md").write_text("text")
