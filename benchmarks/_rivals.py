"""What users have today for the same work, one command each: ``python _rivals.py WHAT ARGUMENTS…``.

==============  ===============================================================================================
load-save       SOURCE TARGET: safetensors' load_file (mapped) and save_file
load-all-save   SOURCE TARGET: the same with everything read into memory first
diffusers       FOLDER LORA STRENGTH TARGET: load, load_lora_adapter, fuse_lora, save_pretrained; PEFT does the sums
addmm           LORA: nothing but ``torch.addmm`` in bf16 for every pair of the LoRA, on all cores; prints the seconds
==============  ===============================================================================================

All but the last, which is a floor, end with everything on the disk, as ours does. None of them hashes, resumes or
reports.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _measure import sync_all
from _report import usable_cores


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


def addmm(lora: str) -> None:
    """The matrix products of a bake, on all cores, from memory to memory; the seconds of the better of two ways."""
    import torch

    from ltxpack.files.tensorfile import read_tensorfile

    factors = {name: info.shape for name, info in read_tensorfile(Path(lora)).tensors.items()}
    downs = [name for name in factors if name.endswith(".lora_A.weight")]
    work = [(*factors[name.replace(".lora_A.", ".lora_B.")], factors[name][1]) for name in downs]
    made: dict[tuple[int, ...], list[torch.Tensor]] = {
        (rows, rank, columns): [
            torch.randn(shape).bfloat16() for shape in ((rows, columns), (rows, rank), (rank, columns))
        ]
        for rows, rank, columns in set(work)
    }
    # One result a shape, whatever is in it: fresh memory would cost more than some of the products.
    results = {shape: torch.zeros_like(weight) for shape, (weight, *_) in made.items()}
    cores = usable_cores()

    def fuse(shape: tuple[int, ...]) -> None:
        torch.addmm(*made[shape], alpha=0.7, out=results[shape])

    def together() -> None:
        for shape in work:
            fuse(shape)

    def apart() -> None:
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(fuse, work))

    seconds = []
    for threads, way in ((cores, together), (1, apart)):
        torch.set_num_threads(threads)
        for _ in range(2):
            start = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - start)
    print(min(seconds))


COMMANDS: Mapping[str, Callable[..., None]] = {
    "load-save": load_save,
    "load-all-save": load_all_save,
    "diffusers": diffusers,
    "addmm": addmm,
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
