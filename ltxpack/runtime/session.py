"""A session: an overlay opened on a device. It owns the loaded weights, and handles a lack of memory.

It also chooses the attention kernel, compiles the blocks, and keeps the time. Knows no recipe: see :mod:`recipe_run`.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ltxpack.errors import DeviceError, UsageError
from ltxpack.manifest import FP8
from ltxpack.reporter import Reporter, SilentReporter
from ltxpack.runtime.calibration import ActivationsRecorder
from ltxpack.runtime.codecs import video
from ltxpack.runtime.model import kernels
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.model.quantised import use_codes
from ltxpack.runtime.model.weights import load_dit, read_dit_config
from ltxpack.runtime.overlay import BASE, Overlay, TransformerChoice, chosen, transformer_part
from ltxpack.runtime.parallel.devices import TORCHRUN, Launched, launched, named_devices
from ltxpack.runtime.parallel.ranks import ALONE, Alone, Numerics
from ltxpack.runtime.parallel.schemes import NONE, OF_MANY, check_heads
from ltxpack.runtime.parallel.team import Team, TorchrunTeam
from ltxpack.runtime.sampling.recipes import Guidance, Recipe, stage_flag
from ltxpack.runtime.sampling.shape import AV, VIDEO_CHANNELS
from ltxpack.runtime.settings import AUTO, STATIC, SessionSettings
from ltxpack.runtime.text.encode import PromptEncoder
from ltxpack.runtime.text.prompt_cache import PromptCache
from ltxpack.runtime.torch_settings import round_as, set_up_compiler, tell_failed_compiler
from ltxpack.runtime.weights import report
from ltxpack.runtime.weights.device import known_fault, resolve_device
from ltxpack.runtime.weights.keeper import Residency
from ltxpack.runtime.weights.plan import Work

R = TypeVar("R")
# Texts of libraries that raise a plain RuntimeError when memory runs out.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


@dataclass
class Timings:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to phase ``name``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


class Session:
    """The overlay at ``root``, opened with ``settings`` without reading large files.

    Weights that fit stay loaded until :meth:`close`. Not for several threads at once. Raises OverlayError, UsageError,
    DeviceError.
    """

    # The phases of this device if another makes the rest of each video; empty for all.
    only: frozenset[str] = frozenset()
    # The process whose sessions have loaded anything. A fork of it lacks the threads of libraries, and would wait for
    # them for ever.
    _process: ClassVar[int | None] = None

    def __init__(self, root: Path, settings: SessionSettings, reporter: Reporter | None = None) -> None:
        settings.check()
        self.settings = settings
        self.overlay = Overlay.open(root, settings.text_encoder)
        devices = _of_a_video(settings)
        self.device = resolve_device(devices[0], "--device" if settings.devices is None else "--devices")
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.reporter = reporter or SilentReporter()
        self.residency = Residency(
            self.overlay, self.device, self.dtype, settings.residency, self.reporter,
            settings.reads, settings.warm_cache,
        )  # fmt: skip
        folder = None if isinstance(settings.cache, bool) else Path(settings.cache)
        cache = PromptCache.at(folder) if settings.cache is not False else None
        self.prompts = PromptEncoder(self.overlay, self.residency, cache)
        path = settings.save_activations
        self.activations = None if path is None else ActivationsRecorder(Path(path), self.overlay, self.device)
        self.timings = Timings()
        self.attention: kernels.KernelChoice | None = None
        # The numerics that rank 0 dictates.
        self._adopted: Numerics | None = None
        # Notes that were given already.
        self._told: set[str] = set()
        # Whether the process ends with the session: the kernel then frees pinned memory, which is faster.
        self.process_ends = False
        self._closed = False
        self._statistics: video.LatentStatistics | None = None
        # An unusable name fails now; the measurement of the fastest waits for the first video.
        if kernels.asked_for(settings.attention) != kernels.AUTO:
            self.attention = self.within_memory(self._choose_attention)
        fault = known_fault(self.device, self.dtype)
        if fault is not None:
            self.reporter.warn(fault)
        self.ranks: Alone = self._rank_of(root, devices) if len(devices) > 1 else ALONE

    @property
    def transformer_config(self) -> DiTConfig:
        """The config of the base transformer, and so of every bake. Raises OverlayError, UnsupportedError."""
        return read_dit_config(self.overlay.folder(transformer_part(BASE)))

    def transformers(self, recipe: Recipe) -> TransformerChoice:
        """The transformers of the recipe's stages. Raises OverlayError, UsageError."""
        found = chosen(self.overlay, self.settings, recipe)
        if self.activations is not None:
            self.activations.check(found.stages)
        return found

    def check_blocks(self, guidance: AV[Guidance]) -> None:
        """Raises UsageError if ``guidance`` perturbs a block that the transformer does not have."""
        count = self.transformer_config.num_layers
        for modality, blocks in (("video", guidance.video.perturbed), ("audio", guidance.audio.perturbed)):
            if max(blocks, default=0) >= count:
                flag, known = f"--{modality}-stg-blocks", f"numbers from 0 to {count - 1}"
                problem = f"{flag} names a block that the transformer does not have"
                raise UsageError(problem, expected=known, found=max(blocks), next=f"choose other {flag}")

    def prepare(self, works: Sequence[Work]) -> None:
        """Plan for ``works``, and choose the attention kernel while the device still has room to measure.

        Raises DeviceError if nothing fits, UsageError for a closed session.
        """
        self.check_open()
        Session._process = os.getpid()
        self.residency.prepare(works)
        if not works:
            return
        if self.attention is None:
            self.attention = self.within_memory(self._choose_attention)
        if self.attention.note not in self._told:
            self._told.add(self.attention.note)
            self.reporter.note(self.attention.note)
            for name, why in self.attention.refused.items():
                self.reporter.detail(f"attention: not {name}: {why}")

    def numerics(self) -> Numerics:
        """The numerics of this prepared session, for other ranks."""
        assert self.attention is not None
        return Numerics.of(self.attention, self.settings.fp8, self.device, self.dtype)

    def adopt(self, numerics: Numerics) -> None:
        """Compute with the numerics of rank 0. Raises DeviceError if this device cannot."""
        if self._adopted is None:
            numerics.check(self._attention_kinds())
        self._adopted, self.attention = numerics, numerics.attention
        round_as(numerics.rounding)

    @property
    def decoding(self) -> str:
        """The tiles of the last decoded video, in words; empty before there is one."""
        return "" if self.residency.plan is None else report.decoding(self.residency.plan)

    def transform(self, name: str, work: Callable[[DiT], R]) -> R:
        """``work(transformer)`` with the transformer ``name`` ready on the device. Raises OverlayError."""
        return self.residency.use(transformer_part(name), load_dit, work, partial(self._prepare, name))

    def load_ahead(self, name: str) -> None:
        """Begin to load the transformer ``name`` while others compute, if the plan has room for it."""
        self.residency.load_ahead(transformer_part(name), load_dit)

    def upsample(self, latents: Tensor) -> Tensor:
        """Video latents in twice the height and width; this needs only two small tensors of the video VAE."""
        if self._statistics is None:  # read once a session: each read makes a stream on the card
            folder = self.overlay.folder("vae")
            self._statistics = video.LatentStatistics.read(folder, VIDEO_CHANNELS, self.device, self.dtype)
        statistics = self._statistics
        return self.residency.use(
            "latent_upsampler", video.load_upsampler, lambda net: video.upsample(net, statistics, latents)
        )

    def begin_video(self) -> None:
        """Begin the timings and notes of a new video."""
        self.timings = Timings()
        if self.activations is not None:
            self.activations.begin()

    def end_video(self) -> None:
        """Save the activations of the finished video. Raises as :meth:`ActivationsRecorder.save`."""
        if self.activations is not None:
            self.activations.save()

    def within_memory(self, work: Callable[[], R]) -> R:
        """``work()``. Raises DeviceError if memory runs out, whose tensors it frees, or if torch cannot compile."""
        try:
            return work()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            found = _out_of_memory(error)
            if found is None:
                if self.settings.compile:
                    tell_failed_compiler(error)
                raise
        # Not in the except block: there the traceback still keeps the failed work's tensors.
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise DeviceError(f"{self.device} ran out of memory", found=found, next=self.residency.advice())

    @contextmanager
    def reporting(self, reporter: Reporter) -> Iterator[None]:
        before, self.reporter = self.reporter, reporter
        try:
            yield
        finally:
            self.reporter = before

    @contextmanager
    def taking(self, stages: Sequence[str]) -> Iterator[None]:
        """Use the transformers ``stages`` in the block, whatever the settings of the session."""
        before = self.settings
        named: dict[str, Any] = {stage_flag(number): name for number, name in enumerate(stages)}
        self.settings = replace(before, **named)
        try:
            yield
        finally:
            self.settings = before

    def check_open(self) -> None:
        if self._closed:
            raise UsageError("this pipeline is closed", next="ltxpack.Pipeline.from_overlay(...) opens another")
        if self._process not in (None, os.getpid()):
            problem = "this process is a fork of one that has made videos, whose threads it lacks"
            raise UsageError(problem, next='multiprocessing.get_context("spawn") starts processes that can make videos')

    def close(self) -> None:
        """Free the memory; a closed session makes no more videos."""
        self._closed = True
        self.ranks.close()
        self._statistics = None
        self.prompts.forget()
        if self.activations is not None:
            self.activations.forget()
        self.residency.close(process_ends=self.process_ends)

    def __enter__(self) -> Session:
        self.check_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _rank_of(self, root: Path, devices: Sequence[str]) -> Alone:
        """Rank 0 of ``devices``; another rank that torchrun started is set later."""
        settings, config = self.settings, self.transformer_config
        check_heads(settings.parallel, config, len(devices))
        launch = launched() if settings.devices == TORCHRUN else None
        self.residency.processes = len(devices) if launch is None else launch.here
        if launch is None:
            return Team(root, settings, devices, self.device, config, self.reporter)
        return ALONE if launch.rank else TorchrunTeam(launch, settings, self.device, config, self.reporter)

    def _prepare(self, name: str, model: DiT, streamed: bool) -> None:
        """Prepare a transformer once, when its weights are on the device or come there block by block."""
        if self.activations is not None:
            self.activations.watch(name, model)
        fp8 = self.settings.fp8
        faults = None if self._adopted is None else self._adopted.faults
        told = use_codes(model, fp8, self.device, self.dtype, faults)
        bake = self.overlay.manifest.bakes.get(name)
        if fp8 == STATIC and bake is not None and bake.format == FP8 and bake.calibration is None:
            clips = "--fp8 static uses 1 as every input scale and clips inputs above 448"
            told.append(f"{name} is not calibrated: {clips} (bake-lora --activations FILE, or --fp8 token)")
        for line in told:
            if line not in self._told:
                self.reporter.note(line)
        self._told.update(told)
        if self.attention is not None:
            model.use_attention(self.attention.kernels)
        if self.settings.compile:
            set_up_compiler(self.reporter, alike=self.ranks is not ALONE)
            model.compile_blocks()

    def _attention_kinds(self) -> tuple[kernels.AttentionKind, ...]:
        return kernels.attention_kinds(self.transformer_config, self.device, self.dtype)

    def _choose_attention(self) -> kernels.KernelChoice:
        found = kernels.choose(self._attention_kinds(), self.settings.attention)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return found


