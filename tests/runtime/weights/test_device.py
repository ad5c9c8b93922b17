"""Which device is taken, and what is said of the libraries that come with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from ltxpack.errors import DeviceError, UsageError
from ltxpack.runtime.weights import device

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


def test_a_device_that_is_none_is_refused() -> None:
    assert device.resolve_device("cpu") == CPU
    for name in ("tpu", "meta", "cud", ""):
        with pytest.raises(UsageError, match="unknown device"):
            device.resolve_device(name)


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
