"""Makes diffusers configs from the checkpoint's own metadata. Knows no particular model's size.

The tables are in config_tables.py. This module applies them, derives fields that need a formula (spec 01, section 5),
and checks that the sections agree. It gathers all faults, and one error names them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from ltxpack.errors import UnsupportedError
from ltxpack.ltx23 import config_tables as tables
from ltxpack.ltx23.classes import (
    ABSENT_COMPONENTS,
    AUDIO_FACTOR,
    COMPONENTS,
    DIFFUSERS_VERSION,
    PIPELINE_CLASS,
    SPATIAL_FACTOR,
    TEMPORAL_FACTOR,
    TEXT_TOKENS,
)
from ltxpack.ltx23.fields import ABSENT, Blocks, UnfitError, apply_table, flatten

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]

NEXT_RELEASE = "ltxpack inspect FILE (shows what the file is; this version converts LTX-2.3)"


def checkpoint_configs(config: Mapping[str, Any], shapes: Shapes, file: object) -> dict[str, Config]:
    """The diffusers config of every component in the all-in-one checkpoint.

    ``config`` is the decoded ``config`` metadata. ``shapes`` are the checkpoint's tensor shapes, which alone state the
    text projections' widths and the number of registers. Raises UnsupportedError naming every field that this version
    does not convert.
    """
    problems = [
        UnfitError(section, "no such section (unknown to this version)", config[section])
        for section in sorted(config.keys() - tables.SECTIONS.keys() - tables.SECTIONS_WITHOUT_EFFECT)
    ]
    parts = {name: dict(constants) for name, constants in tables.CONSTANTS.items()}
    for section, table in tables.SECTIONS.items():
        content = config.get(section, ABSENT)
        if not isinstance(content, Mapping):
            problems.append(UnfitError(section, "a section of fields", content))
            continue
        for target, value in apply_table(section, content, table, problems).items():
            component, field = target.split(".")
            parts[component][field] = value
    _refuse(problems, file)
    _derive_transformer(parts["transformer"])
    problems += _derive_connectors(parts["connectors"], shapes)
    _derive_vae(parts["vae"])
    parts["vocoder"]["in_channels"] = 2 * parts["audio_vae"]["mel_bins"]
    parts["vocoder"]["bwe_in_channels"] = 2 * parts["vocoder"]["num_mel_channels"]
    _refuse(problems, file)
    of = {f"{name}.{field}": value for name, part in parts.items() for field, value in part.items()}
    official = flatten(config)
    problems += [
        UnfitError(name, expected, official.get(name, ABSENT))
        for name, expected, holds in (*_width_agreements(of), *_codec_agreements(of), *_bandwidth_agreements(of))
        if not holds
    ]
    _refuse(problems, file)
    return {name: _finished(name, part) for name, part in parts.items()}


def upsampler_config(config: Mapping[str, Any], latent_channels: int | None, file: object) -> Config:
    """The config of the latent upsampler from its own file's metadata. Raises UnsupportedError.

    ``latent_channels`` is the number of channels of the checkpoint's latents; None if unknown.
    """
    problems: list[UnfitError] = []
    taken = apply_table("config", config, tables.UPSAMPLER, problems)
    _refuse(problems, file, what="is not a spatial x2 upsampler of LTX-2.3")
    part = {target.split(".")[1]: value for target, value in taken.items()}
    channels, width = part["in_channels"], part["mid_channels"]
    if latent_channels not in (None, channels):
        problems.append(UnfitError("config.in_channels", f"{latent_channels} (vae.latent_channels)", channels))
    if width % 32:
        problems.append(UnfitError("config.mid_channels", "a multiple of 32", width))
    _refuse(problems, file, what="does not fit this checkpoint")
    return _finished("latent_upsampler", part)


def scheduler_config(distilled: bool) -> Config:
    """diffusers' scheduler config; the two-stage recipe does not use it (spec 01, section 5)."""
    return _finished("scheduler", tables.SCHEDULER_DISTILLED if distilled else tables.SCHEDULER_BASE)


def model_index() -> Config:
    """``model_index.json``, so that ``diffusers.LTX2Pipeline.from_pretrained`` loads the overlay."""
    index: Config = {"_class_name": PIPELINE_CLASS, "_diffusers_version": DIFFUSERS_VERSION}
    for name, component in COMPONENTS.items():
        if component.index_library is not None:
            index[name] = [component.index_library, component.name]
    index.update({name: [None, None] for name in ABSENT_COMPONENTS})
    return index


