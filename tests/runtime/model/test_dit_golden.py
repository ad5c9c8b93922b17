"""The DiT against forwards recorded from the official model, every tensor of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from dit_parts import golden_dit
from golden_runs import DISTILLED_LORA, NAMES
from quantised_parts import recorded_folder
from safetensors import safe_open
from support import load, relative_l2
from torch import Tensor

from ltxpack.ltx23.renames import TRANSFORMER
from ltxpack.runtime.calibration import LargestInputs, linears
from ltxpack.runtime.model.model import DiT, Stream
from ltxpack.runtime.model.weights import load_dit
from ltxpack.runtime.sampling.shape import AV

NONE: frozenset[int] = frozenset()
UNPERTURBED = AV(NONE, NONE)
# The official code itself, run with other threads and kernels, moves by 5e-6 in fp32 and 1.4e-2 in bf16.
FP32_LIMIT = 1e-5
BF16_LIMIT = 1.4e-2
CPUINFO = Path("/proc/cpuinfo")
# cond.args.<modality>.<name> -> our rows of the same thing.
ARGUMENTS = {
    "adaln_token0": "adaln",
    "embedded_timestep_token0": "embedded",
    "prompt_timestep": "prompt",
    "cross_scale_shift_token0": "cross",
    "cross_gate": "cross_gate",
}


@dataclass(frozen=True)
class Call:
    """How one recorded sample was made. ``off``: the modality whose hidden states no block changes."""

    isolated: bool = False
    without_a2v: bool = False
    perturbed: AV[frozenset[int]] = UNPERTURBED
    off: str = ""


def call_of(name: str) -> Call:
    """The call of a case by its name."""
    stg, off = re.fullmatch(r"stg_block(\d+)", name), re.fullmatch("(video|audio)_off", name)
    of_one = NAMES.map(lambda modality: re.search(f"_{modality}_([0-9_]*[0-9])", name))
    blocks = of_one.map(lambda found: frozenset(map(int, found[1].split("_"))) if found else NONE)
    if stg or name == "stg_every_block":
        every = frozenset({int(stg[1])} if stg else range(3))
        blocks = AV(every, every)
    return Call(name == "isolated_modality", name == "skip_a2v_only", blocks, off[1] if off else "")


def calls_of(case: str) -> list[Call]:
    """The calls of a case, one per sample of its batch; in a mixed batch STG is of the video alone."""
    mixed = re.fullmatch(r"batched\d+_(.+)", case)
    if mixed is None:
        return [call_of(case)]
    blocks = [frozenset(map(int, re.findall("^stg(.+)", kind))) for kind in mixed[1].split("_")]
    return [
        Call(isolated=kind == "iso", perturbed=AV(stg, NONE))
        for kind, stg in zip(mixed[1].split("_"), blocks, strict=True)
    ]


@dataclass(frozen=True)
class Recorded:
    """A transformer file of a fixture, the DiT it was made with and that DiT's rotary tables."""

    tensors: dict[str, Tensor]
    dit: DiT

    @classmethod
    def read(cls, golden: Path, kind: str) -> Recorded:
        path = golden / "golden" / f"transformer_{kind}.safetensors"
        with safe_open(path, "pt") as file:
            strength = file.metadata().get("lora_strength")
        loras = [] if strength is None else [(DISTILLED_LORA, float(strength))]
        inputs = load(golden / "golden" / f"transformer_{kind.removeprefix('stg_')}.safetensors")
        tensors = {name: tensor for name, tensor in inputs.items() if name.startswith("in.")} | load(path)
        return cls(tensors, golden_dit(golden, loras, tensors["in.video_latent"].dtype))

    def cases(self) -> list[str]:
        return sorted({name.split(".")[0] for name in self.tensors} - {"in"})

    def streams(self, case: str, sample: int = 0) -> AV[Stream]:
        """Inputs of one sample: the video timesteps as distinct values and an index, where they differ."""
        positions = AV(self.tensors["in.video_positions"], self.tensors["in.audio_positions"])
        latents = AV(self.tensors["in.video_latent"], self.tensors["in.audio_latent"])
        context = AV(self.tensors["in.video_context"], self.tensors["in.audio_context"])
        sigma = self.tensors[f"{case}.sigma"][sample : sample + 1]
        mask = self.tensors.get(f"{case}.video_denoise_mask", torch.ones_like(latents.video[..., :1]))
        masks, index = mask[0, :, 0].unique(return_inverse=True)
        return AV(masks, torch.ones(1)).map(
            lambda mask, which, x, text, tables: Stream(x, (mask * sigma)[None], which, sigma, text, tables),
            AV(index if len(masks) > 1 else None, None),
            latents,
            context,
            self.dit.rope(positions, latents.video.dtype, "cpu"),
        )

    def run(self, case: str) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every output of ``case``, its samples one after another."""
        made = [self.forward(self.streams(case, sample), call) for sample, call in enumerate(calls_of(case))]
        for pattern in made[0]:
            for modality in ("video", "audio"):
                whole = torch.cat([getattr(outputs[pattern], modality) for outputs in made])
                yield f"{case}.{pattern.format(modality)}", whole

    def forward(self, streams: AV[Stream], call: Call) -> dict[str, AV[Tensor]]:
        """The hidden states after each block, the velocities and the x0, by name with ``{}`` for the modality."""
        if call.off:
            streams = replace(streams, **{call.off: replace(getattr(streams, call.off), off=True)})
        outputs: dict[str, AV[Tensor]] = {}
        hooks = [
            block.register_forward_hook(lambda module, args, out, n=number: outputs.update({f"block{n}.{{}}": out[0]}))
            for number, block in enumerate(self.dit.transformer_blocks)
        ]
        # No pass of the recipe leaves out a2v alone, so the DiT has no argument for it; its contribution is zeroed.
        attentions = [block.audio_to_video_attn for block in self.dit.transformer_blocks] if call.without_a2v else []
        hooks += [a.register_forward_hook(lambda module, args, out: torch.zeros_like(out)) for a in attentions]
        try:
            outputs["{}_velocity"] = self.dit(streams, isolated=call.isolated, perturbed=call.perturbed)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs | {"{}_x0": streams.map(x0, outputs["{}_velocity"])}

    def arguments(self) -> dict[str, Tensor]:
        """What the blocks of the case ``cond`` are given."""
        streams = self.streams("cond")
        with torch.no_grad():
            conditioning = self.dit.condition(streams)
            given = {"x": self.dit._embed(streams)}
        for name, rows in ARGUMENTS.items():
            given[name] = conditioning.map(lambda made, rows=rows: getattr(made, rows).values.flatten(2))
        return {f"cond.args.{m}.{name}": getattr(value, m) for name, value in given.items() for m in ("video", "audio")}

    def everything(self) -> dict[str, Tensor]:
        return {name: value for case in self.cases() for name, value in self.run(case)} | self.arguments()


def x0(stream: Stream, velocity: Tensor) -> Tensor:
    """x - v·t, in float32."""
    timesteps = stream.timesteps if stream.timestep_index is None else stream.timesteps[:, stream.timestep_index]
    return (stream.latents.float() - velocity.float() * timesteps[..., None]).to(velocity.dtype)


def check_fp32(recorded: Recorded) -> None:
    """Every tensor of the file but the inputs."""
    found, given = recorded.everything(), re.compile(r"in\..*|.*\.(sigma|video_denoise_mask)")
    expected = {name: value for name, value in recorded.tensors.items() if not given.fullmatch(name)}
    assert expected.keys() <= found.keys()
    errors = {name: relative_l2(found[name], value) for name, value in expected.items()}
    assert {name: error for name, error in errors.items() if not error <= FP32_LIMIT} == {}


def test_every_recorded_fp32_tensor_is_reproduced(latents_golden: Path) -> None:
    check_fp32(Recorded.read(latents_golden, "fp32"))


def test_every_recorded_pass_of_the_other_recipes_is_reproduced(golden: Path) -> None:
    """STG in blocks of one modality, of both and in none, with one timestep and with many; a modality that is off."""
    check_fp32(Recorded.read(golden, "stg_fp32"))


def test_the_largest_inputs_are_those_of_the_recorded_scales(golden: Path, tmp_path: Path) -> None:
    """Of the bake at 0.5 by the rule fp32, as a fp8 bake is calibrated with it."""
    dit = load_dit(recorded_folder(golden, tmp_path / "bake", "bf16"), torch.device("cpu"), torch.float32)
    largest = LargestInputs(torch.device("cpu"))
    largest.watch(dit)
    recorded = Recorded(load(golden / "golden" / "transformer_fp32.safetensors"), dit)
    dit(recorded.streams("cond"))
    found, scales = largest.read(), load(golden / "golden" / "fp8_weights_s0.5.safetensors")
    wanted = [re.fullmatch(r"tensor\.(.*)\.input_scale", name) for name in scales]
    names = {match[1]: TRANSFORMER.rename(f"model.diffusion_model.{match[1]}") for match in wanted if match}
    assert len(names) == 2 * 34 and set(names.values()) < found.keys() == set(linears(3))
    for official, name in names.items():
        assert found[name] / 448 == pytest.approx(scales[f"tensor.{official}.input_scale"].item(), rel=1e-5), name


def test_bf16_is_bit_equal_where_this_machine_multiplies_like_the_recorder(golden: Path) -> None:
    bf16 = Recorded.read(golden, "bf16")
    found = bf16.everything()
    canary = "cond.args.{}.x"  # one matrix product, before anything of ours has happened
    same_product = all(torch.equal(found[canary.format(m)], bf16.tensors[canary.format(m)]) for m in ("video", "audio"))
    # Small products come out alike on more CPUs than large ones: only matrix tiles sum everything in their order.
    same_kernels = same_product and CPUINFO.is_file() and "amx_bf16" in CPUINFO.read_text().split()
    limit = 0.0 if same_kernels else BF16_LIMIT
    outputs = [name for name in bf16.tensors if name.endswith("velocity") or ".block" in name]
    errors = {name: relative_l2(found[name], bf16.tensors[name]) for name in outputs}
    assert outputs
    assert {name: error for name, error in errors.items() if not error <= limit} == {}
