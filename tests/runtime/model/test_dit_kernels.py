"""Attention kernels: each computes attention, one is chosen by measurement or by name, compiled blocks contain it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from dit_parts import distance, random_streams, tracing
from memory_meter import Watch
from support import relative_l2
from torch import Tensor

from ltxpack.errors import UsageError
from ltxpack.runtime.model import kernels
from ltxpack.runtime.model.kernels import KERNELS, AttentionKind, attention_kinds
from ltxpack.runtime.model.layers import Attention
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.sampling.shape import AV

CPU = torch.device("cpu")
VIDEO = AttentionKind("video", 2, 16, ((64, 64),), rotated=True, device=CPU, dtype=torch.float32)
TEXT = replace(VIDEO, name="text", rotated=False, lengths=((64, 9),))
AUDIO = replace(VIDEO, name="audio", width=8, lengths=((64, 5), (5, 64)))
KINDS = (VIDEO, TEXT, AUDIO)
# The kernels of a CPU, and what each is in a traced graph.
ON_CPU = {
    "sdpa": "torch._C._nn.scaled_dot_product_attention",
    "flash": "_scaled_dot_product_flash_attention_for_cpu",
    "math": "_scaled_dot_product_attention_math",
}
LENGTHS = AV(24, 9)


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> Iterator[None]:
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    kernels.measured.cache_clear()
    yield
    kernels.measured.cache_clear()


def install_flash3(monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    """A stand-in for the package, whose older releases also return the log-sum-exp. Its layout is [B, T, heads, d]."""

    def flash_attn_func(query: Tensor, key: Tensor, value: Tensor) -> Any:
        swapped = (part.transpose(1, 2) for part in (query, key, value))
        found = torch.nn.functional.scaled_dot_product_attention(*swapped).transpose(1, 2)
        return (found, None) if old else found

    package = ModuleType(kernels.FLASH3_PACKAGE)
    package.flash_attn_func = flash_attn_func
    package.__spec__ = object()
    monkeypatch.setitem(sys.modules, kernels.FLASH3_PACKAGE, package)


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query.double() @ key.double().mT / query.shape[-1] ** 0.5
    return scores.softmax(-1) @ value.double()


def alone(name: str) -> Callable[..., Tensor]:
    """A function that is one kernel."""

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return KERNELS[name](query, key, value)

    return kernel


def allowed_kernels() -> tuple[bool, ...]:
    """Which of torch's kernels are allowed for all threads."""
    backends = torch.backends.cuda
    asked = (backends.flash_sdp_enabled, backends.mem_efficient_sdp_enabled, backends.math_sdp_enabled)
    return (*(each() for each in asked), backends.cudnn_sdp_enabled())


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_of_a_cpu_computes_attention(name: str, dtype: torch.dtype) -> None:
    """It changes no setting that other threads see, and a compiled function contains it."""
    allowed = {allowed_kernels()}
    kind = replace(VIDEO, heads=3, width=8, dtype=dtype)
    operands = kind.random(17, 11)
    limit = 1e-6 if dtype == torch.float32 else 1e-2
    with Watch(lambda given, made: allowed.add(allowed_kernels())):
        found = KERNELS[name](*operands)
    assert relative_l2(found, exact(*operands)) <= limit
    assert kernels.fault(kind, name) is None and len(allowed) == 1
    graphs, backend = tracing()
    compiled = torch.compile(alone(name), backend=backend, fullgraph=True)
    assert torch.equal(compiled(*operands), found)
    (graph,) = graphs
    assert ON_CPU[name] in graph.code


@pytest.mark.parametrize("old", [False, True])
def test_flash_attention_3_is_called_in_its_own_layout(old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    install_flash3(monkeypatch, old)
    operands = VIDEO.random(17, 11)
    found = KERNELS["flash3"](*operands)
    assert found.shape == (1, 2, 17, 16)
    assert relative_l2(found, exact(*operands)) <= 1e-6
    assert kernels.choose(KINDS, "flash3").name == "flash3"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("flash3", "flash_attn_interface"),
        ("cudnn", "cudnn cannot be used here"),
        ("efficient", "efficient cannot be used here"),
        ("fastest", "auto, flash3, cudnn, flash, efficient, sdpa, math"),
    ],
)
def test_a_kernel_that_does_not_run_here_is_refused_by_name(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        kernels.choose(KINDS, name)
    assert "one that runs here (auto, flash, sdpa, math)" in str(caught.value)
    if name in ("cudnn", "efficient"):
        assert "unset LTXPACK_ATTENTION" in str(caught.value)
        assert "give --attention one that runs here" in str(caught.value)


def test_a_kernel_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"flash": lambda q, k, v: KERNELS["sdpa"](q, k, v) * 1.1, "math": lambda q, k, v: q * float("nan")}
    monkeypatch.setattr(kernels, "KERNELS", {**KERNELS, **wrong})
    for name in wrong:
        with pytest.raises(UsageError, match="wrong by"):
            kernels.choose(KINDS, name)


