"""Which device is taken, and what is said of the libraries that come with it."""

from __future__ import annotations

import pytest
import torch

from ltxpack.errors import DeviceError, UsageError
from ltxpack.runtime.residency import device

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
