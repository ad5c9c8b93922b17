"""What ``--devices`` names: a device for each process. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ltxpack.errors import UsageError

EXAMPLES = "ordinals such as 0,1,2, or cpu:N for N processes on the CPU"
# More than any machine has: a typing error starts no thousand processes.
MOST = 64
# The address of --ray without one: Ray starts on this machine, and ends with the run.
RAY_HERE = "local"
# The value of --devices if torchrun has started the ranks.
TORCHRUN = "torchrun"


def named_devices(text: str) -> tuple[str, ...]:
    """A device for each process: ``0,1`` -> cuda:0 and cuda:1; ``cpu:3`` -> cpu, three times. Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    kind, colon, count = text.strip().partition(":")
    if kind == "cpu" and (not colon or (count.isdecimal() and 0 < int(count[:4]) <= MOST)):
        return ("cpu",) * (int(count) if colon else 1)
    ordinals = [part.removeprefix("cuda:") for part in parts]
    if not all(one.isdecimal() and len(one) < 4 for one in ordinals) or len(ordinals) > MOST:
        raise UsageError("--devices names no devices", expected=EXAMPLES, found=text, next="choose --devices 0,1")
    numbers = [int(one) for one in ordinals]
    if len(set(numbers)) < len(numbers):
        raise UsageError("--devices names a card twice", expected=EXAMPLES, found=text, next="choose --devices 0,1")
    return tuple(f"cuda:{number}" for number in numbers)


@dataclass(frozen=True)
class Launched:
    """This process as one of ``size`` ranks that torchrun started; on this machine, number ``local`` of ``here``."""

    rank: int
    size: int
    local: int
    here: int


def launched(environment: Mapping[str, str] = os.environ) -> Launched | None:
    """What torchrun says of this process; None if it did not start it."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return Launched(*(int(environment[name]) for name in names))


@dataclass(frozen=True)
class PlannedDevices:
    """What ``ltxpack plan --devices`` names: ``count`` devices, those of ``cards`` here if any.

    ``flag``: their names for ``ltxpack run``.
    """

    count: int
    cards: tuple[int, ...]
    flag: str

    @classmethod
    def parse(cls, text: str) -> PlannedDevices:
        """``2``: two cards like the first one here; ``0,1`` and ``cpu:3`` as for ``run``. Raises UsageError."""
        if text.strip().isdecimal():
            count = int(text.strip()[:4])
            found = cls(count, (0,), ",".join(map(str, range(count))))
        else:
            names = named_devices(text)
            numbers = tuple(int(name.partition(":")[2]) for name in names if name != "cpu")
            found = cls(len(names), numbers, text.strip())
        if not 1 < found.count <= MOST:
            wanted = f"2 to {MOST} devices: their number, or ordinals"
            raise UsageError("--devices plans for several", expected=wanted, found=text, next="leave --devices out")
        return found
