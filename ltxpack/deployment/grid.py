"""The plans of the deployment page: every video on every machine of the grid, of the published model or an overlay."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ltxpack.deployment.choices import CARDS, DEVICES, GB, HOSTS, LORAS
from ltxpack.errors import DeviceError, OverlayError
from ltxpack.lora_bake.plan import BakeOptions, bake_name, lora_name
from ltxpack.ltx23.classes import DISTILLED
from ltxpack.ltx23.releases import DEFAULT_FILES, LORA, RELEASES
from ltxpack.runtime.commands import DEFAULT_FOLDER, commands
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.overlay import BASE, STRENGTH, Overlay, choose, form_of, official_transformers, transformer_part
from ltxpack.runtime.parallel.planned import EXCHANGES
from ltxpack.runtime.parallel.schemes import as_shared, shared
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling.recipes import Recipe
from ltxpack.runtime.settings import AUTO, SessionSettings
from ltxpack.runtime.weights.machine import Machine, this_machine
from ltxpack.runtime.weights.plan import Footprint, Plan, Work, best_plan
from ltxpack.runtime.weights.report import plan_or_refuse
from ltxpack.runtime.weights.sizes import SMALL_PARTS, TEXT_ENCODER, TRANSFORMER, ModelSizes, model_sizes, read_configs

T = TypeVar("T")
# A size, height first, and a number of frames.
Video = tuple[tuple[int, int], int]


@dataclass(frozen=True)
class Case:
    """A recipe in one form: the transformers of its stages, and the sizes of the model with these and the base."""

    recipe: Recipe
    form: str
    stages: tuple[str, ...]
    model: ModelSizes

    def request(self, video: Video) -> Request:
        """The request for ``video``, without a prompt."""
        (height, width), frames = video
        return Request.of("", recipe=self.recipe.name, height=height, width=width, num_frames=frames)

    def transformers(self, loras: int) -> list[str]:
        """The bakes to make, each once; with ``loras`` of the user the base is baked too."""
        return [name for name in dict.fromkeys(self.stages) if name != BASE or loras]


class Subject:
    """The model of the page: that of ``overlay``, or the published one."""

    def __init__(self, overlay: Overlay | None) -> None:
        self.overlay = overlay
        self.dit = DiTConfig.from_dict(read_configs(overlay)[TRANSFORMER])

    @property
    def name(self) -> str:
        """The name of the model on the page."""
        return "the published LTX-2.3" if self.overlay is None else self.overlay.root.resolve().name

    @property
    def root(self) -> Path:
        """The folder of the overlay, which need not exist yet."""
        return DEFAULT_FOLDER if self.overlay is None else self.overlay.root

    def case(self, recipe: Recipe, form: str) -> Case:
        """The case of ``recipe`` in ``form``. Raises OverlayError if the overlay cannot run ``recipe``."""
        stages = self._stages(recipe, form)
        names = dict.fromkeys((BASE, *stages))
        return Case(recipe, form, stages, model_sizes(self.overlay, names, SessionSettings.dtype))

    def _stages(self, recipe: Recipe, form: str) -> tuple[str, ...]:
        """The transformers that ``auto`` takes if all are in ``form``, else the official ones."""
        if self.overlay is not None:
            manifest, asked = self.overlay.manifest, (AUTO,) * len(recipe.stages)
            try:
                stages = choose(self.overlay, recipe, asked, form).stages
            except OverlayError:
                if manifest.distilled:  # another bake does not help
                    raise
            else:
                if all(form_of(manifest, name) == form for name in stages):
                    return stages
        return self._official(recipe, form)

    def _official(self, recipe: Recipe, form: str) -> tuple[str, ...]:
        distilled = self.overlay is not None and self.overlay.manifest.distilled
        return official_transformers(recipe, distilled, form)

    def disk(self, case: Case, loras: int) -> tuple[int, int]:
        """Bytes of the overlay without bakes, and of the bakes of ``case``. Leaves out LoRAs of the user."""
        parts = case.model.parts
        base = sum(parts[part].stored for part in (*SMALL_PARTS, TEXT_ENCODER, transformer_part(BASE)))
        if self.overlay is None:
            base += next(release.size for release in RELEASES if release.file == DEFAULT_FILES[LORA])
        else:
            base += sum(lora.file.size for lora in self.overlay.manifest.loras)
        return base, sum(parts[transformer_part(name)].stored for name in case.transformers(loras))

    def commands(self, case: Case, video: Video, devices: int, loras: int) -> list[str]:
        """The commands from nothing to ``video`` on this number of ``devices``, with the first ``loras`` of LORAS in
        each bake. The last one runs the video; the others are the same for all videos and devices.
        """
        session = SessionSettings(format=case.form, devices=named_devices(devices))
        request = case.request(video)
        found = [command.text for command in commands(case.stages, request, session, self.overlay)]
        if not loras:
            return found
        bake, names = self._stacked(case, LORAS[:loras])
        stages: dict[str, Any] = {f"stage{number}": name for number, name in enumerate(names, start=1)}
        run = commands(case.stages, request, replace(session, **stages), self.overlay)[-1]
        return [found[0], bake, run.text]

    def _stacked(self, case: Case, added: tuple[tuple[str, float], ...]) -> tuple[str, list[str]]:
        """The command that bakes the official transformers of ``case`` with ``added`` beneath, and the ``--stage`` of
        each. ``auto`` takes neither a bake with the distilled LoRA at 0 nor a stacked one beside plain ones.
        """
        loras = [(lora_name(Path(file).stem), strength) for file, strength in added]
        options = BakeOptions(self.root, (), added=added, formats=(case.form,))
        if self.overlay is not None and self.overlay.manifest.lora(DISTILLED) is None:
            # The last LoRA takes the place of the distilled one.
            file, strength = added[-1]
            alone = replace(options, strengths=(strength,), lora=file, added=added[:-1])
            return alone.command(), [bake_name(loras, case.form)] * len(case.stages)
        official = map(STRENGTH.fullmatch, self._official(case.recipe, case.form))
        strengths = [0.0 if found is None else float(found["strength"]) for found in official]
        bakes = [bake_name([*loras, (DISTILLED, strength)], case.form) for strength in strengths]
        auto = [self.overlay is None and strength > 0 for strength in strengths]
        names = [AUTO if usual else name for usual, name in zip(auto, bakes, strict=True)]
        return replace(options, strengths=tuple(dict.fromkeys(strengths))).command(), names


def named_devices(count: int) -> str | None:
    """The value of ``--devices`` for ``count`` cards; None for one."""
    return None if count == 1 else ",".join(map(str, range(count)))


def gains(dit: DiTConfig, work: Work, itemsize: int) -> list[float | None]:
    """For each number of DEVICES: how much faster than one card it is at most; None if fewer cards gain as much."""
    found: list[float | None] = []
    most = 0.0
    for count in DEVICES:
        gain = shared(SessionSettings.parallel, dit, work, count, itemsize).gain
        found.append(gain if gain > most else None)
        most = max(most, gain)
    return found


def machine_of(card: int, host: int, devices: int = 1) -> Machine:
    """The machine of each of ``devices`` processes; ``card`` in GB for each, ``host`` in GB for all together."""
    machine = this_machine(card * GB, host * GB)
    exchanges = EXCHANGES if devices > 1 else 0
    return replace(machine, host=machine.host // devices, context=machine.context + exchanges)


def share_of(dit: DiTConfig, work: Work, itemsize: int, devices: int) -> Work:
    """The share of ``work`` of the busiest of ``devices`` cards."""
    return as_shared(work, shared(SessionSettings.parallel, dit, work, devices, itemsize).splits)


def plans(model: ModelSizes, work: Work, devices: int) -> Iterator[list[Plan | str]]:
    """For each card of the grid, the best plan for ``work`` with each host, or the refusal of ``ltxpack plan``.

    ``work`` is the share of one of ``devices``. Machines between two with the same plan have this plan too: more memory
    only adds ways to run.
    """
    hosts = [machine_of(0, host, devices).host for host in HOSTS]
    cards = [machine_of(card, 0, devices) for card in CARDS]
    footprint = Footprint(model, work)

    def row(number: int) -> list[Plan | None]:
        card = cards[number]
        return between(
            len(hosts), lambda host: best_plan(model, work, replace(card, host=hosts[host]), footprint=footprint)
        )

    whose = "the card" if devices == 1 else "each card"
    for card, found in zip(cards, between(len(cards), row), strict=True):
        machines = [replace(card, host=host) for host in hosts]
        yield [plan or _refusal(model, work, one, whose) for plan, one in zip(found, machines, strict=True)]


def between(count: int, made: Callable[[int], T]) -> list[T]:
    """``made`` of 0 to ``count`` - 1. It is not called between two numbers with equal results."""
    made = functools.cache(made)

    def halves(first: int, last: int) -> list[T]:
        if made(first) == made(last):
            return [made(first)] * (last - first)
        if last - first == 1:
            return [made(first)]
        middle = (first + last) // 2
        return halves(first, middle) + halves(middle, last)

    return [*halves(0, count - 1), made(count - 1)]


def _refusal(model: ModelSizes, work: Work, machine: Machine, device: str) -> str:
    try:
        plan_or_refuse(model, work, machine, AUTO, device)
    except DeviceError as error:
        return f"{error.problem}: {error.expected} needed, {error.found}"
    raise AssertionError("there is a plan")
