"""The device of a run: its name, the free memory of it and of the host, and known faults of its libraries."""

from __future__ import annotations

import functools
import os
import re
from typing import Any

import torch

from ltxpack.errors import DeviceError, UsageError
from ltxpack.runtime.weights import machine
from ltxpack.runtime.weights.machine import Machine

# The variables with which users set torch's allocator.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
IN_PLACE = "expandable_segments"
# On a card of this process: what libraries take once they are used, and the gaps if memory is taken in pieces (1.8 GB
# in the second stage at 1088 x 1920).
LIBRARIES, GAPS = 500_000_000, 2_200_000_000
# Versions of torch and of cuDNN, each from the first to before the second, and what they do to 3-d convolutions in bf16
# (pytorch issues 163539 and 166643): first cuDNN was wrong, then torch went around it.
WRONG = "large ones can come out wrong (pytorch issue 163539)"
AROUND = "they run without cuDNN and take many times the memory that is planned (pytorch issue 166643)"
KNOWN_FAULTS = (
    ((2, 0), (2, 9), 90800, 91300, f"{WRONG}: install cuDNN 9.13 or later, or a newer torch"),
    ((2, 9, 0), (2, 9, 1), 0, 1_000_000, f"{AROUND}: install another torch"),
    ((2, 9, 1), (2, 10), 0, 91500, f"{AROUND}: install cuDNN 9.15 or later, or another torch"),
)


def resolve_device(name: str, flag: str = "--device") -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``, the value of ``flag``. Raises UsageError, DeviceError without CUDA."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError("unknown device", expected="auto, cpu, cuda or cuda:N", found=name, next="ltxpack run --help")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "CUDA was asked for, but torch finds no CUDA device",
            next=f"the same command with {flag} cpu, or install a CUDA build of torch and a driver for it",
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        cards = f"cuda:0 to cuda:{torch.cuda.device_count() - 1}"
        raise DeviceError("no such device", expected=cards, found=name, next=f"choose other {flag}")
    return device


def machine_of(device: torch.device, *, used: bool = False, processes: int = 1) -> Machine:
    """What this process could have: the free memory, and its own.

    ``used``: work was done on the device, so libraries have taken their part of a card. ``processes``: the number of
    processes, on devices of their own, that share the free memory of the host.
    """
    host, container = machine.usable_host(processes)
    if device.type != "cuda":
        return Machine(host, container=container)
    lost = (0 if grows_in_place(device) else GAPS) + (0 if used else LIBRARIES)
    return Machine(host, torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device), lost, container)


@functools.cache
def grows_in_place(device: torch.device) -> bool:
    """Let torch join pieces of the card's memory, unless the user has set that otherwise; whether it does.

    Otherwise gaps stay in the pieces when the sizes change, as between the stages: a plan that fills a card fails with
    a tenth of it free.
    """
    told = [os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ]
    if told:
        return any(f"{IN_PLACE}:true" in text.lower().replace(" ", "") for text in told)
    setting = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or getattr(
        torch.cuda.memory, "_set_allocator_settings", None
    )
    if setting is None:
        return False
    setting(f"{IN_PLACE}:True")
    try:
        torch.empty(1, device=device)
    except RuntimeError:  # a driver that cannot join them
        setting(f"{IN_PLACE}:False")
        return False
    return True


def known_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """The known fault of torch's and cuDNN's versions for the VAE on ``device``, in words, if there is one."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    version: Any = torch.backends.cudnn.version
    found, release = version() or 0, tuple(map(int, re.findall(r"\d+", torch.__version__)[:3]))
    for first, fixed, cudnn, sound, told in KNOWN_FAULTS:
        if first <= release < fixed and cudnn <= found < sound:
            return f"3-d convolutions of torch {torch.__version__} with cuDNN {found}: {told}"
    return None
