"""What the sections of benchmarks/gpu.py share: the device, the model, the numbers found so far, tables that grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any

import torch
from _gpu_clock import Clock
from _gpu_models import Inputs, forward_inputs, random_dit
from _gpu_sizes import Sizes
from _report import Table

from ltxpack.runtime.model import kernels
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.parallel.schemes import forward_flops
from ltxpack.runtime.sampling.recipes import HQ, Recipe

GIGA = 1e9
STAGES = (1, 2)


@dataclass
class Growing:
    """A table whose rows come one by one, so that what was measured before time ran out is kept."""

    title: str
    columns: tuple[str, ...]
    note: str = ""
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def table(self) -> Table:
        """As it stands."""
        return Table(self.title, self.columns, tuple(self.rows), self.note)


@dataclass
class Bench:
    """One run of the benchmark.

    ``compiler``: options of ``torch.compile``. ``recipe``: that of the whole video.
    ``found``: numbers by dotted name; ``failures``: what, and why.
    """

    sizes: Sizes
    device: torch.device
    dtype: torch.dtype
    compiler: dict[str, Any]
    say: Callable[[str], None]
    recipe: Recipe = HQ
    found: dict[str, Any] = field(default_factory=dict)
    tables: list[Growing] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)

    @cached_property
    def clock(self) -> Clock:
        """Of the device."""
        return Clock(self.device, patience=1.0 if self.device.type == "cuda" else 0.0)

    @cached_property
    def config(self) -> DiTConfig:
        """Of the transformer."""
        return DiTConfig.from_dict(self.sizes.transformer)

    @cached_property
    def kinds(self) -> tuple[kernels.AttentionKind, ...]:
        """Of attention, the video's self-attention first."""
        return kernels.attention_kinds(self.config, self.device, self.dtype)

    @cached_property
    def choice(self) -> kernels.KernelChoice:
        """The attention kernels that ltxpack takes here."""
        choice = kernels.choose(self.kinds)
        self.found["attention.chosen"] = choice.name
        self.say(choice.note)
        return choice

    @cached_property
    def dit(self) -> DiT:
        """The model of full size, eager, with the chosen attention kernel."""
        self.say("random weights")
        dit = random_dit(self.sizes.transformer, self.device, self.dtype)
        dit.use_attention(self.choice.kernels)
        return dit

    def drop_dit(self) -> None:
        """Give its memory back; it is made anew when it is asked for."""
        self.__dict__.pop("dit", None)
        self.release()

    def inputs(self, stage: int) -> Inputs:
        """Of a forward of ``stage``; made anew, so that no section holds another's memory."""
        return forward_inputs(self.dit, self.sizes, stage)

    def flops(self, stage: int) -> int:
        """Of a conditional forward of ``stage``."""
        return forward_flops(self.config, self.sizes.lengths(stage))

    def table(self, title: str, columns: Sequence[str], note: str = "") -> Growing:
        """A new table, told with the others at the end."""
        self.tables.append(Growing(title, tuple(columns), note))
        return self.tables[-1]

    def note(self, name: str, value: float) -> float:
        """Keep a number for the JSON file."""
        self.found[name] = value
        return value

    def share(self, tera_per_second: float) -> str:
        """Of the matrix rate measured in this run, if it was."""
        rate = self.found.get("rates.matrix")
        return f"{100 * tera_per_second / rate:.1f} %" if rate else "-"

    def attempt(self, what: str) -> Attempt:
        """``with bench.attempt("this"):`` what goes wrong is told at the end, and the section goes on."""
        return Attempt(self, what)

    def release(self) -> None:
        """Hand memory that is free back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Attempt:
    """Swallows an Exception and keeps it as one of the bench's failures; ``well`` says whether there was none."""

    def __init__(self, bench: Bench, what: str) -> None:
        self.bench, self.what, self.well = bench, what, False

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.well = error is None
        if not isinstance(error, Exception):
            return False
        told = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        self.bench.failures.append((self.what, told))
        self.bench.say(f"{self.what} failed: {told}")
        return True


def gigabytes(count: int | None) -> str:
    """``12.3``, or a dash."""
    return "-" if count is None else f"{count / GIGA:.1f}"
