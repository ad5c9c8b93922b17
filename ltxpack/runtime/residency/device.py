"""Which device a run is asked for, and what it and the host have free."""

from __future__ import annotations

import torch

from ltxpack.errors import DeviceError, UsageError
from ltxpack.runtime.planning import machine
from ltxpack.runtime.planning.machine import Machine


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``. Raises DeviceError when CUDA is asked for and not there."""
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
            next="ltxpack run … --device cpu, or install a CUDA build of torch and a driver for it",
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError("no such device", expected=f"fewer than {torch.cuda.device_count()}", found=name)
    return device


def machine_of(device: torch.device) -> Machine:
    """What this process could have: what is free, and what it has itself already."""
    host = machine.usable_host()
    if device.type != "cuda":
        return Machine(host)
    return Machine(host, torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
