"""The free memory of a machine: of a card as the driver's tool says, of the host as the kernel and a container allow.

Needs no torch and no GPU.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from ltxpack.errors import UsageError

MEBIBYTE = 1024 * 1024
ANSWER_SECONDS = 20
# Host memory left to the rest of the system: of free memory, and of a whole machine.
HOST_MARGIN, SYSTEM = 500_000_000, 2_000_000_000
# What the driver and the libraries take of a card on which nothing runs yet.
CONTEXT = 1_000_000_000
UNKNOWN = 2**62
# Control groups of the first version write their greatest number of pages for "no limit".
NO_LIMIT = 2**60


@dataclass(frozen=True)
class Machine:
    """Bytes that a run could have. ``card`` None: there is no card, and the device has the host's memory.

    ``context``: bytes of ``card`` for the driver, libraries and gaps; 0 if they are taken already. ``container``: the
    limit of a container bounds ``host``, not the memory of the machine.
    """

    host: int
    card: int | None = None
    context: int = 0
    container: bool = False


def this_machine(vram: int | None = None, ram: int | None = None, *, cards: Collection[int] = (0,)) -> Machine:
    """What a new run would find here; ``vram`` and ``ram`` are the whole memories of another card and host.

    Of several ``cards`` the one with least memory counts. Raises UsageError if one of them is not there.
    """
    host, container = usable_host() if ram is None else (ram - SYSTEM, False)
    if vram is not None:
        return Machine(host, vram, CONTEXT, container)
    free = {number: free_card(number) for number in cards}
    there = [card for card in free.values() if card is not None]
    if len(there) < len(free) and len(free) > 1:
        missing = ", ".join(str(number) for number, card in free.items() if card is None)
        other = f"ltxpack plan --devices {len(free)} --vram 24GB (plans for cards of another machine)"
        raise UsageError("--devices names cards that are not here", found=missing, next=other)
    return Machine(host, min(there, default=None), CONTEXT if there else 0, container)


def usable_host(processes: int = 1) -> tuple[int, bool]:
    """Bytes of host memory for a run, with those of this process; and whether a container bounds them.

    ``processes``: the number of processes that share the free memory. Without an answer of the system, no bound.
    """
    free, contained = free_host(), free_in_container()
    bounds = [bound for bound in (free or None, contained) if bound is not None]
    if not bounds:
        return UNKNOWN, False
    return min(bounds) // processes + own_memory() - HOST_MARGIN, min(bounds) == contained != free


def free_host() -> int:
    """Bytes of the machine's memory for a new process, or 0 if the system does not say."""
    available = re.search(r"^MemAvailable: +(\d+)", _text(Path("/proc/meminfo")), re.MULTILINE)
    return int(available[1]) * 1024 if available else 0


def free_in_container(root: Path = Path("/")) -> int | None:
    """Bytes that the control groups of this process and those around them leave it; None without a limit.

    ``root`` has ``/proc`` and ``/sys``. Files in memory that the kernel can drop count as free.
    """
    found: list[int] = []
    for (limits, used, field), folder in _memory_groups(root):
        limit = min((number for name in limits if (number := _number(folder / name))), default=UNKNOWN)
        if limit < NO_LIMIT:
            droppable = re.search(rf"^{field} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
            free = limit - (_number(folder / used) or 0) + (int(droppable[1]) if droppable else 0)
            found.append(max(0, free))
    return min(found, default=None)


# The files with a control group's limits and its used memory, and the field for file pages that it can drop.
GROUP_FILES = {
    "cgroup2": (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    "cgroup": (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}


def _memory_groups(root: Path) -> Iterator[tuple[tuple[tuple[str, ...], str, str], Path]]:
    """The folders of the control groups that bound this process, from its own upwards, of both versions."""
    groups = _text(root / "proc/self/cgroup").splitlines()
    mounts = _text(root / "proc/self/mountinfo").splitlines()
    paths = {}
    for line in (line for line in groups if line.count(":") > 1):
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            paths["cgroup" if controllers else "cgroup2"] = path
    for line in (line for line in mounts if " - " in line):
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind not in paths or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        top, mounted = before.split()[3:5]
        # A container may see only its own part of the tree, mounted at the top.
        inside = paths[kind].removeprefix(top.rstrip("/")).strip("/") if paths[kind].startswith(top) else ""
        folder = root / mounted.strip("/") / inside
        for parent in [folder, *folder.parents][: len(Path(inside).parts) + 1]:
            yield GROUP_FILES[kind], parent


def _text(file: Path) -> str:
    """The text of ``file``; empty if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _number(file: Path) -> int | None:
    """The number in ``file``; None for ``max``, or without one."""
    text = _text(file).strip()
    return int(text) if text.isdecimal() else None


def own_memory() -> int:
    """Bytes of memory of this process, or 0 if the system does not say."""
    fields = _text(Path("/proc/self/statm")).split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else 0


def free_card(number: int = 0) -> int | None:
    """Bytes free on the visible NVIDIA card that CUDA and torch call ``number``; None without one or its driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number)] if visible is None else visible.split(",")[number : number + 1]
    if not names or names[0].strip() in ("", "-1"):
        return None
    command = ["nvidia-smi", f"--id={_uuid(number) or names[0]}", "--query-gpu=memory.free"]
    command.append("--format=csv,noheader,nounits")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=True)
        return int(done.stdout.split()[0]) * MEBIBYTE
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _uuid(number: int) -> str | None:
    """The UUID of a visible card by its number in CUDA's order, the fastest first; nvidia-smi counts by PCI bus.

    None where the driver does not say.
    """
    device, uuid = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), number)
        failed = failed or cuda.cuDeviceGetUuid_v2(uuid, device)
    except (OSError, AttributeError):
        return None
    return None if failed else f"GPU-{UUID(bytes=bytes(uuid))}"
