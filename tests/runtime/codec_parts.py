"""Component configs and folders (config.json and weights) made from a golden fixture's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file

from ltxpack.ltx23.configs import checkpoint_configs, upsampler_config
from ltxpack.ltx23.renames import CHECKPOINT_TABLES, LATENT_UPSAMPLER, RenameTable
from ltxpack.runtime.codecs.tiles import DecoderSizes

if TYPE_CHECKING:
    from diffusers import AutoencoderKLLTX2Video

CODECS = ("vae", "audio_vae", "vocoder")


def checkpoint_of(golden: Path) -> Path:
    """The all-in-one checkpoint of a fixture."""
    (path,) = golden.glob("*dev*.safetensors")
    return path


def golden_configs(golden: Path) -> dict[str, dict[str, Any]]:
    """The diffusers config of every component of a fixture, as ``materialize`` writes it."""
    checkpoint = checkpoint_of(golden)
    return checkpoint_configs(*_header(checkpoint), checkpoint)


def write_codecs(folder: Path, golden: Path) -> Path:
    """The four codec components of ``golden`` as ``folder/{vae,audio_vae,vocoder,latent_upsampler}``."""
    (upsampler,) = golden.glob("*upscaler*.safetensors")
    configs = golden_configs(golden)
    for name in CODECS:
        write_component(folder / name, checkpoint_of(golden), CHECKPOINT_TABLES[name], configs[name])
    config = upsampler_config(_header(upsampler)[0], configs["vae"]["latent_channels"], upsampler)
    write_component(folder / "latent_upsampler", upsampler, LATENT_UPSAMPLER, config)
    return folder


def write_component(folder: Path, source: Path, table: RenameTable, config: dict[str, Any]) -> None:
    """``config`` and the tensors of ``source`` that ``table`` renames."""
    folder.mkdir(parents=True)
    with safe_open(source, "pt") as file:
        names = [name for name in list(file.keys()) if table.source_root(name) is not None]
        tensors = {table.rename(name): file.get_tensor(name) for name in names}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def _header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    with safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
        return json.loads(file.metadata()["config"]), shapes


def decoder_sizes(vae: AutoencoderKLLTX2Video) -> DecoderSizes:
    """What the memory of a tile follows, from the decoder's own configuration."""
    config, temporal, spatial = vae.config, vae.temporal_compression_ratio, vae.spatial_compression_ratio
    return DecoderSizes(
        width=config.decoder_block_out_channels[0] // config.upsample_factor[0],
        places=temporal * (spatial // config.patch_size) ** 2,
        values=temporal * spatial**2 * config.out_channels,
    )
