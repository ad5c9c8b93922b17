"""The recorded end-to-end runs of a golden fixture, cut into what our functions take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from support import load
from torch import Tensor

from ltxpack.runtime.sampling import schedule
from ltxpack.runtime.sampling.conditioning import ImageItem, LatentState, initial_state
from ltxpack.runtime.sampling.guidance import Guidance
from ltxpack.runtime.sampling.recipes import REFINING
from ltxpack.runtime.sampling.shape import AV, VideoShape

NAMES = AV("video", "audio")


@dataclass(frozen=True)
class Run:
    """One ``run_*.safetensors``: its tensors and the parameters of its metadata."""

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
            )
        )

    def stage(self, number: int) -> Stage:
        return Stage(self, number, self.shape.divided(2) if number == 1 else self.shape)

    def av(self, pattern: str) -> AV[Tensor] | None:
        """The two tensors that ``pattern`` names with ``{}`` for the modality; None if not recorded."""
        keys = NAMES.map(pattern.format)
        return keys.map(self.tensors.__getitem__) if keys.video in self.tensors else None


@dataclass(frozen=True)
class Stage:
    """One of the two stages of a run."""

    run: Run
    number: int
    shape: VideoShape

    @property
    def sigmas(self) -> Tensor:
        if self.number == 2:
            return schedule.sigmas_of(REFINING)
        return schedule.shifted_sigmas(self.shape.tokens, self.run.params["steps"])

    @property
    def noise_scale(self) -> float:
        return self.sigmas[0].item()

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
        if self.number == 1:
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


def runs(golden: Path, dtype: str, kind: str = "run") -> list[Run]:
    """All runs of ``golden`` in ``fp32`` or ``bf16``: of hq, or those of the kind ``recipe``; of hq at least one."""
    found = []
    for path in sorted((golden / "golden").glob(f"{kind}_*_{dtype}.safetensors")):
        with safe_open(path, framework="pt") as file:
            params = json.loads(file.metadata()["params"])
        found.append(Run(path.stem, load(path), params))
    assert found or kind != "run", f"{golden} holds no {dtype} run"
    return found
