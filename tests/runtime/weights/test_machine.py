"""What host memory a run finds: the machine's, within the limits of the containers around it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import ltxpack

from ltxpack.runtime.weights import machine
from ltxpack.runtime.weights.machine import free_in_container

GB = 10**9
NO_LIMIT = "9223372036854771712"
CGROUP2 = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
CGROUP1 = "35 31 0:32 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n36 31 0:33 / /sys/x rw - tmpfs t rw\n"


def system(root: Path, group: str, mounts: str, files: dict[str, object]) -> Path:
    """A ``/proc`` that tells ``group`` and ``mounts``, and ``files`` under ``/sys/fs/cgroup``."""
    own = root / "proc" / "self"
    own.mkdir(parents=True)
    (own / "cgroup").write_text(group + "\n")
    (own / "mountinfo").write_text(mounts)
    for name, content in files.items():
        path = root / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def used(folder: str, limit: object, current: int, droppable: int = 0, high: object = "max") -> dict[str, object]:
    names = {"memory.max": limit, "memory.high": high, "memory.current": current}
    return {f"{folder}{n}": v for n, v in {**names, "memory.stat": f"anon 1\ninactive_file {droppable}"}.items()}


def test_the_smallest_limit_of_all_groups_around_the_process_counts(tmp_path: Path) -> None:
    files = {
        **used("a/b/c/", "max", 1 * GB),
        **used("a/b/", 50 * GB, 2 * GB, high=30 * GB),
        **used("a/", 40 * GB, 20 * GB, droppable=5 * GB),
    }
    assert free_in_container(system(tmp_path / "1", "0::/a/b/c", CGROUP2.format(top="/"), files)) == 25 * GB
    files = used("", 64 * GB, 10 * GB, droppable=4 * GB)
    assert free_in_container(system(tmp_path / "2", "0::/", CGROUP2.format(top="/"), files)) == 58 * GB


def test_a_container_that_sees_only_its_own_part_of_the_tree(tmp_path: Path) -> None:
    root = system(tmp_path / "1", "0::/docker/1/job", CGROUP2.format(top="/docker/1"), used("job/", 9 * GB, GB))
    assert free_in_container(root) == 8 * GB
    root = system(tmp_path / "2", "0::/elsewhere", CGROUP2.format(top="/docker/1"), used("", 9 * GB, GB))
    assert free_in_container(root) == 8 * GB


def test_the_first_version_of_control_groups(tmp_path: Path) -> None:
    def files(folder: str, limit: object) -> dict[str, object]:
        names = {"limit_in_bytes": limit, "usage_in_bytes": 3 * GB, "stat": f"total_inactive_file {GB}"}
        return {f"memory/{folder}memory.{name}": value for name, value in names.items()}

    group = "5:cpu:/\n4:memory:/job\n0::/"
    limited = system(tmp_path / "1", group, CGROUP1.format(top="/"), {**files("", 16 * GB), **files("job/", NO_LIMIT)})
    assert free_in_container(limited) == 14 * GB
    free = system(tmp_path / "2", group, CGROUP1.format(top="/"), files("job/", NO_LIMIT))
    assert free_in_container(free) is None


@pytest.mark.parametrize("group", ["0::/", "4:memory:/gone", ""])
def test_without_a_limit_the_machine_counts(group: str, tmp_path: Path) -> None:
    assert free_in_container(system(tmp_path, group, CGROUP2.format(top="/"), {})) is None
    assert free_in_container(tmp_path / "nothing") is None


def test_the_plan_says_that_a_container_limits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_host", lambda: 1000 * GB)
    monkeypatch.setattr(machine, "own_memory", lambda: 0)
    monkeypatch.setattr(machine, "free_card", lambda: 80 * GB)
    for limit, told in ((None, False), (64 * GB, True), (2000 * GB, False)):
        monkeypatch.setattr(machine, "free_in_container", lambda limit=limit: limit)
        found = machine.this_machine()
        assert found.container is told and found.host == (64 * GB if told else 1000 * GB) - machine.HOST_MARGIN
        done = ltxpack("plan")
        assert ("of the host (the limit of a container)" in done.stdout) is told, done.stdout
