"""benchmarks/guard.py: what is counted is what is recorded, and what would not be is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import guard
import pytest
import torch
from _gpu_sizes import REAL, TRANSFORMER
from _guard_forward import Counted, scheduled

from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.flops import run_flops
from ltxpack.runtime.sampling.recipes import RECIPES
from ltxpack.runtime.weights import plan

META, ON_HOST = torch.device("meta"), torch.ones(64, 64)


@pytest.mark.parametrize("group", guard.GROUPS)
def test_nothing_has_grown(group: str, fresh_compiler: None) -> None:
    """Nor shrunk unnoticed."""
    unlike = guard.of_another_torch() if group == "forwards" else None
    if unlike:
        pytest.skip(unlike)
    differ = guard.faults(guard.recorded(group), guard.counted(group))
    assert not differ, guard.report(differ)


def test_every_recipe_is_guarded_in_every_form_and_mode_and_waits_for_nothing() -> None:
    forwards, videos = guard.recorded("forwards"), guard.recorded("videos")
    for recipe in RECIPES.values():
        for form in ("bf16", "fp8"):
            name = f"{recipe.name}, {form}"
            stages = [f"{name}, stage {number + 1}: FLOP" for number in range(len(recipe.stages))]
            assert forwards[f"{name}: FLOP"] == sum(forwards[stage] for stage in stages)
            assert all(f"{name}, {mode}: card memory" in videos for mode in plan.MODES)
    waits = {value for name, value in forwards.items() if name.endswith("host waits of an evaluation")}
    assert waits == {0} and forwards["graph breaks"] == 0


def test_operations_are_those_torch_counts() -> None:
    """The formula of flops.py leaves out what is around the blocks."""
    stages = {"stage 1": (REAL.lengths(1), 31, True), "stage 2": (REAL.lengths(2), 7, False)}
    forwards = guard.recorded("forwards")
    for stage, count in run_flops(DiTConfig.from_dict(TRANSFORMER), stages).items():
        assert 0 < forwards[f"hq, bf16, {stage}: FLOP"] - count < 2e-4 * count


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
    numbers["hq, int8, swap: next video reads"] = 12345
    value, host = numbers.pop(new), numbers["hq, bf16, swap: host memory"]
    record.write_text(json.dumps(document))
    monkeypatch.setattr(plan, "PROCESS", plan.PROCESS + host // 50)
    capsys.readouterr()
    assert guard.main(["--only", "videos"]) == 1
    told = capsys.readouterr().out
    grown = f"hq, bf16, swap: host memory: {host:,} is recorded, {host + host // 50:,} is counted (+2.00%, 0.10% is"
    assert grown in told
    assert f"{new}: {value:,} is not recorded" in told
    assert "hq, int8, swap: next video reads: 12,345 is recorded, and nothing is counted under this name" in told
    assert told.endswith("next: if this is meant, python benchmarks/guard.py --record, and say in CHANGELOG.md why\n")
    assert guard.main(["--record", "--only", "videos"]) == 0
    assert guard.main(["--only", "videos"]) == 0
    assert "int8" not in record.read_text()


@pytest.mark.parametrize(
    ("was", "now", "differs"),
    [(10**6, 10**6 + 50, False), (10**6, 10**6 + 200, True), (10**6, 10**6 - 200, True), (0, 1, True)],
)
def test_a_tolerance_is_a_share_in_both_directions(was: int, now: int, differs: bool) -> None:
    assert bool(guard.faults({"x: FLOP": was}, {"x: FLOP": now})) is differs
    assert guard.faults({"x: graphs": was}, {"x: graphs": now}), "others must not differ at all"


def test_another_torch_is_told_and_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = copy(monkeypatch, tmp_path)
    record.write_text(json.dumps({"torch": "2.6.0"}))
    assert guard.of_another_torch() == f"forwards: recorded with torch 2.6.0, this is torch {guard._torch()}"


COUNTED: dict[str, tuple[Any, dict[str, int]]] = {
    "a product": (lambda x: x @ x, {"launches": 1, "flop": 2 * 64**3}),
    "a view": (lambda x: x.view(-1)[:7].unsqueeze(0), {}),
    "two kernels": (lambda x: (x + 1).relu_(), {"launches": 2}),
    "a value read back": (lambda x: x.sum().item(), {"launches": 1, "waits": 1}),
    "an upload": (lambda x: x.copy_(ON_HOST), {"launches": 1, "waits": 1}),
}


@pytest.mark.parametrize("what", COUNTED)
def test_what_a_card_is_asked_for_is_counted(what: str) -> None:
    work, expected = COUNTED[what]
    x = torch.empty(64, 64, device=META)
    with torch.inference_mode(), Counted() as counted:
        work(x)
    assert +counted.found == expected


def test_a_kernel_more_is_seen(fresh_compiler: None) -> None:
    """A product and what is fused into one kernel after it, and a sum over rows that needs another one."""

    def kernels(function: Any) -> tuple[int, int, int]:
        graphs = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        torch.compile(function, backend=backend)(torch.empty(4096, 4096, device=META))
        (found,) = map(scheduled, graphs)
        return found.kernels, found.libraries, found.moved

    matrix = 4 * 4096**2
    assert kernels(lambda x: ((x @ x) * 2).relu()) == (1, 1, 2 * matrix)
    more, libraries, moved = kernels(lambda x: ((x @ x) * 2).relu().sum(0, keepdim=True) + x)
    assert (more > 1, libraries) == (True, 1) and moved > 2 * matrix
