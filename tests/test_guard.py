"""benchmarks/guard.py: what is counted is what is recorded, and what would not be is seen."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import _guard_cards
import _guard_phases
import guard
import pytest
import torch
from _flops import run_flops
from _gpu_sizes import REAL, TRANSFORMER
from _guard_forward import Evaluation, FullSize
from _guard_graphs import Graph, scheduled, trace_of
from _guard_operations import Counted
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F

from ltxpack.ltx23.classes import TEXT_TOKENS
from ltxpack.manifest import BF16, FORMATS
from ltxpack.runtime.codecs import tiles
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.overlay import official_transformers
from ltxpack.runtime.parallel import schemes
from ltxpack.runtime.parallel.exchange import Exchange
from ltxpack.runtime.parallel.front import Front
from ltxpack.runtime.parallel.schemes import Lengths, Split, forward_flops
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling.recipes import RECIPES
from ltxpack.runtime.settings import MODES
from ltxpack.runtime.weights import plan

META, ON_HOST = torch.device("meta"), torch.ones(64, 64)
CONFIG = DiTConfig.from_dict(TRANSFORMER)


@pytest.mark.parametrize("group", guard.GROUPS)
def test_nothing_has_grown(group: str, fresh_compiler: None) -> None:
    """Nor shrunk unnoticed. One graph is scheduled again although it is as recorded."""
    unlike = guard.of_another_torch(group)
    if unlike:
        pytest.skip(unlike)
    recorded = guard.recorded(group)
    before = {name: number for name, number in recorded.items() if name != "graph fp8 text: trace"}
    differ = guard.faults(recorded, guard.counted(group, before))
    assert not differ, guard.report(differ)


def test_every_recipe_is_guarded_in_every_form_and_mode_and_waits_for_nothing() -> None:
    forwards, videos, phases, cards = map(guard.recorded, ("forwards", "videos", "phases", "cards"))
    for recipe in RECIPES.values():
        for form in FORMATS:
            name = f"{recipe.name}, {form}"
            stages = [f"{name}, stage {number + 1}: FLOP" for number in range(len(recipe.stages))]
            assert forwards[f"{name}: FLOP"] == sum(forwards[stage] for stage in stages)
            assert all(f"{name}, {mode}: card memory" in videos for mode in MODES)
        parts = ("text", "upsample", "sound", "video")
        whole = phases[f"{recipe.name}, all but the stages: FLOP"]
        assert whole == sum(phases.get(f"{recipe.name}, {part}: FLOP", 0) for part in parts)
        assert all(f"{recipe.name}, auto on {count}: FLOP" in cards for count in _guard_cards.CARDS)
    waits = {value for name, value in forwards.items() if name.endswith("host waits of an evaluation")}
    assert waits == {0} and forwards["graph breaks"] == 0


def test_a_number_that_differs_too_much_is_named_with_what_was_and_what_is() -> None:
    for group in guard.GROUPS:
        was = guard.recorded(group)
        for name, number in was.items():
            allowed = guard.TOLERANCES.get(name.rpartition(": ")[2], 0)
            if allowed < 1:
                now = number + 1 + math.ceil(allowed * number)
                (told,) = guard.faults(was, {**was, name: now})
                assert told.startswith(f"{name}: {number:,} is recorded, {now:,} is counted")


def test_operations_are_those_torch_counts() -> None:
    """The formula of schemes.py leaves out what is around the blocks."""
    stages = {"stage 1": (REAL.lengths(1), 31, True), "stage 2": (REAL.lengths(2), 7, False)}
    forwards = guard.recorded("forwards")
    for stage, count in run_flops(CONFIG, stages).items():
        assert 0 < forwards[f"hq, bf16, {stage}: FLOP"] - count < 2e-4 * count


def evaluation(recipe: str, number: int) -> Evaluation:
    request = Request.of("", recipe=recipe)
    stage = request.recipe.stages[number]
    return Evaluation(stage.shape(request.shape), request.settings.guidance if stage.guided else None)


def test_blocks_of_a_kind_cost_the_same() -> None:
    """Also where a pass is perturbed in one block: up to there it shares its work with the positive pass."""
    model, guided = FullSize(), evaluation("two-stage", 0)
    assert len(set(model.kinds(guided, BF16))) == 3
    model.count = 5
    assert guided.guidance is not None
    guided = replace(guided, guidance=guided.guidance.map(lambda one: replace(one, stg_blocks=frozenset({2}))))
    kinds, once, whole = model.kinds(guided, BF16), model.launched(guided), Counted()
    model.evaluate(guided, kinds, whole)
    found = once.outside + once.within(kinds)
    assert {what: found[what] for what in found} == +whole.found and found["flop"]


class CountingExchange(Exchange):
    """What comes to rank 1 of ``size``, by number of bytes alone."""

    def __init__(self, size: int) -> None:
        self.rank, self.size, self.alike, self.received = 1, size, True, 0

    def group(self, split: Split) -> Any:
        return split.shards

    def broadcast(self, tensor: Tensor, owner: int) -> Tensor:
        self.received += 0 if owner == self.rank else tensor.nbytes
        return tensor

    def all_to_all(self, parts: Tensor, group: Any) -> Tensor:
        self.received += parts.nbytes // group * (group - 1)
        return torch.empty_like(parts)

    def all_gather(self, part: Tensor, group: Any) -> Tensor:
        self.received += part.nbytes * (group - 1)
        return part.new_empty((group, *part.shape))


@pytest.mark.parametrize(("number", "split"), [(0, Split(3, 1)), (1, Split(1, 2)), (1, Split(1, 4))], ids=str)
def test_a_rank_computes_and_gets_what_is_counted(number: int, split: Split) -> None:
    """One evaluation of hq at full size, through four blocks."""
    exchange, model, one = CountingExchange(split.groups * split.shards), FullSize(), evaluation("hq", number)
    config, counted = replace(CONFIG, num_layers=4), Counted()
    model.evaluate(one, model.kinds(one, BF16)[:4], counted, lambda dit: Front(dit, exchange, split))
    work = Request.of("").work(official_transformers(RECIPES["hq"]))
    stage = replace(work.stages[number], evaluations=1)
    assert exchange.received == schemes.stage_received(config, work, stage, split, itemsize=2)
    lengths = Lengths(stage.shape.tokens, stage.shape.audio_length, TEXT_TOKENS)
    computed = forward_flops(config, lengths, split.shards)
    assert 0 < counted.found["flop"] - computed < 1e-3 * computed


def copy(patch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A guard.json that may be changed, with the numbers of videos alone."""
    record = tmp_path / "guard.json"
    record.write_text(json.dumps({"videos": guard.recorded("videos")}))
    patch.setattr(guard, "RECORD", record)
    return record


