"""What a forward of every recipe costs, counted at full size without a card: FLOP, kernels launched, graphs, bytes.

Weights and inputs are on the meta device. Blocks are alike, so few are gone through and the others are added up.
Inductor schedules each graph as it would for an H200 and stops before it generates code: that needs neither CUDA nor
Triton nor a compiler.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._guards import TracingContext, tracing
from torch._inductor import config, scheduler
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import MultiOutput
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from ltxpack.ltx23.classes import TEXT_TOKENS
from ltxpack.ltx23.codes import CODES, coded_linears, with_codes
from ltxpack.ltx23.published import published_configs, published_tensors
from ltxpack.manifest import BF16, FP8
from ltxpack.runtime.model.block import PLAIN
from ltxpack.runtime.model.config import DiTConfig, StreamConfig
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.model.quantised import put_quantised
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling.conditioning import LatentState, positions
from ltxpack.runtime.sampling.guidance import Denoiser
from ltxpack.runtime.sampling.recipes import HQ, RECIPES, Guidance, Stage, stage_label
from ltxpack.runtime.sampling.sample import SAMPLERS
from ltxpack.runtime.sampling.schedule import sigmas_of
from ltxpack.runtime.sampling.shape import AV, VideoShape

FORMS = (BF16, FP8)
BFLOAT16 = torch.bfloat16
META = torch.device("meta")
aten = torch.ops.aten
# One kernel on a card, though torch can also make them of others.
WHOLE = {aten.rms_norm.default, aten.layer_norm.default, aten.gelu.default, aten.silu.default}
# What the host cannot know before the card has computed it.
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# The graphs of a block in the order in which the passes of a guided step need them.
GRAPHS = ("text", "attend", "exchange", "attend perturbed", "exchange isolated")


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what a card is asked for: kernels, FLOP of products and attention, and what the host would wait for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in WHOLE and func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        given = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        if WAITS & set(func.tags) or any(arg.device.type == "cpu" and arg.dim() for arg in given):
            self.found["waits"] += 1
        if func is aten._local_scalar_dense.default:
            return 0
        made = func(*args, **kwargs)
        if not _is_view(func):
            self.found["launches"] += 1
            self.found["flop"] += _flop(func, args, kwargs, made)
        return made


def _is_view(func: Any) -> bool:
    """Also what only makes room."""
    outs = [given.alias_info for given in func._schema.returns]
    return func.overloadpacket is aten.empty or all(alias is not None and not alias.is_write for alias in outs)


def _flop(func: Any, args: Any, kwargs: Any, made: Any) -> int:
    if func.overloadpacket is getattr(aten, "_scaled_mm_v2", None):  # torch itself does not count it
        (rows, inner), (_, columns) = args[0].shape, args[1].shape
        return int(2 * rows * inner * columns)
    counts = flop_registry.get(func.overloadpacket)
    return 0 if counts is None else int(counts(*args, **kwargs, out_val=made))


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
    """A block as a forward meets it: whether its linears are in codes, and whether a pass perturbs it."""

    coded: bool = False
    perturbed: bool = False


@dataclass(frozen=True)
class Graph:
    """A graph as inductor schedules it: kernels of its own, calls of libraries, bytes that its own kernels move."""

    kernels: int
    libraries: int
    moved: int

    @property
    def launches(self) -> int:
        """All of them."""
        return self.kernels + self.libraries


class FullSize:
    """The published transformer on the meta device: a block in bf16, one in fp8, and what is around them."""

    def __init__(self) -> None:
        configs = published_configs()
        with torch.device(META):
            self.dit = DiT(DiTConfig.from_dict(configs["transformer"])).to(BFLOAT16).requires_grad_(False)
        self.dit.use_attention("flash")
        coded = coded_linears({name: dtype for name, dtype, _ in with_codes(_transformer(configs), CODES[FP8])})
        self.coded = {int(name.split(".")[1]) for name in coded}
        self.count = len(self.dit.blocks())
        put_quantised(self.dit, coded)
        self.blocks = [self.dit.blocks()[number] for number in (0, min(self.coded))]
        self.graphs: list[Graph] = []
        self._traced: list[GraphModule] = []
        self._called: Counter[int] = Counter()

    def launched(self, evaluation: Evaluation, form: str) -> tuple[Counter[str], Counter[str]]:
        """What :class:`Counted` counts of a call of the denoiser outside the blocks and in them, nothing compiled."""
        counted, functions = Counted(), [block.functions for block in self.blocks]
        for block in self.blocks:
            block.functions = PLAIN
        found = self._costs(evaluation, form, counted.found, counted)
        for block, before in zip(self.blocks, functions, strict=True):
            block.functions = before
        return found

    def compiled(self, evaluation: Evaluation, form: str) -> Counter[int]:
        """How often each of :attr:`graphs` is called in a call of the denoiser."""
        if not self.graphs:
            self._compile()
        return self._costs(evaluation, form, self._called, nullcontext())[1]

    def _costs(
        self, evaluation: Evaluation, form: str, counter: Counter[Any], within: AbstractContextManager[Any]
    ) -> tuple[Counter[Any], Counter[Any]]:
        """What ``counter`` counts outside the blocks, and in all of them: one of each kind is gone through.

        The first is one for itself, as passes share more work in it.
        """
        first, *others = (
            Kind(form == FP8 and number in self.coded, number in evaluation.perturbed) for number in range(self.count)
        )
        counts = [(first, 1), *Counter(others).items()]
        marks: list[Counter[Any]] = []
        counter.clear()
        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_pre_hook(lambda *_: marks.append(Counter(counter))).remove)
                stack.callback(block.register_forward_hook(lambda *_: marks.append(Counter(counter))).remove)
            self._evaluate(evaluation, [kind for kind, _ in counts], within)
        outside, blocks = Counter(counter), Counter[Any]()
        for (_, count), before, after in zip(counts, marks[::2], marks[1::2], strict=True):
            once = after - before
            outside -= once
            blocks.update({what: count * found for what, found in once.items()})
        return outside, blocks

    def _compile(self) -> None:
        """Schedule every graph at the first stage of hq, with all four passes."""
        torch.compiler.reset()
        self.dit.transformer_blocks = nn.ModuleList(self.blocks)
        self.dit.compile_blocks(backend=self._backend)
        stage, request = HQ.stages[0], Request.of("", recipe=HQ.name)
        guidance = request.settings.guidance.map(lambda one: replace(one, stg=1.0, stg_blocks=frozenset({0})))
        for coded in (False, True):
            kinds = [Kind(coded, perturbed=True)]
            self._evaluate(Evaluation(stage.shape(request.shape), guidance), kinds, nullcontext())
        self.graphs = [scheduled(graph) for graph in self._traced]

    def _backend(self, graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        number, made = len(self._traced), dict[Any, Any]()
        self._traced.append(graph)

        def run(*given: Any) -> Any:
            # Tensors without content serve again.
            self._called[number] += 1
            key = tuple(one.shape if isinstance(one, Tensor) else one for one in given)
            return made[key] if key in made else made.setdefault(key, graph(*given))

        return run

    def _evaluate(self, evaluation: Evaluation, kinds: Sequence[Kind], within: AbstractContextManager[Any]) -> None:
        """One call of the denoiser, with such blocks."""
        streams = self.dit.config.streams
        self.dit.transformer_blocks = nn.ModuleList(self.blocks[kind.coded] for kind in kinds)
        perturbed = frozenset(number for number, kind in enumerate(kinds) if kind.perturbed)
        guidance = evaluation.guidance and evaluation.guidance.map(lambda one: replace(one, stg_blocks=perturbed))
        prompt, negative = (streams.map(lambda one: _empty(1, TEXT_TOKENS, one.dim)) for _ in range(2))
        where = positions(evaluation.shape).map(lambda one: one.to(META))
        state = where.map(_state, streams)
        rope = self.dit.rope(where, BFLOAT16, META)
        denoiser = Denoiser(self.dit, prompt, negative, guidance)
        sigma = _empty(1, dtype=torch.float32)
        with within:
            denoiser(state.map(lambda one: one.latents), sigma, state, rope)


def _transformer(configs: Mapping[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    return published_tensors({"transformer": configs["transformer"]})["transformer"]


def _empty(*shape: int, dtype: torch.dtype = BFLOAT16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _state(where: Tensor, stream: StreamConfig) -> LatentState:
    """Tokens that are all as noisy."""
    count = where.shape[2]
    latents = _empty(1, count, stream.in_channels)
    mask, value = _empty(1, count, 1, dtype=torch.float32), _empty(1, dtype=torch.float32)
    return LatentState(latents, latents, mask, where, value, None, count)


class Scheduled(Exception):
    """The scheduler is done; no code is needed."""


def scheduled(graph: GraphModule) -> Graph:
    """What inductor makes of a graph that dynamo traced, at the sizes it was traced with, on an H200."""
    found: list[Graph] = []

    def stop(lowered: GraphLowering) -> None:
        lowered.init_wrapper_code()
        lowered._update_scheduler()
        found.append(_read(lowered.scheduler.nodes))
        raise Scheduled

    def on_card(graph: GraphModule, inputs: Sequence[Any], **more: Any) -> Any:
        for node in graph.graph.nodes:
            node.meta["val"] = tree_map(partial(_like, device="cuda", mode=mode), node.meta.get("val"))
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
        with _as_if_there_were_a_card(), patch.object(GraphLowering, "codegen", stop):
            return compile_fx_inner(graph, [_like(one, "cuda", mode) for one in inputs], **more)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = [_like(node.meta["example_value"], "cpu", mode) for node in graph.graph.find_nodes(op="placeholder")]
    try:
        # Padding is decided by measurement, which takes a card.
        with tracing(TracingContext(mode)), config.patch(shape_padding=False):
            compile_fx(graph, inputs, inner_compile=on_card)
    except InductorError:
        if not found:
            raise
    return found[0]


def _read(nodes: Sequence[Any]) -> Graph:
    """Views, and the parts of what a library gives, are no kernels."""
    kernels = [node for node in nodes if not node.is_extern() and not isinstance(node, NopKernelSchedulerNode)]
    libraries = [node for node in nodes if node.is_extern() and not isinstance(node.node, MultiOutput)]
    return Graph(len(kernels), len(libraries), sum(node.get_read_write_buffers_sizes() for node in kernels))


def _like(value: Any, device: str, mode: FakeTensorMode) -> Any:
    """A tensor of the same layout on ``device``, of fixed sizes; a symbol's value."""
    if isinstance(value, Tensor):
        size, stride = ([_like(one, device, mode) for one in sizes] for sizes in (value.size(), value.stride()))
        with mode:
            return torch.empty_strided(size, stride, dtype=value.dtype, device=device)
    return value.node.hint if isinstance(value, torch.SymInt) else value


