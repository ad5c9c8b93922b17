"""What inductor makes of a graph, without a card: its own kernels, calls of libraries, and bytes that its kernels move.

It schedules each graph as it would for an H200 and stops before it generates code: that needs neither CUDA nor Triton
nor a compiler.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
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
from torch.fx.node import _get_qualified_name, map_aggregate, map_arg
from torch.utils._pytree import tree_map


class Graph(NamedTuple):
    """A graph as inductor schedules it: kernels of its own, calls of libraries, bytes that its own kernels move."""

    kernels: int
    libraries: int
    moved: int

    @property
    def launches(self) -> int:
        """All of them."""
        return self.kernels + self.libraries


class Scheduled(Exception):
    """The scheduler is done; no code is needed."""


def trace_of(graph: GraphModule) -> int:
    """A hash of all that :func:`scheduled` follows: the graph, the layout of each value in it, torch, and this file.

    Names are not in it: those that dynamo gives follow the source.
    """
    numbers = {node: f"%{number}" for number, node in enumerate(graph.graph.nodes)}
    lines = [torch.__version__, Path(__file__).read_text(encoding="utf-8")]
    for node in graph.graph.nodes:
        target = _get_qualified_name(node.target) if callable(node.target) else node.target
        called = "" if node.op == "placeholder" else (target, map_arg((node.args, node.kwargs), numbers.__getitem__))
        lines.append(f"{node.op} {called} {tree_map(_layout, node.meta.get('example_value'))}")
    return int.from_bytes(hashlib.sha256("\n".join(lines).encode()).digest()[:6])


def _layout(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return _hint(value)
    sizes, strides = (tuple(map(_hint, some)) for some in (value.size(), value.stride()))
    return f"{value.dtype} {sizes} {strides}"


def _hint(size: Any) -> Any:
    """A symbol's value."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


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
        _move(graph, torch.device("cuda", 0))
        with _as_if_there_were_a_card(), patch.object(GraphLowering, "codegen", stop):
            return compile_fx_inner(graph, [_like(one, "cuda", mode) for one in inputs], **more)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    graph = GraphModule(graph, copy.deepcopy(graph.graph))
    _move(graph, torch.device("cpu"))
    inputs = [_like(node.meta["example_value"], "cpu", mode) for node in graph.graph.find_nodes(op="placeholder")]
    try:
        # Padding is decided by measurement, which takes a card.
        with tracing(TracingContext(mode)), config.patch(shape_padding=False):
            compile_fx(graph, inputs, inner_compile=on_card)
    except InductorError:
        if not found:
            raise
    return found[0]


def _move(graph: GraphModule, device: torch.device) -> None:
    """What the graph makes of nothing is made on ``device``."""
    for node in graph.graph.nodes:
        node.args, node.kwargs = map_aggregate(
            (node.args, node.kwargs), lambda one: device if isinstance(one, torch.device) else one
        )
    graph.recompile()


def _read(nodes: Sequence[Any]) -> Graph:
    """Views, and the parts of what a library gives, are no kernels."""
    kernels = [node for node in nodes if not node.is_extern() and not isinstance(node, NopKernelSchedulerNode)]
    libraries = [node for node in nodes if node.is_extern() and not isinstance(node.node, MultiOutput)]
    return Graph(len(kernels), len(libraries), sum(node.get_read_write_buffers_sizes() for node in kernels))


def _like(value: Any, device: str, mode: FakeTensorMode) -> Any:
    """A tensor of the same layout on ``device``, of fixed sizes; a symbol's value."""
    if isinstance(value, Tensor):
        size, stride = (list(map(_hint, some)) for some in (value.size(), value.stride()))
        with mode:
            return torch.empty_strided(size, stride, dtype=value.dtype, device=device)
    return _hint(value)


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