def test_what_differs_is_told_with_both_numbers_and_recorded_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process that takes more memory, a number that is no longer counted, one that is not recorded yet."""
    record = copy(monkeypatch, tmp_path)
    assert guard.main(["--only", "videos"]) == 0
    document = json.loads(record.read_text())
    numbers = document["videos"]
    new = "hq, bf16, swap: next video reads"
    numbers["hq, int4, swap: next video reads"] = 12345
    value, host = numbers.pop(new), numbers["hq, bf16, swap: host memory"]
    record.write_text(json.dumps(document))
    monkeypatch.setattr(plan, "PROCESS", plan.PROCESS + host // 50)
    capsys.readouterr()
    assert guard.main(["--only", "videos"]) == 1
    told = capsys.readouterr().out
    grown = f"hq, bf16, swap: host memory: {host:,} is recorded, {host + host // 50:,} is counted (+2.00%, 0.10% is"
    assert grown in told
    assert f"{new}: {value:,} is not recorded" in told
    assert "hq, int4, swap: next video reads: 12,345 is recorded, and nothing is counted under this name" in told
    assert told.endswith("next: if this is meant, python benchmarks/guard.py --record, and say in CHANGELOG.md why\n")
    assert guard.main(["--record", "--only", "videos"]) == 0
    assert guard.main(["--only", "videos"]) == 0
    assert "int4" not in record.read_text()


@pytest.mark.parametrize(
    ("was", "now", "differs"),
    [(10**6, 10**6 + 50, False), (10**6, 10**6 + 200, True), (10**6, 10**6 - 200, True), (0, 1, True)],
)
def test_a_tolerance_is_a_share_in_both_directions(was: int, now: int, differs: bool) -> None:
    assert bool(guard.faults({"x: FLOP": was}, {"x: FLOP": now})) is differs
    assert guard.faults({"x: graphs": was}, {"x: graphs": now}), "others must not differ at all"


def test_another_torch_is_told_and_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = copy(monkeypatch, tmp_path)
    record.write_text(json.dumps({"torch": {"forwards": "2.6.0"}}))
    told = f"forwards: recorded with torch 2.6.0, this is torch {guard._torch()}"
    assert (guard.of_another_torch("forwards"), guard.of_another_torch("hub")) == (told, None)


COUNTED: dict[str, tuple[Any, dict[str, int]]] = {
    "a product": (lambda x: x @ x, {"launches": 1, "flop": 2 * 64**3}),
    "a view": (lambda x: x.view(-1)[:7].unsqueeze(0), {}),
    "two kernels": (lambda x: (x + 1).relu_(), {"launches": 2}),
    "a value read back": (lambda x: x.sum().item(), {"launches": 1, "waits": 1}),
    "an upload": (lambda x: x.copy_(ON_HOST), {"launches": 1, "waits": 1}),
    "codes": (lambda x: torch._int_mm(x.char(), x.char()), {"launches": 3, "flop": 2 * 64**3}),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), {"launches": 1, "flop": 4 * 64**3}),
    "work of the host": (lambda x: float(ON_HOST.sum()) + len(ON_HOST.repeat(2, 1)), {}),
}


@pytest.mark.parametrize("what", COUNTED)
def test_what_a_card_is_asked_for_is_counted(what: str) -> None:
    work, expected = COUNTED[what]
    x = torch.empty(64, 64, device=META)
    with torch.inference_mode(), Counted() as counted:
        work(x)
    assert +counted.found == expected


def traced(function: Any) -> Any:
    """The graph of a function of a matrix."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(function, backend=backend)(torch.empty(4096, 4096, device=META))
    (found,) = graphs
    return found


