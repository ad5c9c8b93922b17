"""What memory and what device a run finds: the host within the limits of containers, a card with its libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import ltxpack

from ltxpack.errors import DeviceError, UsageError
from ltxpack.runtime.weights import device, machine
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


def first_version(folder: str, limit: object) -> dict[str, object]:
    names = {"limit_in_bytes": limit, "usage_in_bytes": 3 * GB, "stat": f"total_inactive_file {GB}"}
    return {f"memory/{folder}memory.{name}": value for name, value in names.items()}


WHOLE, OWN, FIRST = CGROUP2.format(top="/"), CGROUP2.format(top="/docker/1"), CGROUP1.format(top="/")
AROUND = {
    **used("a/b/c/", "max", 1 * GB),
    **used("a/b/", 50 * GB, 2 * GB, high=30 * GB),
    **used("a/", 40 * GB, 20 * GB, droppable=5 * GB),
}
JOB = "5:cpu:/\n4:memory:/job\n0::/"
# Which groups bound the process -> the group, the mounts, the files, and the memory that is left.
GROUPS: dict[str, tuple[str, str, dict[str, object], int | None]] = {
    "the smallest limit of all around the process": ("0::/a/b/c", WHOLE, AROUND, 25 * GB),
    "files that can be dropped": ("0::/", WHOLE, used("", 64 * GB, 10 * GB, droppable=4 * GB), 58 * GB),
    "a container that sees its own part of the tree": ("0::/docker/1/job", OWN, used("job/", 9 * GB, GB), 8 * GB),
    "a group outside of that part": ("0::/elsewhere", OWN, used("", 9 * GB, GB), 8 * GB),
    "version 1": (JOB, FIRST, {**first_version("", 16 * GB), **first_version("job/", NO_LIMIT)}, 14 * GB),
    "version 1 without a limit": (JOB, FIRST, first_version("job/", NO_LIMIT), None),
    "no limit": ("0::/", WHOLE, {}, None),
    "a group that is gone": ("4:memory:/gone", WHOLE, {}, None),
    "none": ("", WHOLE, {}, None),
}


@pytest.mark.parametrize("name", GROUPS)
def test_what_control_groups_leave(name: str, tmp_path: Path) -> None:
    group, mounts, files, free = GROUPS[name]
    assert free_in_container(system(tmp_path / "here", group, mounts, files)) == free
    assert free_in_container(tmp_path / "nothing") is None


def test_the_plan_says_that_a_container_limits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_host", lambda: 1000 * GB)
    monkeypatch.setattr(machine, "own_memory", lambda: 0)
    monkeypatch.setattr(machine, "free_card", lambda number: 80 * GB)
    for limit, told in ((None, False), (64 * GB, True), (2000 * GB, False)):
        monkeypatch.setattr(machine, "free_in_container", lambda limit=limit: limit)
        found = machine.this_machine()
        assert found.container is told and found.host == (64 * GB if told else 1000 * GB) - machine.HOST_MARGIN
        done = ltxpack("plan")
        assert ("of the host (the limit of a container)" in done.stdout) is told, done.stdout


# The device


CARD, CPU = torch.device("cuda"), torch.device("cpu")
SAID = [
    ("2.8.0+cu128", 91002, "issue 163539"),
    ("2.7.1", 90800, "issue 163539"),
    ("2.7.0+cu128", 90701, None),
    ("2.8.0", 91300, None),
    ("2.9.0+cu130", 91300, "issue 166643"),
    ("2.9.0+cu130", 92100, "issue 166643"),
    ("2.9.1", 91499, "issue 166643"),
    ("2.9.1", 91501, None),
    ("2.10.0", 91501, None),
    ("2.13.0a0+git1234", 92000, None),
    ("2.9.0", None, "issue 166643"),
]


@pytest.mark.parametrize(("release", "cudnn", "said"), SAID)
def test_known_faults_of_convolutions_are_told(
    release: str, cudnn: int | None, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", release)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    told = device.known_fault(CARD, torch.bfloat16)
    assert told is None if said is None else told is not None and said in told and release in told
    assert device.known_fault(CPU, torch.bfloat16) is None
    assert device.known_fault(CARD, torch.float32) is None


def test_a_device_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.resolve_device("cpu") == CPU
    for name in ("tpu", "meta", "cud", ""):
        with pytest.raises(UsageError, match="unknown device"):
            device.resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="no such device") as refused:
        device.resolve_device("cuda:2", "--devices")
    assert refused.value.next == "choose other --devices", "it does not go with --device"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_cuda_is_refused() -> None:
    assert device.resolve_device("auto") == CPU
    with pytest.raises(DeviceError, match="no CUDA device"):
        device.resolve_device("cuda:1")


class Allocator:
    """What torch's allocator is told, and whether the card has what that takes."""

    def __init__(self, patch: pytest.MonkeyPatch, works: bool = True) -> None:
        self.told: list[str] = []
        self.works = works
        self.empty = torch.empty
        for name in device.ALLOCATOR_VARIABLES:
            patch.delenv(name, raising=False)
        patch.setattr(torch._C, "_accelerator_setAllocatorSettings", self.told.append, raising=False)
        patch.setattr(torch, "empty", self.take)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (24 * 10**9, 24 * 10**9))
        patch.setattr(torch.cuda, "memory_reserved", lambda device: 0)

    def take(self, *size: int, device: torch.device) -> torch.Tensor:
        if not self.works and self.told == ["expandable_segments:True"]:
            raise RuntimeError("CUDA driver error: operation not supported")
        return self.empty(*size)


@pytest.fixture
def fresh() -> Iterator[None]:
    device.grows_in_place.cache_clear()
    yield
    device.grows_in_place.cache_clear()


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="torch puts memory together on Linux only")


@pytest.mark.usefixtures("fresh")
@LINUX
def test_memory_of_a_card_is_put_together_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch)
    first, later = device.machine_of(CARD), device.machine_of(CARD, used=True)
    assert allocator.told == ["expandable_segments:True"], "asked for once"
    assert first.card == later.card == 24 * 10**9
    assert (first.context, later.context) == (device.LIBRARIES, 0)


@pytest.mark.usefixtures("fresh")
@LINUX
def test_where_the_driver_does_not_put_memory_together_gaps_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch, works=False)
    assert device.machine_of(CARD, used=True).context == device.GAPS
    assert allocator.told == ["expandable_segments:True", "expandable_segments:False"]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("variable", device.ALLOCATOR_VARIABLES)
@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("max_split_size_mb:512", device.GAPS),
        ("expandable_segments:False", device.GAPS),
        ("max_split_size_mb:512, Expandable_Segments: True", 0),
    ],
)
def test_what_the_user_has_set_stays(variable: str, text: str, lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch)
    monkeypatch.setenv(variable, text)
    assert device.machine_of(CARD, used=True).context == lost
    assert allocator.told == []
