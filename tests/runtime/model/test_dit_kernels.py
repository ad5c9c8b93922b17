"""Attention kernels: each computes attention, one is chosen by measurement or by name, compiled blocks contain it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from dit_parts import SMALL, built, random_streams, random_weights
from support import relative_l2
from torch import Tensor

from ltxpack.errors import UsageError
from ltxpack.reporter import SilentReporter
from ltxpack.runtime import tuning
from ltxpack.runtime.model import DiT, kernels
from ltxpack.runtime.model.kernels import KERNELS, Heads
from ltxpack.runtime.sampling.av import AV
from ltxpack.runtime.tuning import Tuning, tune

CPU = torch.device("cpu")
HEADS = Heads(2, 16, CPU, torch.float32)
ON_CPU = ("sdpa", "flash", "math")
LENGTHS = AV(24, 9)


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    kernels.measured.cache_clear()
    torch.compiler.reset()
    yield
    kernels.measured.cache_clear()
    torch.compiler.reset()


@pytest.fixture
def dit() -> DiT:
    return built(SMALL, random_weights(SMALL))


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


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_of_a_cpu_computes_attention(name: str, dtype: torch.dtype) -> None:
    heads = Heads(3, 8, CPU, dtype)
    operands = heads.random(17, 11)
    limit = 1e-6 if dtype == torch.float32 else 1e-2
    assert relative_l2(KERNELS[name](*operands), exact(*operands)) <= limit
    assert kernels.fault(heads, name) is None


@pytest.mark.parametrize("old", [False, True])
def test_flash_attention_3_is_called_in_its_own_layout(old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    install_flash3(monkeypatch, old)
    operands = HEADS.random(17, 11)
    found = KERNELS["flash3"](*operands)
    assert found.shape == (1, 2, 17, 16)
    assert relative_l2(found, exact(*operands)) <= 1e-6
    assert kernels.choose(HEADS, "flash3").name == "flash3"


def test_flash_attention_3_is_refused_where_it_is_not_installed() -> None:
    with pytest.raises(UsageError, match="flash_attn_interface"):
        kernels.choose(HEADS, "flash3")


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
def test_a_kernel_that_does_not_run_here_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} cannot be used here") as caught:
        kernels.choose(HEADS, name)
    assert "unset LTXPACK_ATTENTION" in str(caught.value)
    assert "give --attention one that runs here (auto, flash, sdpa, math)" in str(caught.value)


def test_an_unknown_kernel_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="auto, flash3, cudnn, flash, efficient, sdpa, math") as caught:
        kernels.choose(HEADS, "fastest")
    assert "one that runs here (auto, flash, sdpa, math)" in str(caught.value)


def test_a_kernel_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"flash": lambda q, k, v: KERNELS["math"](q, k, v) * 1.1, "efficient": lambda q, k, v: q * float("nan")}
    monkeypatch.setattr(kernels, "KERNELS", {**KERNELS, **wrong})
    for name in wrong:
        with pytest.raises(UsageError, match="wrong by"):
            kernels.choose(HEADS, name)


def test_on_a_cpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "milliseconds", lambda *arguments: pytest.fail("measured"))
    choice = kernels.choose(HEADS)
    assert (choice.name, choice.note) == ("sdpa", "attention: sdpa (torch's own choice; nothing is measured on a CPU)")


def test_the_environment_pins_and_a_name_beats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "math")
    assert kernels.choose(HEADS).note == "attention: math (by LTXPACK_ATTENTION)"
    assert kernels.choose(HEADS, "flash").note == "attention: flash (asked for)"
    assert kernels.choose(HEADS, "auto").name == "sdpa"
    monkeypatch.setenv(kernels.VARIABLE, "slow")
    with pytest.raises(UsageError, match="found slow"):
        kernels.choose(HEADS)


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ({"flash": 3.0, "math": 2.0, "sdpa": 1.0}, "sdpa"),
        ({"flash": 1.02, "math": 1.0, "sdpa": 1.01}, "flash"),  # as good as equal: the first
        ({"flash": 1.05, "math": 1.0, "sdpa": 0.99}, "math"),
    ],
)
def test_the_fastest_is_taken_once(monkeypatch: pytest.MonkeyPatch, times: dict[str, float], best: str) -> None:
    asked: list[str] = []

    def told(heads: Heads, kernel: Callable[..., Tensor], tokens: int) -> float:
        (name,) = (name for name in times if KERNELS[name] is kernel)
        asked.append(name)
        return times[name]

    monkeypatch.setattr(kernels, "milliseconds", told)
    names = ("flash3", "cudnn", *times)
    for _ in range(2):
        choice = kernels.measured(HEADS, names, 64)
        assert choice.name == best
        assert choice.milliseconds == times
        assert set(choice.refused) == {"flash3", "cudnn"}
        assert choice.note.startswith(f"attention: {best} (of 16384 tokens: ")
    assert asked == list(times)


def test_where_none_of_them_runs_torch_chooses() -> None:
    choice = kernels.measured(HEADS, ("cudnn", "efficient"), 64)
    assert (choice.name, choice.note) == ("sdpa", "attention: sdpa (no other runs here)")


def test_a_kernel_that_fails_at_some_width_or_length_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = Heads(2, 16, CPU, torch.float32, others=(8,))

    def narrow(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.shape[-1] < 16:
            raise RuntimeError("too narrow")
        return KERNELS["sdpa"](query, key, value)

    def no_lone_key(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found = KERNELS["sdpa"](query, key, value)
        return torch.full_like(found, torch.nan) if key.shape[-2] == 1 else found

    monkeypatch.setattr(kernels, "KERNELS", {**KERNELS, "narrow": narrow, "no lone key": no_lone_key})
    choice = kernels.measured(heads, ("narrow", "no lone key", "math"), 64)
    assert choice.name == "math"
    assert choice.refused == {"narrow": "too narrow", "no lone key": "wrong by nan with 101 queries and 1 keys"}


def test_cudnn_is_not_asked_for_a_single_query_or_key(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(kernels, "_cudnn_alone", lambda *operands: asked.append(1) or KERNELS["sdpa"](*operands))
    for queries, keys, more in ((1, 5, 0), (5, 1, 0), (1, 1, 0), (2, 5, 1)):
        operands = HEADS.random(queries, keys)
        assert torch.equal(KERNELS["cudnn"](*operands), KERNELS["sdpa"](*operands))
        assert len(asked) == more


@pytest.mark.parametrize(("version", "best"), [(91500, "sdpa"), (91501, "cudnn")])
def test_an_old_cudnn_is_taken_only_where_it_is_asked_for(
    version: int, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(kernels, "_cudnn_alone", KERNELS["sdpa"])
    choice = kernels.measured(HEADS, ("cudnn",), 64)
    assert choice.name == best
    assert choice.refused == ({} if best == "cudnn" else {"cudnn": "cuDNN 91500 is older than 91501"})
    assert kernels.choose(HEADS, "cudnn").name == "cudnn"


def test_out_of_memory_while_measuring_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(*arguments: object) -> float:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(kernels, "milliseconds", hungry)
    choice = kernels.measured(HEADS, ("flash", "math"), 64)
    assert (choice.name, choice.refused["flash"]) == ("sdpa", "no memory to measure it")


def test_time_is_measured_for_real() -> None:
    choice = kernels.measured(HEADS, ON_CPU, 64)
    assert choice.name in ON_CPU
    assert all(value > 0 for value in choice.milliseconds.values())


class Notes(SilentReporter):
    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, message: str) -> None:
        self.told.append(message)


@pytest.mark.parametrize("name", ON_CPU)
def test_the_model_gives_the_same_with_every_kernel(dit: DiT, name: str) -> None:
    streams = random_streams(dit, LENGTHS)
    expected = dit(streams)
    notes = Notes()
    assert tune(dit, Tuning(attention=name), notes).name == name
    assert notes.told == [f"attention: {name} (asked for)"]
    found = dit(streams)
    assert max(found.map(relative_l2, expected).video, found.map(relative_l2, expected).audio) <= 1e-6


def test_what_was_chosen_before_loading_is_used_as_it_is(dit: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = tuning.heads_of(dit.config, CPU, torch.float32)
    assert heads == tuning.attention_heads(dit)
    choice = kernels.choose(heads, "math")
    monkeypatch.setattr(kernels, "choose", lambda *arguments: pytest.fail("chosen again"))
    assert tune(dit, Tuning(attention=choice), SilentReporter()) is choice
    assert all(block.attn1.kernel is KERNELS["math"] for block in dit.blocks())


@pytest.mark.parametrize("name", [*ON_CPU, "flash3"])
def test_a_compiled_block_contains_the_kernel_of_its_day(dit: DiT, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph; another kernel chosen later is not answered from the old graph."""
    install_flash3(monkeypatch, old=False)
    graphs: list[str] = []

    def backend(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    streams = random_streams(dit, LENGTHS)
    expected = dit(streams)
    dit.compile_blocks(backend=backend, fullgraph=True)
    dit(streams)
    before = len(graphs)
    dit.use_attention(name)
    found = dit(streams)
    assert max(found.map(relative_l2, expected).video, found.map(relative_l2, expected).audio) <= 1e-6
    marks = {"sdpa": "scaled_dot_product_attention", "flash": "'FLASH_ATTENTION'", "math": "'MATH'"}
    new = graphs[before:]
    assert len(new) == (0 if name == "sdpa" else 2)
    assert all(marks.get(name, "ltxpack.flash_attention_3") in code for code in new)
