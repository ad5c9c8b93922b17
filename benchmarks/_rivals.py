"""What users have today for the same work, one command each: ``python _rivals.py WHAT ARGUMENTS…``.

==============  ===============================================================================================
load-save       SOURCE TARGET: safetensors' load_file (mapped) and save_file
load-all-save   SOURCE TARGET: the same with everything read into memory first
diffusers       FOLDER LORA STRENGTH TARGET: load, load_lora_adapter, fuse_lora, save_pretrained; PEFT does the sums
products        LORA: nothing but the matrix product of every pair of the LoRA, on all cores; prints the seconds
==============  ===============================================================================================

All but the last, which is a floor, end with everything on the disk, as ours does. None of them hashes, resumes or
reports.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from _measure import sync_all
from _report import usable_cores

if TYPE_CHECKING:
    import torch

Pair = tuple[int, int, int]
"""Rows, rank and columns of a product."""
# Rows of a product that one thread makes at a time.
ROWS = 1024


def load_save(source: str, target: str, backend: str = "mmap") -> None:
    """All tensors of one file into another."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = load_file(source, backend=backend)
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, target, metadata)
    sync_all(Path(target).parent)


def load_all_save(source: str, target: str) -> None:
    """The same, read rather than mapped."""
    load_save(source, target, backend="pread")


def diffusers(folder: str, lora: str, strength: str, target: str) -> None:
    """A transformer with a LoRA fused in, in bf16, as diffusers' documentation has it."""
    import torch
    from diffusers import LTX2VideoTransformer3DModel
    from diffusers.loaders import LTX2LoraLoaderMixin

    model = LTX2VideoTransformer3DModel.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    state = LTX2LoraLoaderMixin.lora_state_dict(lora)
    model.load_lora_adapter(state, prefix="transformer", adapter_name="lora")
    model.fuse_lora(lora_scale=float(strength), safe_fusing=False)
    model.unload_lora()
    model.save_pretrained(target)
    sync_all(Path(target))


def products(lora: str) -> None:
    """The matrix products of a bake, on all cores, from memory to memory; the seconds of the best of three ways.

    bf16 ``addmm`` on all of torch's threads or a weight a thread, and float32 products of row ranges, a range a thread;
    a trial shows which is best.
    """
    import torch

    from ltxpack.files.tensorfile import read_tensorfile

    factors = {name: info.shape for name, info in read_tensorfile(Path(lora)).tensors.items()}
    downs = [name for name in factors if name.endswith(".lora_A.weight")]
    pairs = ((factors[name.replace(".lora_A.", ".lora_B.")], factors[name]) for name in downs)
    work = [(rows, rank, columns) for (rows, rank), (_, columns) in pairs]
    # A part of the commonest shape: without a matrix unit a whole one takes bf16 many seconds.
    rows, rank, columns = Counter(work).most_common(1)[0][0]
    trial = (min(rows, 4 * ROWS), rank, min(columns, 4 * ROWS))
    made = {shape: _factors(*shape) for shape in {*work, trial}}
    # One result a shape, whatever is in it: fresh memory would cost more than some of the products.
    results = {shape: torch.zeros_like(weight) for shape, (weight, *_) in made.items()}
    cores = usable_cores()

    def fuse(shape: Pair) -> None:
        torch.addmm(*made[shape], alpha=0.7, out=results[shape])

    def product(shape: Pair, first: int) -> None:
        _, up, down = made[shape]
        torch.mm(up[first : first + ROWS].float(), down.float())

    def together(shapes: Sequence[Pair]) -> None:
        torch.set_num_threads(cores)
        for shape in shapes:
            fuse(shape)

    def apart(shapes: Sequence[Pair]) -> None:
        torch.set_num_threads(1)
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(fuse, shapes))

    def in_float32(shapes: Sequence[Pair]) -> None:
        torch.set_num_threads(1)
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(product, *zip(*((s, first) for s in shapes for first in range(0, s[0], ROWS)), strict=True)))

    def seconds(way: Callable[[Sequence[Pair]], None], shapes: Sequence[Pair]) -> float:
        start = time.perf_counter()
        way(shapes)
        return time.perf_counter() - start

    best = min((together, apart, in_float32), key=lambda way: min(seconds(way, [trial] * cores) for _ in range(2)))
    print(min(seconds(best, work) for _ in range(2)))


def _factors(rows: int, rank: int, columns: int) -> list[torch.Tensor]:
    import torch

    return [torch.randn(shape).bfloat16() for shape in ((rows, columns), (rows, rank), (rank, columns))]


COMMANDS: Mapping[str, Callable[..., None]] = {
    "load-save": load_save,
    "load-all-save": load_all_save,
    "diffusers": diffusers,
    "products": products,
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