def _of_a_video(settings: SessionSettings) -> tuple[str, ...]:
    """The devices that make each video together. Raises UsageError for a --parallel that shares out many videos."""
    if settings.parallel in OF_MANY:
        problem = f"--parallel {settings.parallel} is for the many videos of a prompts file"
        raise UsageError(problem, next=f"give --prompts FILE, or choose --parallel {AUTO}")
    return devices_of(settings)[: 1 if settings.parallel == NONE else None]


def devices_of(settings: SessionSettings) -> tuple[str, ...]:
    """The device of each rank. Raises UsageError for settings that do not go together."""
    if settings.devices == TORCHRUN and (launch := launched()) is not None:
        return (_of_this_rank(settings, launch),) * launch.size
    if settings.devices is None:
        if settings.parallel not in (AUTO, NONE):
            raise UsageError(f"--parallel {settings.parallel} goes with several devices", next="add --devices 0,1")
        return (settings.device,)
    if settings.device != AUTO:
        raise UsageError("--device and --devices are two answers to one question", next="leave --device out")
    if settings.save_activations is not None:
        # Each rank sees only the inputs of its own passes.
        raise UsageError("--save-activations goes with one device", next="leave --devices out")
    return named_devices(settings.devices)


def _of_this_rank(settings: SessionSettings, launch: Launched) -> str:
    """The device of a rank that torchrun started. Raises UsageError."""
    if settings.parallel in (*OF_MANY, NONE):
        problem = f"--parallel {settings.parallel} does not go with torchrun, whose ranks share each video"
        raise UsageError(problem, next="leave --parallel out, or start ltxpack without torchrun")
    if settings.save_activations is not None:
        raise UsageError("--save-activations goes with one device", next="start ltxpack without torchrun")
    if settings.device not in (AUTO, "cuda", "cpu"):
        expected = "auto, cuda or cpu: each rank takes the card of its own number"
        raise UsageError("--device names one card for all ranks", expected=expected, found=settings.device)
    if settings.device == "cpu" or not torch.cuda.is_available():
        return settings.device
    return f"cuda:{launch.local}"


def _out_of_memory(error: BaseException) -> str | None:
    """The text of ``error`` if it says that memory ran out, else None."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return lines[0] if known or any(sign in str(error) for sign in OUT_OF_MEMORY) else None
