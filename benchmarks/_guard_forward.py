"""What a forward of every recipe costs in every form, counted at full size without a card: FLOP, launches, graphs.

Weights and inputs are on the meta device. Blocks are alike, so one of each kind is gone through, for all forms at once.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from _guard_graphs import Graph, scheduled, trace_of
from _guard_operations import BFLOAT16, META, Counted
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from ltxpack.ltx23.classes import TEXT_TOKENS
from ltxpack.ltx23.codes import CODES, coded_linears, with_codes
from ltxpack.ltx23.expected import published_configs, published_tensors
from ltxpack.manifest import BF16, FORMATS
from ltxpack.runtime.model import quantised
from ltxpack.runtime.model.block import PLAIN
from ltxpack.runtime.model.config import DiTConfig, StreamConfig
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling.conditioning import LatentState, positions
from ltxpack.runtime.sampling.guidance import Denoiser, Model
from ltxpack.runtime.sampling.recipes import HQ, RECIPES, Guidance, Stage, stage_label
from ltxpack.runtime.sampling.sample import SAMPLERS
from ltxpack.runtime.sampling.schedule import sigmas_of
from ltxpack.runtime.sampling.shape import AV, VideoShape

# The graphs of a block in the order in which the passes of a guided step need them.
GRAPHS = ("text", "attend", "exchange", "attend perturbed", "exchange isolated")
# What is recorded of a graph: the fields of Graph, and by what it is known again.
OF_A_GRAPH, TRACE = ("kernels", "library calls", "bytes moved by kernels"), "trace"
Numbers = Mapping[str, int]


@dataclass(frozen=True)
class Evaluation:
    """One call of the denoiser: the shape that is sampled, and the guidance where there is any."""

    shape: VideoShape
    guidance: AV[Guidance] | None

    @property
    def perturbed(self) -> frozenset[int]:
        """The numbers of the blocks that a pass perturbs."""
        return frozenset() if self.guidance is None else self.guidance.video.perturbed | self.guidance.audio.perturbed


@dataclass(frozen=True)
class Kind:
    """A block as a forward meets it: its form, whether a pass perturbs it, and whether one has perturbed an earlier
    block: from there on that pass and the positive one share no more work than others.
    """

    form: str
    perturbed: bool = False
    apart: bool = False


@dataclass(frozen=True)
class Once:
    """What was counted outside the blocks, in the first one, which passes share more work in, and in one of each other
    kind.
    """

    outside: Counter[Any]
    first: Counter[Any]
    others: Mapping[Kind, Counter[Any]]

    def within(self, kinds: Sequence[Kind]) -> Counter[Any]:
        """In all blocks of a transformer."""
        total = Counter(self.first)
        for kind, times in Counter(kinds[1:]).items():
            total.update({what: times * count for what, count in self.others[kind].items()})
        return total


class FullSize:
    """The published transformer on the meta device: a block in each form, and what is around them."""

    def __init__(self) -> None:
        fields = published_configs()["transformer"]
        self.count = fields["num_layers"]
        with torch.device(META):
            self.dit = DiT(DiTConfig.from_dict({**fields, "num_layers": len(FORMATS)}))
        self.dit.to(BFLOAT16).requires_grad_(False).use_attention("flash")
        self.blocks = dict(zip(FORMATS, self.dit.blocks(), strict=True))
        tensors = published_tensors({"transformer": fields})["transformer"]
        self.coded: dict[str, set[int]] = {BF16: set()}
        for form, codes in CODES.items():
            linears = coded_linears({name: dtype for name, dtype, _ in with_codes(tensors, codes)})
            self.coded[form] = {int(name.split(".")[1]) for name in linears}
            one = f"transformer_blocks.{min(self.coded[form])}."
            quantised.put_quantised(
                self.blocks[form], {name.removeprefix(one): codes for name in linears if name.startswith(one)}
            )
        self.graphs: list[Graph] = []
        self._traced: list[GraphModule] = []
        self._called: Counter[int] = Counter()

    def kinds(self, evaluation: Evaluation, form: str) -> list[Kind]:
        """Every block of the transformer in a ``form``."""
        perturbed = evaluation.perturbed
        first = min(perturbed, default=self.count)
        return [
            Kind(form if number in self.coded[form] else BF16, number in perturbed, number > first)
            for number in range(self.count)
        ]

    def launched(self, evaluation: Evaluation) -> Once:
        """What :class:`Counted` counts of a call of the denoiser, nothing compiled."""
        functions = [block.functions for block in self.blocks.values()]
        for block in self.blocks.values():
            block.functions = PLAIN
        counted = Counted()
        with patch.object(quantised, "by_stretches", _each_once(counted)):
            found = self._once(evaluation, counted.found, counted)
        for block, before in zip(self.blocks.values(), functions, strict=True):
            block.functions = before
        return found

    def compiled(self, evaluation: Evaluation) -> Once:
        """How often each of the graphs is called in a call of the denoiser, after :meth:`compile`."""
        return self._once(evaluation, self._called, nullcontext())

    def _once(self, evaluation: Evaluation, counter: Counter[Any], within: AbstractContextManager[Any]) -> Once:
        """What ``counter`` counts where one block of each kind of any form is gone through."""
        every = [self.kinds(evaluation, form) for form in FORMATS]
        (first,) = {kinds[0] for kinds in every}
        others = sorted({kind for kinds in every for kind in kinds[1:]}, key=lambda kind: (kind.apart, kind.perturbed))
        marks: list[Counter[Any]] = []
        counter.clear()
        with ExitStack() as stack:
            for block in self.blocks.values():
                stack.callback(block.register_forward_pre_hook(lambda *_: marks.append(Counter(counter))).remove)
                stack.callback(block.register_forward_hook(lambda *_: marks.append(Counter(counter))).remove)
            self.evaluate(evaluation, [first, *others], within)
        counts = [after - before for before, after in zip(marks[::2], marks[1::2], strict=True)]
        outside = functools.reduce(Counter.__sub__, counts, counter)
        return Once(outside, counts[0], dict(zip(others, counts[1:], strict=True)))

    def compile(self, before: Numbers) -> Iterator[tuple[str, int]]:
        """Traces and schedules every graph at the first stage of hq, with all four passes; what is recorded of each.

        A graph that is as it was in ``before`` is not scheduled again.
        """
        torch.compiler.reset()
        self.dit.compile_blocks(backend=self._backend)
        stage, request = HQ.stages[0], Request.of("", recipe=HQ.name)
        guidance = request.settings.guidance.map(lambda one: replace(one, stg=1.0, stg_blocks=frozenset({0})))
        evaluation = Evaluation(stage.shape(request.shape), guidance)
        for form in FORMATS:
            # No process has codes of two forms: their largest numbers stay constants. Keeping what operations on
            # symbolic sizes make takes longer than making it again.
            once = dynamo.patch(specialize_float=True, fake_tensor_cache_enabled=False)
            self.evaluate(evaluation, [Kind(form, perturbed=True)], once)
        for number, graph in enumerate(self._traced):
            of_form, own = divmod(number, len(GRAPHS))
            name = f"graph {FORMATS[of_form]} {GRAPHS[own]}" if of_form < len(FORMATS) else f"graph {number + 1}"
            trace, kinds = trace_of(graph), [f"{name}: {kind}" for kind in OF_A_GRAPH]
            known = trace == before.get(f"{name}: {TRACE}")
            self.graphs.append(Graph(*map(before.__getitem__, kinds)) if known else scheduled(graph))
            yield from zip(kinds, self.graphs[-1], strict=True)
            yield f"{name}: {TRACE}", trace

    def _backend(self, graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        number, made = len(self._traced), dict[Any, Any]()
        self._traced.append(graph)

        def run(*given: Any) -> Any:
            # Tensors without content serve again.
            self._called[number] += 1
            key = tuple(one.shape if isinstance(one, Tensor) else one for one in given)
            return made[key] if key in made else made.setdefault(key, graph(*given))

        return run

    def evaluate(
        self,
        evaluation: Evaluation,
        kinds: Sequence[Kind],
        within: AbstractContextManager[Any],
        front: Callable[[DiT], Model] = lambda dit: dit,
    ) -> None:
        """One call of the denoiser, with such blocks; ``front`` stands between it and the transformer."""
        streams = self.dit.config.streams
        self.dit.transformer_blocks = nn.ModuleList(self.blocks[kind.form] for kind in kinds)
        perturbed = frozenset(number for number, kind in enumerate(kinds) if kind.perturbed)
        guidance = evaluation.guidance and evaluation.guidance.map(lambda one: replace(one, stg_blocks=perturbed))
        prompt, negative = (streams.map(lambda one: _empty(1, TEXT_TOKENS, one.dim)) for _ in range(2))
        where = positions(evaluation.shape).map(lambda one: one.to(META))
        state = where.map(_state, streams)
        rope = self.dit.rope(where, BFLOAT16, META)
        denoiser = Denoiser(front(self.dit), prompt, negative, guidance)
        sigma = _empty(1, dtype=torch.float32)
        with within:
            denoiser(state.map(lambda one: one.latents), sigma, state, rope)


def _each_once(counted: Counted) -> Callable[..., Tensor]:
    """by_stretches, whose thousands of small steps are gone through once for inputs that are alike."""
    known: dict[Any, Counter[str]] = {}
    carry_out = quantised.by_stretches

    def by_stretches(make: Callable[..., Tensor], dtype: torch.dtype, *rows: Tensor) -> Tensor:
        key = (make.__code__, dtype, *((each.shape, each.stride(), each.dtype) for each in rows))
        if key not in known:
            before = Counter(counted.found)
            found = carry_out(make, dtype, *rows)
            known[key] = counted.found - before
            return found
        counted.found.update(known[key])
        return _empty(*rows[0].shape, dtype=dtype)

    return by_stretches


def _empty(*shape: int, dtype: torch.dtype = BFLOAT16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _state(where: Tensor, stream: StreamConfig) -> LatentState:
    """Tokens that are all as noisy."""
    count = where.shape[2]
    latents = _empty(1, count, stream.in_channels)
    mask, value = _empty(1, count, 1, dtype=torch.float32), _empty(1, dtype=torch.float32)
    return LatentState(latents, latents, mask, where, value, None)


def forwards(before: Numbers) -> Iterator[tuple[str, int]]:
    """Every number of this file under its name; ``before``: those that were recorded."""
    model, counters["graph_break"] = FullSize(), Counter()
    graphs = dict(model.compile(before))
    costs = functools.cache(lambda evaluation: (model.launched(evaluation), model.compiled(evaluation)))
    for recipe, form in product(RECIPES.values(), FORMATS):
        name, request, whole, used = f"{recipe.name}, {form}", Request.of("", recipe=recipe.name), 0, set[int]()
        for number, stage in enumerate(recipe.stages):
            evaluation = Evaluation(stage.shape(request.shape), request.settings.guidance if stage.guided else None)
            calls, kinds = _calls(stage, evaluation.shape, request.settings.steps), model.kinds(evaluation, form)
            launched, compiled = costs(evaluation)
            total, called = launched.outside + launched.within(kinds), compiled.within(kinds)
            used |= called.keys()
            whole += calls * total["flop"]
            within = sum(count * model.graphs[graph].launches for graph, count in called.items())
            of_stage = f"{name}, {stage_label(number)}"
            yield f"{of_stage}: evaluations", calls
            yield f"{of_stage}: FLOP", calls * total["flop"]
            yield f"{of_stage}: host waits of an evaluation", total["waits"]
            yield f"{of_stage}: launches of an evaluation", total["launches"]
            yield f"{of_stage}: launches of a compiled evaluation", launched.outside["launches"] + within
        yield f"{name}: FLOP", whole
        yield f"{name}: graphs", len(used)
    yield "graph breaks", counters["graph_break"].total()
    yield from graphs.items()


def _calls(stage: Stage, shape: VideoShape, steps: int) -> int:
    """How often the sampler calls the denoiser."""
    calls = 0

    def denoise(latents: AV[Tensor], sigma: Tensor) -> AV[Tensor]:
        nonlocal calls
        calls += 1
        return latents

    token, one = torch.zeros(1, 2, 2), torch.ones(1)
    state = LatentState(token, token, torch.ones(1, 2, 1), torch.zeros(1, 1, 2, 2), one, None)
    SAMPLERS[stage.sampler](denoise, AV(state, state), sigmas_of(stage.schedule, shape.tokens, steps))
    return calls