def test_on_a_cpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "milliseconds", lambda *arguments: pytest.fail("measured"))
    choice = kernels.choose(KINDS)
    assert (choice.name, choice.note) == ("sdpa", "attention: sdpa (torch's own choice; nothing is measured on a CPU)")


def test_the_environment_pins_and_a_name_beats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "math")
    assert kernels.choose(KINDS).note == "attention: math (by LTXPACK_ATTENTION)"
    assert kernels.choose(KINDS, "flash").note == "attention: flash (asked for)"
    assert kernels.choose(KINDS, "auto").name == "sdpa"
    monkeypatch.setenv(kernels.VARIABLE, "slow")
    with pytest.raises(UsageError, match="found slow"):
        kernels.choose(KINDS)


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ({"flash": 3.0, "math": 2.0, "sdpa": 1.0}, "sdpa"),
        ({"flash": 1.02, "math": 1.0, "sdpa": 1.01}, "flash"),  # as good as equal: the first
        ({"flash": 1.05, "math": 1.0, "sdpa": 0.99}, "math"),
    ],
)
def test_the_fastest_is_taken_and_measured_once(
    monkeypatch: pytest.MonkeyPatch, times: dict[str, float], best: str
) -> None:
    asked: list[str] = []

    def told(kind: AttentionKind, kernel: Callable[..., Tensor]) -> float:
        (name,) = (name for name in times if KERNELS[name] is kernel)
        asked.append(name)
        return times[name]

    monkeypatch.setattr(kernels, "milliseconds", told)
    names = ("flash3", "cudnn", *times)
    for _ in range(2):
        found = kernels.measured(VIDEO, names)
        assert found.best == best
        assert found.milliseconds == times
        assert set(found.refused) == {"flash3", "cudnn"}
    assert asked == list(times)


def test_where_none_of_them_runs_torch_chooses() -> None:
    found = kernels.measured(VIDEO, ("cudnn", "efficient"))
    assert (found.best, str(found)) == ("sdpa", "no other runs here")