def json_bytes(document: Any) -> bytes:
    """A JSON file's bytes: the same document always gives the same bytes."""
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def _derive_transformer(part: Config) -> None:
    frames, height, width = part["_max_pos"]
    part.update(
        pos_embed_max_pos=frames,
        base_height=height,
        base_width=width,
        audio_pos_embed_max_pos=part["_audio_max_pos"][0],
        vae_scale_factors=[TEMPORAL_FACTOR, SPATIAL_FACTOR, SPATIAL_FACTOR],
    )


def _derive_connectors(part: Config, shapes: Shapes) -> Iterator[UnfitError]:
    """Only the tensors state the widths of the text projections and the numbers of registers."""
    caption, factors = part["caption_channels"], set()
    for stream in ("video", "audio"):
        projection = f"text_embedding_projection.{stream}_aggregate_embed.weight"
        registers = f"model.diffusion_model.{stream}_embeddings_connector.learnable_registers"
        for name in (projection, registers):
            if len(shapes.get(name, ())) != 2:
                yield UnfitError(name, "a tensor of two dimensions", shapes.get(name, ABSENT))
                return
        out_features, in_features = shapes[projection]
        if in_features % caption:
            yield UnfitError(projection, f"a multiple of {caption} (caption_channels) columns", shapes[projection])
        factors.add(in_features // caption)
        rows = shapes[registers][0]
        if rows < 1 or TEXT_TOKENS % rows:
            yield UnfitError(registers, f"a number of rows that divides {TEXT_TOKENS}", shapes[registers])
        part[f"{stream}_hidden_dim"] = out_features
        part[f"{stream}_connector_num_learnable_registers"] = rows
    if len(factors) > 1:
        yield UnfitError("text_embedding_projection", "video and audio projections of one input width", sorted(factors))
    part["text_proj_in_factor"] = min(factors)
    part["audio_connector_num_layers"] = part["_audio_layers"] or part["video_connector_num_layers"]
    part["connector_rope_base_seq_len"] = part["_max_pos"][0]


def _derive_vae(part: Config) -> None:
    encoder: Blocks = part["_encoder"]
    decoder: Blocks = part["_decoder"]
    count = len(encoder.kinds)
    part.update(
        block_out_channels=_cumulative(part["_encoder_base"], encoder.multipliers),
        decoder_block_out_channels=_cumulative(part["_decoder_base"], decoder.multipliers),
        down_block_types=["LTX2VideoDownBlock3D"] * count,
        layers_per_block=list(encoder.layers),
        decoder_layers_per_block=list(decoder.layers),
        downsample_type=list(encoder.kinds),
        # The only list that starts at the latent end.
        upsample_type=list(reversed(decoder.kinds)),
        upsample_factor=list(decoder.multipliers),
        upsample_residual=[False] * count,
        spatio_temporal_scaling=[True] * count,
        decoder_spatio_temporal_scaling=[True] * count,
        decoder_inject_noise=[False] * (count + 1),
        spatial_compression_ratio=SPATIAL_FACTOR,
        temporal_compression_ratio=TEMPORAL_FACTOR,
    )


def _cumulative(base: int, multipliers: tuple[int, ...]) -> list[int]:
    return [base * math.prod(multipliers[: i + 1]) for i in range(len(multipliers))]


# Conditions between fields: (the official field to name, the expected value, whether the condition holds).
Agreements = Iterator[tuple[str, str, bool]]


def _width_agreements(of: Config) -> Agreements:
    for stream, prefix in (("video", ""), ("audio", "audio_")):
        inner = of[f"transformer.{prefix}num_attention_heads"] * of[f"transformer.{prefix}attention_head_dim"]
        context = of[f"transformer.{prefix}cross_attention_dim"]
        connector = of[f"connectors.{stream}_connector_num_attention_heads"]
        connector *= of[f"connectors.{stream}_connector_attention_head_dim"]
        field = f"transformer.{prefix}cross_attention_dim"
        yield field, f"{inner} (heads times head width)", context == inner
        yield field, f"{connector} (width of the {stream} connector)", context == connector
        projected = of[f"connectors.{stream}_hidden_dim"]
        yield field, f"{projected} (rows of the {stream} text projection)", context == projected
        for heads in (f"transformer.{prefix}", f"connectors.{stream}_connector_"):
            width = of[heads + "attention_head_dim"]
            yield f"transformer.{prefix}attention_head_dim", "an even number", width % 2 == 0
    yield "transformer.out_channels", "in_channels", of["transformer.out_channels"] == of["transformer.in_channels"]
    latent = of["vae.latent_channels"]
    yield "transformer.in_channels", f"{latent} (vae.latent_channels)", of["transformer.in_channels"] == latent
    sound = of["audio_vae.latent_channels"] * of["audio_vae.mel_bins"] // AUDIO_FACTOR
    for name in ("audio_in_channels", "audio_out_channels"):
        yield f"transformer.{name}", f"{sound} (latent channels times mel bins / 4)", of[f"transformer.{name}"] == sound
    base = of["audio_vae.base_channels"]
    yield "audio_vae.model.params.ddconfig.ch", f"{sound} (width of the audio latents)", base == sound


def _codec_agreements(of: Config) -> Agreements:
    base = of["vae._encoder_base"]
    yield "vae.encoder_base_channels", "latent_channels", base == of["vae.latent_channels"]
    for side in ("encoder", "decoder"):
        kinds = of[f"vae._{side}"].kinds
        spatial = of["vae.patch_size"] * 2 ** sum(kind != "temporal" for kind in kinds)
        temporal = 2 ** sum(kind != "spatial" for kind in kinds)
        wanted = f"{SPATIAL_FACTOR} times in space and {TEMPORAL_FACTOR} times in time"
        fits = (spatial, temporal) == (SPATIAL_FACTOR, TEMPORAL_FACTOR)
        yield f"vae.{side}_blocks", f"blocks that resample {wanted}", fits
    rate = of["audio_vae.sample_rate"]
    preprocessing = "audio_vae.preprocessing"
    yield f"{preprocessing}.audio.sampling_rate", f"{rate}", of["audio_vae._preprocessing_rate"] == rate
    bins = of["audio_vae.mel_bins"]
    yield f"{preprocessing}.mel.n_mel_channels", f"{bins} (mel_bins)", of["audio_vae._mel_channels"] == bins
    yield "vocoder.bwe.input_sampling_rate", f"{rate}", of["vocoder.input_sampling_rate"] == rate
    for section, prefix in (("vocoder", ""), ("bwe", "bwe_")):
        factors, kernels = of[f"vocoder.{prefix}upsample_factors"], of[f"vocoder.{prefix}upsample_kernel_sizes"]
        name = f"vocoder.{section}.upsample_kernel_sizes"
        yield name, f"{len(factors)} values (upsample_rates)", len(kernels) == len(factors)
        sizes, dilations = of[f"vocoder.{prefix}resnet_kernel_sizes"], of[f"vocoder.{prefix}resnet_dilations"]
        name = f"vocoder.{section}.resblock_dilation_sizes"
        yield name, f"{len(sizes)} lists (resblock_kernel_sizes)", len(dilations) == len(sizes)
        channels = of[f"vocoder.{prefix}hidden_channels"]
        name = f"vocoder.{section}.upsample_initial_channel"
        yield name, f"a number that {len(factors)} halvings leave whole", channels % 2 ** len(factors) == 0


def _bandwidth_agreements(of: Config) -> Agreements:
    low, high = of["vocoder.input_sampling_rate"], of["vocoder.output_sampling_rate"]
    yield "vocoder.bwe.output_sampling_rate", f"a multiple of {low}", high % low == 0
    rates, hop = math.prod(of["vocoder.bwe_upsample_factors"]), of["vocoder.hop_length"]
    yield "vocoder.bwe.upsample_rates", f"rates whose product is {hop * high // low}", rates == hop * (high // low)
    rates, hop = math.prod(of["vocoder.upsample_factors"]), of["audio_vae.mel_hop_length"]
    yield "vocoder.vocoder.upsample_rates", f"rates whose product is {hop} (stft.hop_length)", rates == hop


def _finished(component: str, part: Mapping[str, Any]) -> Config:
    config = {name: value for name, value in part.items() if not name.startswith("_")}
    return {"_class_name": COMPONENTS[component].name, "_diffusers_version": DIFFUSERS_VERSION, **config}


def _refuse(
    problems: list[UnfitError], file: object, what: str = "has a config that this version does not convert"
) -> None:
    refused = partial(UnsupportedError, file=str(file), next=NEXT_RELEASE)
    if len(problems) > 1:
        raise refused(what, items=problems)
    for one in problems:
        raise refused(f"{what}: {one.field}", expected=one.expected, found=one.found)
