"""The recorded end-to-end runs of a golden fixture, cut into what our functions take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from support import load, relative_l2
from torch import Tensor

from ltxpack.runtime.sampling import recipes, sample, schedule
from ltxpack.runtime.sampling.conditioning import ImageItem, LatentState, initial_state, unpatchify
from ltxpack.runtime.sampling.guidance import Denoiser, Guidance
from ltxpack.runtime.sampling.shape import AV, VideoShape

NAMES = AV("video", "audio")
# The file in a fixture; runs of hq do not say its name.
DISTILLED_LORA = "*distilled-lora*.safetensors"


@dataclass(frozen=True)
class Run:
    """One ``run_*`` or ``recipe_*.safetensors``: its tensors and the parameters of its metadata."""

    name: str
    tensors: dict[str, Tensor]
    params: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.params["dtype"].removeprefix("torch."))

    @property
    def shape(self) -> VideoShape:
        p = self.params
        return VideoShape(p["num_frames"], p["height"], p["width"], p["frame_rate"])

    @property
    def guidance(self) -> AV[Guidance]:
        settings = NAMES.map(lambda name: self.params[f"{name}_guider"])
        return settings.map(
            lambda s: Guidance(
                cfg=s["cfg_scale"],
                rescale=s["rescale_scale"],
                modality=s["modality_scale"],
                stg=s["stg_scale"],
                stg_blocks=frozenset(s["stg_blocks"]),
                skip=s["skip_step"],
            )
        )

    @property
    def recipe(self) -> recipes.Recipe:
        return recipes.RECIPES[self.params.get("recipe", "hq")]

    @property
    def stages(self) -> list[Stage]:
        return [Stage(self, number, rule) for number, rule in enumerate(self.recipe.stages, 1)]

    def av(self, pattern: str) -> AV[Tensor] | None:
        """The two tensors that ``pattern`` names with ``{}`` for the modality; None if not recorded."""
        keys = NAMES.map(pattern.format)
        return keys.map(self.tensors.__getitem__) if keys.video in self.tensors else None


@dataclass(frozen=True)
class Stage:
    """One stage of a run, counted from 1."""

    run: Run
    number: int
    rule: recipes.Stage

    @property
    def shape(self) -> VideoShape:
        return self.rule.shape(self.run.shape)

    @property
    def guidance(self) -> AV[Guidance] | None:
        return self.run.guidance if self.rule.guided else None

    @property
    def loras(self) -> list[tuple[str, float]]:
        """File and strength of what is fused into its transformer, in this order."""
        if "loras" in self.run.params:
            return [(file, strength) for file, strength in self.run.params["loras"][f"stage{self.number}"]]
        strength = self.run.params[f"s{self.number}"]
        return [(DISTILLED_LORA, strength)] if strength else []

    @property
    def sigmas(self) -> Tensor:
        return schedule.sigmas_of(self.rule.schedule, self.shape.tokens, self.run.params["steps"])

    @property
    def noise_scale(self) -> float:
        return self.sigmas[0].item() if self.rule.upsampled else 1.0

    @property
    def images(self) -> list[ImageItem]:
        items = []
        for index, (_, frame, strength) in enumerate(self.run.params.get("images", ())):
            prefix = f"image_cond.pass{self.number}.{index}."
            (latents,) = (tensor for key, tensor in self.run.tensors.items() if key.startswith(prefix))
            items.append(ImageItem(frame, strength, latents))
        return items

    @property
    def initial(self) -> AV[Tensor] | None:
        """What the stage starts from, as recorded."""
        if not self.rule.upsampled:
            return None
        return AV(self.run.tensors["upsampler.out"], self.run.tensors["stage1.audio_final_latent"])

    def state(self, generator: torch.Generator) -> AV[LatentState]:
        return initial_state(self.shape, self.initial, self.images, self.noise_scale, generator, "cpu", self.run.dtype)

    def recorded(self, pattern: str) -> AV[Tensor] | None:
        return self.run.av(f"stage{self.number}.{pattern}")

    def calls(self) -> Iterator[int]:
        """The numbers of the recorded denoiser calls."""
        number = 0
        while f"stage{self.number}.call{number:02}.sigma" in self.run.tensors:
            yield number
            number += 1


def runs(golden: Path, dtype: str, kind: str = "*") -> list[Run]:
    """The runs of ``golden`` in ``fp32`` or ``bf16``: of hq (``run``), of the other recipes (``recipe``), or all."""
    found = []
    for path in sorted((golden / "golden").glob(f"{kind}_*_{dtype}.safetensors")):
        if path.name.startswith(("run_", "recipe_")):
            with safe_open(path, framework="pt") as file:
                params = json.loads(file.metadata()["params"])
            found.append(Run(path.stem, load(path), params))
    assert found or kind != "run", f"{golden} holds no {dtype} run"
    return found


def errors_of_stage(stage: Stage, denoiser: Denoiser, generator: torch.Generator) -> tuple[float, float]:
    """Relative L2 of the latents fed to ``denoiser`` (worst of all calls) and of the final latents."""
    state = stage.state(generator)
    rope = denoiser.model.rope(state.map(lambda s: s.positions), stage.run.dtype, "cpu")
    fed: list[AV[Tensor]] = []

    def denoise(latents: AV[Tensor], sigma: Tensor) -> AV[Tensor]:
        fed.append(latents)
        return denoiser(latents, sigma, state, rope)

    tokens = sample.SAMPLERS[stage.rule.sampler](denoise, state, stage.sigmas)
    errors = []
    for number, latents in enumerate(fed):
        recorded = stage.recorded(f"call{number:02}.{{}}_in")
        if recorded is not None:
            each = latents.map(relative_l2, recorded)
            errors += [each.video, each.audio]
    final = stage.recorded("{}_final_latent")
    assert final is not None
    last = unpatchify(tokens, stage.shape).map(relative_l2, final)
    return max(errors, default=0.0), max(last.video, last.audio)