@contextmanager
def _as_if_there_were_a_card() -> Iterator[None]:
    """What inductor asks of CUDA and Triton before it generates code."""
    card = DeviceProperties(
        type="cuda",
        index=0,
        multi_processor_count=132,
        cc=90,
        major=9,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        warp_size=32,
    )
    told = SimpleNamespace(name="NVIDIA H200", gcnArchName="", minor=0, **card._asdict())
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: told,
        "get_rng_state": lambda device=None: torch.zeros(1),
        "set_rng_state": lambda state, device=None: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(DeviceProperties, "create", lambda device: card))
        stack.enter_context(patch.object(scheduler, "has_triton", lambda *given: True))
        stack.enter_context(patch.object(fake_tensor, "init_gpu_context", lambda device: None))
        yield


def forwards() -> Iterator[tuple[str, int]]:
    """Every number of this file under its name."""
    model, counters["graph_break"] = FullSize(), Counter()
    costs = functools.cache(partial(_cost, model))
    for recipe, form in product(RECIPES.values(), FORMS):
        name, request, whole, used = f"{recipe.name}, {form}", Request.of("", recipe=recipe.name), 0, set[int]()
        for number, stage in enumerate(recipe.stages):
            evaluation = Evaluation(stage.shape(request.shape), request.settings.guidance if stage.guided else None)
            calls, cost = _calls(stage, evaluation.shape, request.settings.steps), costs(evaluation, form)
            used |= cost.graphs
            whole += calls * cost.flop
            of_stage = f"{name}, {stage_label(number)}"
            yield f"{of_stage}: evaluations", calls
            yield f"{of_stage}: FLOP", calls * cost.flop
            yield f"{of_stage}: host waits of an evaluation", cost.waits
            yield f"{of_stage}: launches of an evaluation", cost.launches
            yield f"{of_stage}: launches of a compiled evaluation", cost.compiled
        yield f"{name}: FLOP", whole
        yield f"{name}: graphs", len(used)
    yield "graph breaks", counters["graph_break"].total()
    for number, graph in enumerate(model.graphs):
        of_form, own = divmod(number, len(GRAPHS))
        name = f"graph {FORMS[of_form]} {GRAPHS[own]}" if of_form < len(FORMS) else f"graph {number + 1}"
        yield f"{name}: kernels", graph.kernels
        yield f"{name}: library calls", graph.libraries
        yield f"{name}: bytes moved by kernels", graph.moved


