"""What can make a loaded DiT faster without changing its numbers beyond rounding, in one call.

Knows no pipeline: it is given a model that lies where it will run.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ltxpack.reporter import Reporter
from ltxpack.runtime.model import kernels
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import DiT

# Inductor looks here for compiled kernels of earlier processes; Triton's own lie in a folder below.
INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"
# How many processes inductor compiles in; by default as many as there are cores.
COMPILERS = "TORCHINDUCTOR_COMPILE_THREADS"
MOST_COMPILERS = 4


@dataclass(frozen=True)
class Tuning:
    """``attention``: a name of ``KERNELS``, None for ``LTXPACK_ATTENTION`` or else the fastest, or what was chosen
    already. ``compile``: the blocks; ``cache``: a folder to keep what was compiled in. ``pack``: the projections, for
    weights that stay; see :meth:`DiT.pack` for why the pipeline leaves it off.
    """

    attention: str | kernels.Choice | None = None
    compile: bool = False
    cache: Path | None = None
    pack: bool = False


def tune(dit: DiT, tuning: Tuning, reporter: Reporter) -> kernels.Choice:
    """Apply ``tuning`` to ``dit`` and tell ``reporter`` which attention was chosen.

    Before the first forward, as the compiler takes up what it finds. Raises UsageError for an attention kernel that
    is unknown or does not run here.
    """
    asked = tuning.attention
    choice = asked if isinstance(asked, kernels.Choice) else kernels.choose(attention_heads(dit), asked)
    dit.use_attention(choice.name)
    reporter.note(choice.note)
    for name, why in choice.refused.items():
        reporter.detail(f"attention: not {name}: {why}")
    if tuning.pack:
        dit.pack()
    if tuning.compile:
        if tuning.cache is not None:
            keep_compiled(tuning.cache)
        _few_compilers()
        dit.compile_blocks()
    return choice


def attention_heads(dit: DiT) -> kernels.Heads:
    """The heads that do most of the work: the video's self-attention, on the device and in the dtype of its weights."""
    weight = dit.proj_in.weight
    return heads_of(dit.config, weight.device, weight.dtype)


def heads_of(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> kernels.Heads:
    """Those of a DiT that is not loaded yet: so the choice needs no memory that its weights have taken."""
    video, audio = config.streams.video, config.streams.audio
    others = () if audio.head_dim == video.head_dim else (audio.head_dim,)
    return kernels.Heads(video.heads, video.head_dim, device, dtype, others)


def keep_compiled(folder: Path) -> Path:
    """Have torch keep compiled code in ``folder``, and look there first; a folder the user has named comes before.

    For this process and what it starts. torch keys it by graph, torch version, device and settings, so a stale entry
    is never used. What is compiled already stays where it is. Returns the folder in use.
    """
    named = os.environ.get(INDUCTOR_CACHE)
    found = folder if named is None or _is_torchs_own(Path(named)) else Path(named)
    found.mkdir(parents=True, exist_ok=True)
    os.environ[INDUCTOR_CACHE] = str(found)
    return found


def _few_compilers() -> None:
    """Of the processes that compile, each with a torch of its own, no more than serve three functions: the host's
    memory is planned without them. What the user has set stays.
    """
    if COMPILERS not in os.environ:
        from torch._inductor import config

        config.compile_threads = min(config.compile_threads or MOST_COMPILERS, MOST_COMPILERS)


def _is_torchs_own(folder: Path) -> bool:
    """Whether torch has set the variable itself, to a folder that is lost when the machine restarts."""
    return folder.name.startswith("torchinductor_") and folder.parent == Path(tempfile.gettempdir())