def test_each_kind_of_attention_has_a_kernel_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card: one kernel does not run at the width of the sound's heads, another is slower for the text."""
    times = {("video", "math"): 1.0, ("video", "flash"): 2.0, ("text", "math"): 3.0, ("text", "flash"): 1.5}
    times |= {("audio", "flash"): 0.25}

    def narrow(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.shape[-1] < 16:
            raise RuntimeError("too narrow")
        return KERNELS["math"](query, key, value)

    def told(kind: AttentionKind, kernel: Callable[..., Tensor]) -> float:
        return times[kind.name, "math" if kernel is narrow else "flash"]

    monkeypatch.setattr(kernels, "milliseconds", told)
    monkeypatch.setattr(kernels, "KERNELS", {**KERNELS, "math": narrow})
    monkeypatch.setattr(kernels, "MEASURED", ("flash3", "flash", "math"))
    choice = kernels.fastest(KINDS)
    assert choice.kernels == {"video": "math", "text": "flash", "audio": "flash"}
    assert choice.name == "video math, text flash, audio flash"
    assert choice.note == (
        "attention: math for video (math 1.00 ms, flash 2.00 ms), flash for text (flash 1.50 ms, math 3.00 ms), "
        "flash for audio (flash 0.25 ms)"
    )
    assert choice.refused == {"flash3": "no package flash_attn_interface", "math for audio": "too narrow"}


def test_a_kernel_that_fails_at_some_length_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lone_key(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found = KERNELS["sdpa"](query, key, value)
        return torch.full_like(found, torch.nan) if key.shape[-2] == 1 else found

    monkeypatch.setattr(kernels, "KERNELS", {**KERNELS, "no lone key": no_lone_key})
    found = kernels.measured(VIDEO, ("no lone key", "math"))
    assert found.best == "math"
    assert found.refused == {"no lone key": "wrong by nan with 101 queries and 1 keys"}


def test_operands_are_measured_with_the_strides_they_have_in_a_block(dit: DiT) -> None:
    """The value is a view of projected tokens; queries and keys come from the rotation, or are such views too."""
    found: dict[str, set[tuple[tuple[int, ...], ...]]] = {}
    for module in dit.modules():
        if isinstance(module, Attention):
            module.kernel = partial(_noting_strides, found.setdefault(module.kind, set()))
    dit(random_streams(dit, LENGTHS))
    for kind in attention_kinds(dit.config, CPU, torch.float32):
        seen = set()
        _noting_strides(seen, *kind.random(24, 9))
        assert seen <= found[kind.name], kind.name
    assert {kind: len(strides) for kind, strides in found.items()} == {"video": 1, "text": 1, "audio": 2}


def _noting_strides(found: set[tuple[tuple[int, ...], ...]], *operands: Tensor) -> Tensor:
    """Notes for each operand its axes in the order of their strides, and computes."""
    assert all(math.prod(operand.shape) == operand.untyped_storage().nbytes() // 4 for operand in operands)
    found.add(tuple(tuple(sorted(range(4), key=operand.stride, reverse=True)) for operand in operands))
    return KERNELS["sdpa"](*operands)


def test_cudnn_is_not_asked_for_a_single_query_or_key(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Mock(side_effect=KERNELS["sdpa"])
    monkeypatch.setattr(kernels, "_cudnn_alone", alone)
    for queries, keys, more in ((1, 5, 0), (5, 1, 0), (1, 1, 0), (2, 5, 1)):
        operands = VIDEO.random(queries, keys)
        assert torch.equal(KERNELS["cudnn"](*operands), KERNELS["sdpa"](*operands))
        assert alone.call_count == more


@pytest.mark.parametrize(("version", "best"), [(91500, "sdpa"), (91501, "cudnn")])
def test_an_old_cudnn_is_taken_only_where_it_is_asked_for(
    version: int, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(kernels, "_cudnn_alone", KERNELS["sdpa"])
    choice = kernels.measured(VIDEO, ("cudnn",))
    assert choice.best == best
    assert choice.refused == ({} if best == "cudnn" else {"cudnn": "cuDNN 91500 is older than 91501"})
    assert kernels.choose(KINDS, "cudnn").name == "cudnn"


def test_out_of_memory_while_measuring_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "milliseconds", Mock(side_effect=torch.OutOfMemoryError("too much")))
    choice = kernels.measured(VIDEO, ("flash", "math"))
    assert (choice.best, choice.refused["flash"]) == ("sdpa", "no memory to measure it")


def test_time_is_measured_for_real() -> None:
    choice = kernels.measured(AUDIO, tuple(ON_CPU))
    assert choice.best in ON_CPU
    assert all(value > 0 for value in choice.milliseconds.values())


@pytest.mark.parametrize("name", ON_CPU)
def test_the_model_gives_the_same_with_every_kernel(dit: DiT, name: str) -> None:
    streams = random_streams(dit, LENGTHS)
    expected = dit(streams)
    choice = kernels.choose(attention_kinds(dit.config, CPU, torch.float32), name)
    assert (choice.name, choice.note) == (name, f"attention: {name} (asked for)")
    dit.use_attention(choice.kernels)
    found = dit(streams)
    assert distance(found, expected) <= 1e-6


def test_each_attention_takes_the_kernel_of_its_kind(dit: DiT) -> None:
    dit.use_attention({"video": "math", "text": "flash", "audio": "cudnn"})
    for block in dit.blocks():
        assert (block.attn1.kernel, block.attn2.kernel) == (KERNELS["math"], KERNELS["flash"])
        others = (block.audio_attn1, block.audio_attn2, block.audio_to_video_attn, block.video_to_audio_attn)
        assert {attention.kernel for attention in others} == {KERNELS["cudnn"]}


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
def test_the_kernels_of_a_card_are_one_operator_in_one_graph(name: str) -> None:
    """On the meta device, where shapes alone are computed; eager, and traced by the compiler."""
    graphs, backend = tracing()
    for kind, (queries, keys) in ((VIDEO, (24, 24)), (TEXT, (24, 7)), (AUDIO, (24, 5)), (AUDIO, (5, 24))):
        on_meta = [part.to("meta", torch.bfloat16) for part in kind.random(queries, keys)]
        for function in (alone(name), torch.compile(alone(name), backend=backend, fullgraph=True)):
            found = function(*on_meta)
            assert (found.shape, found.dtype) == (on_meta[0].shape, torch.bfloat16)
    assert graphs and all(
        graph.code.count(f"torch.ops.aten._scaled_dot_product_{name}_attention(") == 1 for graph in graphs
    )


def test_a_compiled_block_contains_the_kernel_of_its_day(dit: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph, here of an isolated pass; another kernel chosen later is not answered from the old graph."""
    install_flash3(monkeypatch, old=False)
    graphs, backend = tracing()
    streams = random_streams(dit, LENGTHS)
    expected = dit(streams, isolated=True)
    dit.compile_blocks(backend=backend, fullgraph=True)
    for name, mark in (("sdpa", ON_CPU["sdpa"]), ("flash3", "ltxpack.flash_attention_3")):
        graphs.clear()
        dit.use_attention(name)
        assert distance(dit(streams, isolated=True), expected) <= 1e-6
        assert sum(mark in graph.code for graph in graphs) == 1, name
        assert len(graphs) == (3 if name == "sdpa" else 1), "the text's keys, and what is fed forward, need no kernel"
    graphs.clear()
    dit.use_attention("sdpa")
    dit(streams, isolated=True)
    assert not graphs, "the graphs of each kernel are kept"
