"""What a machine has free: its card by the driver's own tool, its memory by the kernel. Needs no torch and no GPU."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

MEBIBYTE = 1024 * 1024
ANSWER_SECONDS = 20


# Host memory that is left to the rest of the system: of what is free, and of a whole machine.
HOST_MARGIN, SYSTEM = 500_000_000, 2_000_000_000
# What the driver and the libraries take of a card that nothing runs on yet.
CONTEXT = 1_000_000_000
UNKNOWN = 2**62


@dataclass(frozen=True)
class Machine:
    """Bytes a run could have. ``card`` None: there is none, and the host's memory is the device's.

    ``context``: what of ``card`` goes to others than tensors: the driver, libraries, gaps; 0 where it is gone already.
    """

    host: int
    card: int | None = None
    context: int = 0


def this_machine(vram: int | None = None, ram: int | None = None) -> Machine:
    """What a new run would find here; ``vram`` and ``ram`` are the whole memories of another card and host."""
    host = usable_host() if ram is None else ram - SYSTEM
    card = free_card() if vram is None else vram
    return Machine(host) if card is None else Machine(host, card, CONTEXT)


def usable_host() -> int:
    """Bytes of host memory a run may have, those this process has among them; no bound where the system is silent."""
    free = free_host()
    return free + own_memory() - HOST_MARGIN if free else UNKNOWN


def free_host() -> int:
    """Bytes of memory a new process could have, or 0 where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        fields = dict(line.split(":", 1) for line in text.splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def own_memory() -> int:
    """Bytes this process has of that memory, or 0 where the system does not say."""
    try:
        resident = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(resident) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def free_card() -> int | None:
    """Bytes free on the first visible NVIDIA card, as ``nvidia-smi`` says; None without one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return None
    first = (visible or "0").split(",")[0]
    command = ["nvidia-smi", f"--id={first}", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=True)
        return int(done.stdout.split()[0]) * MEBIBYTE
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
