"""What users have today for the same work, one command each: ``python _rivals.py WHAT ARGUMENTS…``.

==============  ===============================================================================================
load-save       SOURCE TARGET: safetensors' load_file (mapped) and save_file
load-all-save   SOURCE TARGET: the same with everything read into memory first
diffusers       FOLDER LORA STRENGTH TARGET: load, load_lora_adapter, fuse_lora, save_pretrained; PEFT does the sums
==============  ===============================================================================================

Each ends with everything on the disk, as ours does. None of them hashes, resumes or reports.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from _measure import sync_all


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


COMMANDS: Mapping[str, Callable[..., None]] = {
    "load-save": load_save,
    "load-all-save": load_all_save,
    "diffusers": diffusers,
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