@dataclass(frozen=True)
class Cost:
    """An evaluation: FLOP, waits of the host, launches without and with compiled blocks, and the graphs of these."""

    flop: int
    waits: int
    launches: int
    compiled: int
    graphs: frozenset[int]


def _cost(model: FullSize, evaluation: Evaluation, form: str) -> Cost:
    outside, blocks = model.launched(evaluation, form)
    calls = model.compiled(evaluation, form)
    within = sum(count * model.graphs[number].launches for number, count in calls.items())
    flop, waits, launches = (outside[what] + blocks[what] for what in ("flop", "waits", "launches"))
    return Cost(flop, waits, launches, outside["launches"] + within, frozenset(calls))


def _calls(stage: Stage, shape: VideoShape, steps: int) -> int:
    """How often the sampler calls the denoiser."""
    calls = 0

    def denoise(latents: AV[Tensor], sigma: Tensor) -> AV[Tensor]:
        nonlocal calls
        calls += 1
        return latents

    token, one = torch.zeros(1, 2, 2), torch.ones(1)
    state = LatentState(token, token, torch.ones(1, 2, 1), torch.zeros(1, 1, 2, 2), one, None, 2)
    SAMPLERS[stage.sampler](denoise, AV(state, state), sigmas_of(stage.schedule, shape.tokens, steps))
    return calls
