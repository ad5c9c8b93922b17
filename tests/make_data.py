"""Cut the fixture of tests/data/tiny out of a full golden folder: the latents path, without codecs.

    python tests/make_data.py ../shared/golden/tiny

Tensors are copied unchanged; the run keeps its inputs, first calls and results. tests/data may hold 8 MB in all.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

TARGET = Path(__file__).parent / "data" / "tiny"
CHECKPOINT_ROOTS = ("model.diffusion_model.", "text_embedding_projection.", "vae.per_channel_statistics.")
WHOLE = (
    "fixture_params.json",
    "golden/constants.safetensors",
    "golden/lora_fused_s1.safetensors",
    "golden/text_bf16.safetensors",
    "golden/text_fp32.safetensors",
    "golden/transformer_fp32.safetensors",
)


def in_checkpoint(name: str) -> bool:
    """The transformer, the connectors with their projections, the statistics the upsampler needs."""
    return name.startswith(CHECKPOINT_ROOTS)


def in_run(name: str) -> bool:
    """States, schedules, results, and the inputs and outputs of every call; not frames, sound or SDE noise."""
    return name.startswith(("stage1.", "stage2.", "upsampler.")) and not name.startswith("stage2.call")


def cut(source: Path, target: Path, keep: Callable[[str], bool]) -> None:
    """Copy the tensors of ``source`` that ``keep`` names, with its metadata."""
    with safe_open(source, framework="pt") as file:
        names = [name for name in file.keys() if keep(name)]  # noqa: SIM118 (no mapping)
        tensors = {name: file.get_tensor(name) for name in names}
        save_file(tensors, target, metadata=file.metadata())


def main(golden: Path) -> None:
    """Write the fixture anew."""
    shutil.rmtree(TARGET, ignore_errors=True)
    (TARGET / "golden").mkdir(parents=True)
    for name in WHOLE:
        shutil.copy(golden / name, TARGET / name)
    shutil.copytree(golden / "gemma", TARGET / "gemma")
    for path in sorted(golden.glob("*.safetensors")):
        cut(path, TARGET / path.name, in_checkpoint if "dev" in path.name else lambda name: True)
    cut(golden / "golden/run_t2v_fp32.safetensors", TARGET / "golden/run_t2v_fp32.safetensors", in_run)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