def test_a_kernel_more_is_seen(fresh_compiler: None) -> None:
    """A product and what is fused into one kernel after it, and a sum over rows that needs another one."""
    matrix = 4 * 4096**2
    assert scheduled(traced(lambda x: ((x @ x) * 2).relu())) == Graph(1, 1, 2 * matrix)
    more = scheduled(traced(lambda x: ((x @ x) * 2).relu().sum(0, keepdim=True) + x))
    assert (more.kernels > 1, more.libraries) == (True, 1) and more.moved > 2 * matrix


def test_a_graph_is_known_again_by_what_it_computes(fresh_compiler: None) -> None:
    def other_names(matrix: Tensor) -> Tensor:
        product = matrix @ matrix
        return (product * 2).relu()

    same, renamed = trace_of(traced(lambda x: ((x @ x) * 2).relu())), trace_of(traced(other_names))
    assert same == renamed
    others = [lambda x: ((x @ x) * 3).relu(), lambda x: ((x @ x) * 2).sigmoid(), lambda x: ((x @ x.t()) * 2).relu()]
    assert len({same, *(trace_of(traced(other)) for other in others)}) == 4


def test_a_graph_break_is_seen(fresh_compiler: None) -> None:
    counters["graph_break"].clear()
    traced(lambda x: (torch._dynamo.graph_break(), x.relu() @ x))
    assert counters["graph_break"].total() == 1


def test_more_overlap_of_tiles_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    name, shape = "one-stage, video: FLOP", Request.of("", recipe="one-stage").shape
    monkeypatch.setattr(tiles, "FRAME_OVERLAP", tiles.FRAME_OVERLAP + 1)
    now = _guard_phases._video.__wrapped__(shape, None)["flop"]
    assert guard.faults({name: guard.recorded("phases")[name]}, {name: now})


def test_more_that_ranks_exchange_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemes, "TURNED", schemes.TURNED + 1)
    told = guard.faults(guard.recorded("cards"), guard.counted("cards", {}))
    assert {line.partition(":")[0] for line in told} >= {"hq, sequence on 2", "distilled, auto on 4"}


def test_a_request_more_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import _guard_files  # guard has named the folders that it imports from

    once = _guard_files.plan_overlay
    monkeypatch.setattr(_guard_files, "plan_overlay", lambda *given: (once(*given), once(*given)))
    (told,) = guard.faults(guard.recorded("hub"), guard.counted("hub", {}))
    assert told.startswith("hub, plan: requests: 40 is recorded, ")
