"""The tensors of a component, by name and shape, as a pure function of its diffusers config.

This is the module's ``state_dict`` without torch: parameters and persistent buffers. It finds missing, unknown and
misshapen tensors of a checkpoint before a byte is copied. With the reversed rename tables it gives the tensors of a
checkpoint of given sizes. Of the published model it has the configs too, for plans.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ltxpack.ltx23.classes import TEXT_ROOT
from ltxpack.ltx23.configs import checkpoint_configs, upsampler_config
from ltxpack.ltx23.renames import CHECKPOINT_TABLES, LATENT_UPSAMPLER

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]
Config = Mapping[str, Any]

# Width of the sinusoidal timestep embedding, the input of every AdaLN module.
TIMESTEP_WIDTH = 256
# Rows of the AdaLN modules' outputs, in widths of the stream (spec 06, section 9).
STREAM_ROWS, PROMPT_ROWS, CROSS_ROWS, GATE_ROWS = 9, 2, 4, 1
CROSS_TABLE_ROWS = CROSS_ROWS + GATE_ROWS
HEAD_ROWS = 2
FEED_FORWARD = 4
# Modulation tables are float32 in the published checkpoint, all other tensors bfloat16.
FLOAT32_TENSORS = "scale_shift_table"
# Vision tower and projector of the text encoder's files, as one tensor of their size: read to be hashed, not loaded.
VISION = ("vision_tower.all", "BF16", (421_290_864,))


def inventory(component: str, config: Config) -> dict[str, Shape]:
    """{tensor name: shape} of the diffusers module ``component`` with ``config``, sorted."""
    return dict(sorted(_INVENTORIES[component](config)))


def source_inventory(component: str, config: Config) -> dict[str, Shape]:
    """{tensor name: shape} of ``component`` under the checkpoint's own names."""
    table = LATENT_UPSAMPLER if component == "latent_upsampler" else CHECKPOINT_TABLES[component]
    back = table.reverse()
    return {back.rename(name): shape for name, shape in inventory(component, config).items()}


def transformer(config: Config) -> Named:
    """The DiT: two streams, ``num_layers`` blocks."""
    streams = [_StreamSizes(config, ""), _StreamSizes(config, "audio_")]
    for stream in streams:
        yield from _transformer_ends(stream)
    for layer in range(config["num_layers"]):
        yield from _under(f"transformer_blocks.{layer}", _transformer_block(*streams))


class _StreamSizes:
    """The widths of one stream of the DiT; ``prefix`` is the start of its module names."""

    def __init__(self, config: Config, prefix: str) -> None:
        self.prefix = prefix
        self.name = "audio" if prefix else "video"
        self.heads: int = config[f"{prefix}num_attention_heads"]
        self.width: int = self.heads * config[f"{prefix}attention_head_dim"]
        self.context: int = config[f"{prefix}cross_attention_dim"]
        self.channels: int = config[f"{prefix}in_channels"]
        self.gate = "av_cross_attn_audio_v2a_gate" if prefix else "av_cross_attn_video_a2v_gate"


def _transformer_ends(stream: _StreamSizes) -> Named:
    width, prefix = stream.width, stream.prefix
    yield from _linear(f"{prefix}proj_in", stream.channels, width)
    yield from _linear(f"{prefix}proj_out", width, stream.channels)
    yield f"{prefix}scale_shift_table", (HEAD_ROWS, width)
    yield from _adaln(f"{prefix}time_embed", width, STREAM_ROWS)
    yield from _adaln(f"{prefix}prompt_adaln", width, PROMPT_ROWS)
    yield from _adaln(f"av_cross_attn_{stream.name}_scale_shift", width, CROSS_ROWS)
    yield from _adaln(stream.gate, width, GATE_ROWS)


def _transformer_block(video: _StreamSizes, audio: _StreamSizes) -> Named:
    for stream in (video, audio):
        width, prefix = stream.width, stream.prefix
        yield from _under(f"{prefix}attn1", _attention(width, width, width, stream.heads))
        yield from _under(f"{prefix}attn2", _attention(width, stream.context, width, stream.heads))
        yield from _under(f"{prefix}ff", _feed_forward(width))
        yield f"{prefix}scale_shift_table", (STREAM_ROWS, width)
        yield f"{prefix}prompt_scale_shift_table", (PROMPT_ROWS, width)
        yield f"{stream.name}_a2v_cross_attn_scale_shift_table", (CROSS_TABLE_ROWS, width)
    # Both cross-modal attentions run with the audio stream's heads.
    inner, heads = audio.width, audio.heads
    yield from _under("audio_to_video_attn", _attention(video.width, audio.width, inner, heads))
    yield from _under("video_to_audio_attn", _attention(audio.width, video.width, inner, heads))


