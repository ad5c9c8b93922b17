"""Lines shared out over workers: who gets what and when, and what becomes of the line whose worker ended."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest
from support import Notes

from ltxpack.runtime.lines import DONE, FAILED, Encode, Make, Outcome, Task, TaskResult
from ltxpack.runtime.parallel.share import AHEAD, Carried, Crew, Event, Gone, Ready, Sharing, Told
from ltxpack.runtime.prompts_file import PromptsLine
from ltxpack.runtime.request import Request

REQUEST = Request.of("a boat")


def lines(count: int, folder: Path = Path()) -> list[PromptsLine]:
    return [PromptsLine(number, f"line {number}", REQUEST, folder / f"{number}.mp4") for number in range(1, count + 1)]


class Scripted(Crew):
    """``size`` workers that end their tasks in the order in which they began them, all at once.

    ``kills``: a worker that makes this line ends, so many times; ``broken``: workers that never become ready.
    """

    def __init__(self, size: int, kills: dict[int, int] | None = None, broken: tuple[int, ...] = ()) -> None:
        self.names = [f"worker {number}" for number in range(size)]
        self.kills, self.broken = dict(kills or {}), broken
        self.begun: list[tuple[int, str, tuple[int, ...], bool]] = []
        self.most_at_once = self.closed = 0
        self._events: deque[Event] = deque()
        for worker in range(size):
            self.replace(worker)

    def replace(self, worker: int) -> None:
        self._events.append(Gone(worker, "no such card") if worker in self.broken else Ready(worker))

    def begin(self, worker: int, task: Task, following: Request | None) -> None:
        numbers = tuple(line.number for line in task.lines)
        self.begun.append((worker, type(task).__name__, numbers, following is not None))
        if isinstance(task, Encode):
            result = TaskResult(tasks=[Make(line, []) for line in task.lines], encoding=1.0)
        else:
            result = TaskResult([Outcome(task.line, DONE)])
        self._events.append(Told(worker, "note", "a plan"))
        dies = isinstance(task, Make) and self.kills.get(numbers[0], 0) > 0
        if dies:
            self.kills[numbers[0]] -= 1
        self._events.append(Gone(worker, "signal 9") if dies else Carried(worker, result))
        self.most_at_once = max(self.most_at_once, sum(isinstance(event, Carried) for event in self._events))

    def next(self) -> Event:
        return self._events.popleft()

    def close(self) -> list[str]:
        self.closed += 1
        return ["all gone"]


def test_one_worker_encodes_ahead_and_then_makes_line_by_line() -> None:
    crew = Scripted(1)
    sharing = Sharing(crew, lines(AHEAD + 2), Notes())
    assert sharing.run() == ["all gone"]
    numbers = range(1, AHEAD + 3)
    first, rest = tuple(numbers)[:AHEAD], tuple(numbers)[AHEAD:]
    makes = [(0, "Make", (number,), number not in (AHEAD, AHEAD + 2)) for number in numbers]
    assert crew.begun == [
        (0, "Encode", first, False), *makes[:AHEAD], (0, "Encode", rest, False), *makes[AHEAD:],
    ]  # fmt: skip
    assert sharing.ahead == 2.0


def test_all_workers_have_something_to_do_and_no_line_is_made_twice() -> None:
    crew, notes = Scripted(3), Notes()
    sharing = Sharing(crew, lines(50), notes)
    sharing.run()
    assert {worker for worker, *_ in crew.begun} == {0, 1, 2} and crew.most_at_once == 3
    made = [numbers[0] for _, kind, numbers, _ in crew.begun if kind == "Make"]
    assert sorted(made) == list(range(1, 51)) == sorted(sharing.outcomes)
    assert {len(numbers) for _, kind, numbers, _ in crew.begun if kind == "Encode"} == {AHEAD // 3, 50 % (AHEAD // 3)}
    assert notes.notes == ["a plan"], "what all workers tell is told once"
    assert notes.phases == [["videos", "video", 50, 50]]


def test_a_line_whose_worker_ended_goes_to_another_one(tmp_path: Path) -> None:
    crew, notes = Scripted(2, {2: 1}), Notes()
    left = tmp_path / f".2.mp4.{'0' * 16}.tmp"
    left.touch()
    sharing = Sharing(crew, lines(4, tmp_path), notes)
    sharing.run()
    assert {outcome.status for outcome in sharing.outcomes.values()} == {DONE}
    first, second = (worker for worker, kind, numbers, _ in crew.begun if (kind, numbers) == ("Make", (2,)))
    assert first != second
    assert notes.warnings == [f"worker {first} ended: signal 9"]
    assert not left.exists(), "nothing half written"


def test_a_line_that_ends_every_worker_fails_by_name_and_the_others_are_made() -> None:
    crew, notes = Scripted(2, {2: 9}), Notes()
    sharing = Sharing(crew, lines(5), notes)
    sharing.run()
    assert [number for number, outcome in sharing.outcomes.items() if outcome.status == FAILED] == [2]
    assert "ended: signal 9, found 2 tries" in str(sharing.outcomes[2].problem)
    assert any(told.startswith("line 2 failed: worker ") for told in notes.warnings)


@pytest.mark.parametrize("broken", [(0,), (0, 1)])
def test_a_device_on_which_no_worker_begins_is_left_out(broken: tuple[int, ...]) -> None:
    crew, notes = Scripted(2, broken=broken), Notes()
    sharing = Sharing(crew, lines(3), notes)
    sharing.run()
    assert crew.closed == 1
    wanted = FAILED if len(broken) == 2 else DONE
    assert [outcome.status for outcome in sharing.outcomes.values()] == [wanted] * 3
    assert notes.warnings[:2] == [f"worker {worker} ended: no such card" for worker in (broken * 2)[:2]]


class Interrupted(Scripted):
    """The user presses Ctrl-C while lines are being made."""

    def next(self) -> Event:
        if any(kind == "Make" for _, kind, *_ in self.begun):
            raise KeyboardInterrupt
        return super().next()


def test_an_interrupt_ends_all_workers() -> None:
    crew = Interrupted(2)
    with pytest.raises(KeyboardInterrupt):
        Sharing(crew, lines(4), Notes()).run()
    assert crew.closed == 1
