"""What the DiT tests share: sizes typed as data, weights and inputs, from a golden fixture or from a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from codec_parts import checkpoint_of, golden_configs
from support import load, relative_l2
from torch import Tensor
from torch.fx import GraphModule

from ltxpack.lora_bake.fuse import Term, fuse_official
from ltxpack.ltx23.renames import TRANSFORMER, component_of
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import DiT, Pass, Stream
from ltxpack.runtime.model.rope import RopeTables, Rotation
from ltxpack.runtime.sampling.shape import AV

# What LTX-2.3 says where diffusers' default is another; all other fields are left to their defaults.
LTX23 = {
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "rope_type": "split",
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}
SMALL = LTX23 | {
    "in_channels": 12,
    "out_channels": 10,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_in_channels": 6,
    "audio_out_channels": 8,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 2,
}


def golden_dit(golden: Path, loras: Sequence[tuple[str, float]], dtype: torch.dtype) -> DiT:
    """The DiT of a fixture in ``dtype``, with the LoRAs (a file's name or pattern, strength) fused in this order.

    They are fused here by the official rule, which is bit-equal to every recorded fuse (tests/lora_bake).
    """
    adapters = [load(next(golden.glob(file))) for file, _ in loras]
    weights = {}
    for key, value in load(checkpoint_of(golden)).items():
        if component_of(key) == "transformer":
            fused = _fused(key, value, adapters, [strength for _, strength in loras])
            weights[TRANSFORMER.rename(key)] = fused.to(dtype)
    return built(golden_configs(golden)["transformer"], weights)


def _fused(key: str, weight: Tensor, adapters: list[dict[str, Tensor]], strengths: list[float]) -> Tensor:
    module = key.removeprefix("model.").removesuffix(".weight")
    pairs = [[lora.get(f"{module}.lora_{part}.weight") for part in "AB"] for lora in adapters]
    found = [(Term(1.0, *pair), strength) for pair, strength in zip(pairs, strengths, strict=True) if None not in pair]
    if not found or not key.endswith(".weight"):
        return weight
    return fuse_official(weight, [term for term, _ in found], [strength for _, strength in found])[0]


def built(config: dict[str, Any], weights: dict[str, Tensor]) -> DiT:
    """A DiT that holds ``weights``; all of them, and nothing else."""
    with torch.device("meta"):
        dit = DiT(DiTConfig.from_dict(config))
    dit.load_state_dict(weights, strict=True, assign=True)
    return dit


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Weights under which every part of the model moves the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in DiT(DiTConfig.from_dict(config)).state_dict().items()}
    return {
        name: torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 2)
        for name, shape in shapes.items()
    }


SMALL_WEIGHTS = random_weights(SMALL)


def tracing() -> tuple[list[GraphModule], Callable[..., Any]]:
    """A compiler's backend that runs each traced graph as it is, and the graphs it has been given."""
    graphs: list[GraphModule] = []

    def backend(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    return graphs, backend


def random_streams(dit: DiT, tokens: AV[int], *, batch: int = 1, text: int = 7, seed: int = 0) -> AV[Stream]:
    """Inputs in float32 with one timestep for all tokens; positions spread over a few seconds of a small picture."""
    generator = torch.Generator().manual_seed(seed)
    extent = AV(torch.tensor([5.0, 900.0, 700.0]), torch.tensor([5.0]))
    positions = tokens.map(
        lambda count, limit: _intervals(torch.rand(1, len(limit), count, generator=generator) * limit[:, None]), extent
    )
    rope = dit.rope(positions, torch.float32, "cpu")
    sigma = torch.linspace(0.9, 0.3, batch)

    def stream(count, config, tables):
        return Stream(
            latents=torch.randn(batch, count, config.in_channels, generator=generator),
            timesteps=sigma[:, None],
            timestep_index=None,
            sigma=sigma,
            context=torch.randn(batch, text, config.dim, generator=generator),
            rope=tables,
        )

    return tokens.map(stream, dit.config.streams, rope)


def with_timesteps(stream: Stream, values: list[float], index: list[int]) -> Stream:
    """``stream`` (batch 1) with the distinct ``values`` of mask·sigma, token i using ``values[index[i]]``."""
    return replace(stream, timesteps=torch.tensor([values]), timestep_index=torch.tensor(index))


def cast(streams: AV[Stream], dtype: torch.dtype, device: torch.device | str = "cpu") -> AV[Stream]:
    """``streams`` on ``device`` with latents, context and tables in ``dtype``."""

    def turn(rotation: Rotation) -> Rotation:
        return Rotation(*(part.to(device, dtype) for part in rotation))

    return streams.map(
        lambda stream: replace(
            stream,
            latents=stream.latents.to(device, dtype),
            timesteps=stream.timesteps.to(device),
            timestep_index=None if stream.timestep_index is None else stream.timestep_index.to(device),
            sigma=stream.sigma.to(device),
            context=stream.context.to(device, dtype),
            rope=RopeTables(turn(stream.rope.self_attention), turn(stream.rope.cross_attention)),
        )
    )


def recipe(streams: AV[Stream]) -> list[Pass]:
    """The passes of a guided step: cond, uncond, isolated."""
    other = streams.map(lambda stream: replace(stream, context=-stream.context))
    return [Pass(streams), Pass(other), Pass(streams, isolated=True)]


def distance(found: AV[Tensor], expected: AV[Tensor]) -> float:
    """Relative L2, the worse of the two modalities."""
    return max(relative_l2(found.video, expected.video), relative_l2(found.audio, expected.audio))


def _intervals(starts: Tensor) -> Tensor:
    return torch.stack((starts, starts + 0.25), dim=-1)