def connectors(config: Config) -> Named:
    """Per modality: the text projection and a small transformer with learnable registers."""
    for stream in ("video", "audio"):
        features = config["caption_channels"] * config["text_proj_in_factor"]
        yield from _linear(f"{stream}_text_proj_in", features, config[f"{stream}_hidden_dim"])
        connector = f"{stream}_connector"
        heads = config[f"{connector}_num_attention_heads"]
        width = heads * config[f"{connector}_attention_head_dim"]
        yield f"{connector}.learnable_registers", (config[f"{connector}_num_learnable_registers"], width)
        for layer in range(config[f"{connector}_num_layers"]):
            block = f"{connector}.transformer_blocks.{layer}"
            yield from _under(f"{block}.attn1", _attention(width, width, width, heads))
            yield from _under(f"{block}.ff", _feed_forward(width))


def vae(config: Config) -> Named:
    """The video VAE: encoder, decoder and the statistics of the latents."""
    return _codec(config["latent_channels"], _vae_encoder(config), _vae_decoder(config))


_RESAMPLED = {"spatial": 4, "temporal": 2, "spatiotemporal": 8}


def _vae_encoder(config: Config) -> Named:
    width = config["latent_channels"]
    yield from _conv("conv_in.conv", config["in_channels"] * config["patch_size"] ** 2, width, 3, 3)
    stages = zip(config["block_out_channels"], config["layers_per_block"], config["downsample_type"], strict=False)
    for stage, (out, layers, kind) in enumerate(stages):
        yield from _vae_resnets(f"down_blocks.{stage}", width, layers)
        yield from _conv(f"down_blocks.{stage}.downsamplers.0.conv.conv", width, out // _RESAMPLED[kind], 3, 3)
        width = out
    yield from _vae_resnets("mid_block", width, config["layers_per_block"][-1])
    # One channel more than the latent: the shared log variance.
    yield from _conv("conv_out.conv", width, config["latent_channels"] + 1, 3, 3)


def _vae_decoder(config: Config) -> Named:
    widths = list(reversed(config["decoder_block_out_channels"]))
    layers = list(reversed(config["decoder_layers_per_block"]))
    width = widths[0]
    yield from _conv("conv_in.conv", config["latent_channels"], width, 3, 3)
    yield from _vae_resnets("mid_block", width, layers[0])
    stages = zip(reversed(config["upsample_factor"]), config["upsample_type"], layers[1:], strict=True)
    for stage, (factor, kind, count) in enumerate(stages):
        yield from _conv(f"up_blocks.{stage}.upsamplers.0.conv.conv", width, width * _RESAMPLED[kind] // factor, 3, 3)
        width //= factor
        yield from _vae_resnets(f"up_blocks.{stage}", width, count)
    yield from _conv("conv_out.conv", width, config["out_channels"] * config["patch_size"] ** 2, 3, 3)


def _vae_resnets(prefix: str, width: int, count: int) -> Named:
    for layer, conv in itertools.product(range(count), ("conv1", "conv2")):
        yield from _conv(f"{prefix}.resnets.{layer}.{conv}.conv", width, width, 3, 3)


def audio_vae(config: Config) -> Named:
    """The audio VAE: encoder, decoder and the statistics of the latents."""
    return _codec(config["base_channels"], _audio_encoder(config), _audio_decoder(config))


def _audio_encoder(config: Config) -> Named:
    widths = [config["base_channels"] * multiplier for multiplier in config["ch_mult"]]
    width = config["base_channels"]
    yield from _conv("conv_in.conv", config["in_channels"], width, 2, 3)
    for level, out in enumerate(widths):
        for block in range(config["num_res_blocks"]):
            yield from _under(f"down.{level}.block.{block}", _audio_resnet(width, out))
            width = out
        if level < len(widths) - 1:
            yield from _conv(f"down.{level}.downsample.conv", width, width, 2, 3)
    yield from _audio_middle(width)
    yield from _conv("conv_out.conv", width, 2 * config["latent_channels"], 2, 3)


def _audio_decoder(config: Config) -> Named:
    widths = [config["base_channels"] * multiplier for multiplier in config["ch_mult"]]
    width = widths[-1]
    yield from _conv("conv_in.conv", config["latent_channels"], width, 2, 3)
    yield from _audio_middle(width)
    for level in reversed(range(len(widths))):
        for block in range(config["num_res_blocks"] + 1):
            yield from _under(f"up.{level}.block.{block}", _audio_resnet(width, widths[level]))
            width = widths[level]
        if level > 0:
            yield from _conv(f"up.{level}.upsample.conv.conv", width, width, 2, 3)
    yield from _conv("conv_out.conv", width, config["output_channels"], 2, 3)


def _audio_middle(width: int) -> Named:
    for block in ("mid.block_1", "mid.block_2"):
        yield from _under(block, _audio_resnet(width, width))


def _audio_resnet(width: int, out: int) -> Named:
    yield from _conv("conv1.conv", width, out, 2, 3)
    yield from _conv("conv2.conv", out, out, 2, 3)
    if width != out:
        yield from _conv("nin_shortcut.conv", width, out, 2, 1)


def vocoder(config: Config) -> Named:
    """Two generators (waveform, then bandwidth extension) and the stored bases of the STFT between them."""
    yield from _under("vocoder", _generator(config, ""))
    yield from _under("bwe_generator", _generator(config, "bwe_"))
    frequencies = config["filter_length"] // 2 + 1
    yield "mel_stft.mel_basis", (config["num_mel_channels"], frequencies)
    for basis in ("forward_basis", "inverse_basis"):
        yield f"mel_stft.stft_fn.{basis}", (2 * frequencies, 1, config["filter_length"])


def _generator(config: Config, prefix: str) -> Named:
    width = config[f"{prefix}hidden_channels"]
    taps = config[f"{prefix}antialias_kernel_size"]
    yield from _conv("conv_in", config[f"{prefix}in_channels"], width, 1, 7)
    sizes = list(zip(config[f"{prefix}resnet_kernel_sizes"], config[f"{prefix}resnet_dilations"], strict=True))
    for stage, kernel in enumerate(config[f"{prefix}upsample_kernel_sizes"]):
        # A transposed convolution stores its input width first.
        yield f"upsamplers.{stage}.weight", (width, width // 2, kernel)
        yield f"upsamplers.{stage}.bias", (width // 2,)
        width //= 2
        for position, (size, dilations) in enumerate(sizes):
            block = f"resnets.{stage * len(sizes) + position}"
            for half, layer in itertools.product((1, 2), range(len(dilations))):
                yield from _conv(f"{block}.convs{half}.{layer}", width, width, 1, size)
                yield from _under(f"{block}.acts{half}.{layer}", _antialiased_snake(width, taps))
    yield from _under("act_out", _antialiased_snake(width, taps))
    yield from _conv("conv_out", width, config[f"{prefix}out_channels"], 1, 7, bias=config[f"{prefix}final_bias"])


def _antialiased_snake(width: int, taps: int) -> Named:
    yield "act.alpha", (width,)
    yield "act.beta", (width,)
    yield "upsample.filter", (1, 1, taps)
    yield "downsample.filter", (1, 1, taps)


def latent_upsampler(config: Config) -> Named:
    """The spatial x2 upsampler of video latents."""
    width = config["mid_channels"]
    yield from _conv("initial_conv", config["in_channels"], width, 3, 3)
    yield from _layer("initial_norm", width)
    blocks = range(config["num_blocks_per_stage"])
    for stage, block, half in itertools.product(("res_blocks", "post_upsample_res_blocks"), blocks, (1, 2)):
        yield from _conv(f"{stage}.{block}.conv{half}", width, width, 3, 3)
        yield from _layer(f"{stage}.{block}.norm{half}", width)
    yield from _conv("upsampler.0", width, 4 * width, 2, 3)
    yield from _conv("final_conv", width, config["in_channels"], 3, 3)


def text_encoder(config: Config) -> Named:
    """Gemma 3's language model, without the vision tower."""
    text = config["text_config"]
    width, inner = text["hidden_size"], text["intermediate_size"]
    own, shared = (text[field] * text["head_dim"] for field in ("num_attention_heads", "num_key_value_heads"))
    layer = {
        "self_attn.q_proj": (own, width),
        "self_attn.k_proj": (shared, width),
        "self_attn.v_proj": (shared, width),
        "self_attn.o_proj": (width, own),
        "self_attn.q_norm": (text["head_dim"],),
        "self_attn.k_norm": (text["head_dim"],),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "pre_feedforward_layernorm": (width,),
        "post_feedforward_layernorm": (width,),
    }
    yield f"{TEXT_ROOT}embed_tokens.weight", (text["vocab_size"], width)
    for number, (module, shape) in itertools.product(range(text["num_hidden_layers"]), layer.items()):
        biased = bool(text.get("attention_bias")) and module.startswith("self_attn.") and module.endswith("_proj")
        yield from _layer(f"{TEXT_ROOT}layers.{number}.{module}", *shape, bias=biased)
    yield f"{TEXT_ROOT}norm.weight", (width,)


def _codec(width: int, encoder: Named, decoder: Named) -> Named:
    """A VAE, and the statistics of its latents, ``width`` values each."""
    yield "latents_mean", (width,)
    yield "latents_std", (width,)
    yield from _under("encoder", encoder)
    yield from _under("decoder", decoder)


def _layer(name: str, *shape: int, bias: bool = True) -> Named:
    """A weight and a bias with one value for each row of the weight."""
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def _linear(name: str, width: int, out: int) -> Named:
    return _layer(name, out, width)


def _conv(name: str, width: int, out: int, axes: int, kernel: int, bias: bool = True) -> Named:
    return _layer(name, out, width, *(kernel,) * axes, bias=bias)


def _adaln(name: str, width: int, rows: int) -> Named:
    yield from _linear(f"{name}.emb.timestep_embedder.linear_1", TIMESTEP_WIDTH, width)
    yield from _linear(f"{name}.emb.timestep_embedder.linear_2", width, width)
    yield from _linear(f"{name}.linear", width, rows * width)


def _attention(query: int, context: int, inner: int, heads: int) -> Named:
    yield "norm_q.weight", (inner,)
    yield "norm_k.weight", (inner,)
    yield from _linear("to_q", query, inner)
    yield from _linear("to_k", context, inner)
    yield from _linear("to_v", context, inner)
    yield from _linear("to_out.0", inner, query)
    yield from _linear("to_gate_logits", query, heads)


def _feed_forward(width: int) -> Named:
    yield from _linear("net.0.proj", width, FEED_FORWARD * width)
    yield from _linear("net.2", FEED_FORWARD * width, width)


def _under(prefix: str, tensors: Named) -> Named:
    for name, shape in tensors:
        yield f"{prefix}.{name}", shape


_INVENTORIES: Mapping[str, Callable[[Config], Named]] = {
    function.__name__: function
    for function in (transformer, connectors, vae, audio_vae, vocoder, latent_upsampler, text_encoder)
}


# The published LTX-2.3, for plans before 70 GB are fetched


def published_files() -> dict[str, Any]:
    """A copy of ``published.json`` that the caller may change.

    It holds the configs of the files: ``checkpoint`` and ``upsampler`` in the official fields, ``text_encoder`` as
    Gemma's config.json (without the vision tower), and under ``shapes`` the sizes that only tensors state. A test
    compares the sum of the tensors with the published number of bytes.
    """
    document: dict[str, Any] = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return document


def published_configs() -> dict[str, dict[str, Any]]:
    """The diffusers configs of all components, and the config of the text encoder."""
    files, name = published_files(), "LTX-2.3 22B"
    shapes = {tensor: tuple(shape) for tensor, shape in files["shapes"].items()}
    configs = checkpoint_configs(files["checkpoint"], shapes, name)
    configs["latent_upsampler"] = upsampler_config(files["upsampler"], configs["vae"]["latent_channels"], name)
    return {**configs, "text_encoder": files["text_encoder"]}


def published_tensors(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[tuple[str, str, tuple[int, ...]]]]:
    """Component -> name, stored dtype and shape of each tensor in an overlay."""
    found = {
        component: [
            (tensor, "F32" if component == "transformer" and tensor.endswith(FLOAT32_TENSORS) else "BF16", shape)
            for tensor, shape in inventory(component, config).items()
        ]
        for component, config in configs.items()
    }
    if "text_encoder" in found:
        found["text_encoder"].append(VISION)
    return found
