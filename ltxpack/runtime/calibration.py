"""``--save-activations``: adds the largest inputs of a session's transformers to a file after each video.

An fp8 bake takes its input scales from the file. The maxima stay on the device until a video is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ltxpack.activations import ActivationsFile, Loras, base_digest
from ltxpack.errors import AbsentError, LtxpackError, UsageError, quoted
from ltxpack.files.publish import atomic_write, check_writable, output_errors
from ltxpack.manifest import BF16
from ltxpack.runtime.commands import baked
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.model.weights import read_dit_config
from ltxpack.runtime.overlay import BASE, Overlay, transformer_part
from ltxpack.runtime.sampling.recipes import stage_flag

FLAG = "--save-activations"
ANOTHER = f"choose another file for {FLAG}, or remove this one"
_SELF_ATTENTIONS = ("attn1", "audio_attn1")
_CROSS_ATTENTIONS = ("attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
# Watched linear of a block -> all linears with the same x. In a self-attention only to_v runs in every pass of STG.
SAME_INPUT: Mapping[str, tuple[str, ...]] = {
    **{f"{one}.to_v": tuple(f"{one}.to_{part}" for part in ("q", "k", "v", "gate_logits")) for one in _SELF_ATTENTIONS},
    **{f"{one}.to_q": (f"{one}.to_q", f"{one}.to_gate_logits") for one in _CROSS_ATTENTIONS},
    **{f"{one}.to_k": (f"{one}.to_k", f"{one}.to_v") for one in _CROSS_ATTENTIONS},
    **{f"{one}.to_out.0": (f"{one}.to_out.0",) for one in (*_SELF_ATTENTIONS, *_CROSS_ATTENTIONS)},
    **{f"{one}.{part}": (f"{one}.{part}",) for one in ("ff", "audio_ff") for part in ("net.0.proj", "net.2")},
}


class ActivationsRecorder:
    """The largest inputs of the transformers of ``overlay``, for the file ``path``.

    Raises FormatError for another kind of file, UsageError for one of another model.
    """

    def __init__(self, path: Path, overlay: Overlay, device: torch.device) -> None:
        check_writable(path, FLAG, "activations.safetensors")
        self.path, self._overlay, self._device = path, overlay, device
        self._met: dict[str, LargestInputs] = {}
        # The content of the file, as last read or written.
        self._file = self._read()
        self._saved = False

    def check(self, stages: Sequence[str]) -> None:
        """Raises UsageError for a quantised transformer, and for one that has other LoRAs in the file."""
        for number, name in enumerate(stages):
            bake = self._overlay.manifest.bakes.get(name)
            if bake is not None and bake.format != BF16:
                problem = f"{FLAG} needs bf16 transformers, and {stage_flag(number)} is a quantised one"
                raise UsageError(
                    problem, file=self._overlay.root, found=f"{name} ({bake.format})", next=self._bf16(number, name)
                )
            self._check_loras(name)

    def watch(self, name: str, model: DiT) -> None:
        """Record the inputs of the linears of ``model``, the transformer ``name``."""
        self._met.setdefault(name, LargestInputs(self._device)).watch(model)

    def begin(self) -> None:
        """Begin a new video, and forget the inputs of one that failed."""
        for met in self._met.values():
            met.clear()

    def forget(self) -> None:
        """Free the device's memory."""
        self._met.clear()

    def save(self) -> None:
        """Add the inputs of the video to the file, which changes only when the new version is whole.

        Raises LtxpackError for inputs that are not finite, the errors of the class for a file that has become
        unsuitable, UnwrittenError for one that cannot be written.
        """
        met = {name: inputs.read() for name, inputs in self._met.items()}
        met = {name: largest for name, largest in met.items() if any(largest.values())}
        odd = [f"{name}:{linear}" for name in met for linear, value in met[name].items() if not math.isfinite(value)]
        if odd:
            problem = "nothing was added: the inputs of some linears are not finite"
            raise LtxpackError(problem, file=self.path, items=odd, next="run another prompt, or correct the LoRAs")
        with _alone_in(self.path.absolute().parent), output_errors(self.path):
            self._file = self._read()
            for name, largest in met.items():
                self._check_loras(name)
                self._file = self._file.with_larger(name, self._loras(name), largest)
            atomic_write(self.path, self._file.dump())
        self._saved = True

    @property
    def summary(self) -> str:
        """The additions of this session in words; empty before a video is whole."""
        if not self._saved:
            return ""
        counts = ", ".join(f"{len(largest)} of {name}" for name, largest in self._file.largest.items())
        total = sum(map(len, self._file.largest.values()))
        return f"largest inputs of {total} linears ({counts}): {self.path}"

    def _read(self) -> ActivationsFile:
        """The file, or an empty one if there is none."""
        manifest = self._overlay.manifest
        empty = ActivationsFile(manifest.model_version, base_digest(manifest.components["transformer"].files))
        try:
            file = ActivationsFile.read(self.path)
        except AbsentError:
            return empty
        for what, found, expected in (
            ("version of the model", file.model_version, empty.model_version),
            ("base transformer", file.base, empty.base),
        ):
            if found != expected:
                raise UsageError(f"is of another {what}", file=self.path, expected=expected, found=found, next=ANOTHER)
        known = linears(read_dit_config(self._overlay.folder(transformer_part(BASE))).num_layers)
        if any(sorted(largest) != known for largest in file.largest.values()):
            raise UsageError("holds other linears than the model", file=self.path, next=ANOTHER)
        return file

    def _loras(self, name: str) -> Loras:
        bake = self._overlay.manifest.bakes.get(name)
        return () if bake is None else tuple((lora.blake3, lora.stated) for lora in bake.loras)

    def _check_loras(self, name: str) -> None:
        if self._file.transformers.get(name, self._loras(name)) != self._loras(name):
            problem = f"holds a transformer {name} made from other LoRAs"
            raise UsageError(problem, file=self.path, expected=f"{name} of {self._overlay.root}", next=ANOTHER)

    def _bf16(self, number: int, name: str) -> str:
        """The command that uses, or else makes, a bf16 bake in place of ``name`` for stage ``number``."""
        root, bakes = self._overlay.root, self._overlay.manifest.bakes
        for other, bake in bakes.items():
            if bake.format == BF16 and bake.loras == bakes[name].loras:
                stage = f"--{stage_flag(number)} {other}"
                return f"ltxpack run {quoted(root)} {stage} {FLAG} {quoted(self.path)} --prompt TEXT"
        return baked(root, bakes[name])


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Lets one process at a time into the block: a rename would lose the additions of another."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a filesystem without locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def linears(blocks: int) -> list[str]:
    """The sorted names of all linears in this many blocks, without ``.weight``."""
    names = [name for group in SAME_INPUT.values() for name in group]
    return sorted(f"transformer_blocks.{number}.{name}" for number in range(blocks) for name in names)


class LargestInputs:
    """The largest |x| that enters each linear of a transformer's blocks (spec 09 section 5), recorded during forwards.

    On ``device``: a float32 scalar for each input, at first 0. A maximum belongs to a block's number, wherever the
    block's weights are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inputs: dict[tuple[int, str], Tensor] = {}

    @torch.inference_mode()
    def watch(self, model: DiT) -> None:
        """Let every later forward of ``model`` update these maxima; compiled ones too if they are compiled later."""
        for number, block in enumerate(model.blocks()):
            for name in SAME_INPUT:
                if (number, name) not in self._inputs:
                    self._inputs[number, name] = torch.zeros((), device=self._device)
                block.get_submodule(name).largest_input = self._inputs[number, name]

    @torch.inference_mode()
    def clear(self) -> None:
        for largest in self._inputs.values():
            largest.zero_()

    @torch.inference_mode()
    def read(self) -> dict[str, float]:
        """Name of the linear (see :func:`linears`) -> its maximum. The host waits for the device."""
        values = torch.stack([*self._inputs.values()]).tolist() if self._inputs else []
        return {
            f"transformer_blocks.{number}.{linear}": value
            for (number, name), value in zip(self._inputs, values, strict=True)
            for linear in SAME_INPUT[name]
        }
