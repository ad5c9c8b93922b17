"""Keeps the worst error per recorded tensor while the tests run, and writes docs/parity.md from it.

    LTXPACK_PARITY=docs/parity.md .venv/bin/pytest tests/runtime tests/test_end_to_end.py

The suite computes the same numbers every time; with the variable set they are also written down.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch

COMMAND = "LTXPACK_PARITY=docs/parity.md .venv/bin/pytest tests/runtime tests/test_end_to_end.py"
# (first byte, last byte, file, tensor) of every recorded tensor in memory, by first byte.
_places: list[tuple[int, int, Path, str]] = []
_sizes: dict[Path, int] = {}
_worst: dict[Path, dict[str, float]] = defaultdict(dict)


def remember(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Know the tensors of a golden file by where they lie."""
    if path in _sizes:
        return
    _sizes[path] = len(tensors)
    for name, tensor in tensors.items():
        _places.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, path, name))
    _places.sort(key=lambda place: place[:2])


def note(expected: torch.Tensor, error: float) -> None:
    """``expected`` (a recorded tensor, or a part of one) was met with ``error``."""
    address = expected.data_ptr()
    index = bisect_right(_places, address, key=lambda place: place[0]) - 1
    if index < 0 or address >= _places[index][1]:
        return
    _, _, path, name = _places[index]
    _worst[path][name] = max(error, _worst[path].get(name, 0.0))


def write() -> None:
    """Write the table to ``LTXPACK_PARITY``, if that is set."""
    target = os.environ.get("LTXPACK_PARITY")
    if not target:
        return
    rows = []
    for path in sorted(_worst):
        errors = _worst[path]
        name = max(errors, key=lambda key: errors[key])
        fixture = "tests/data" if "tests" in path.parts else path.parent.parent.name
        rows.append(f"| {fixture} | `{path.name}` | {len(errors)} of {_sizes[path]} | {errors[name]:.1e} | `{name}` |")
    Path(target).write_text("\n".join([*HEAD, *_made_by(), *COLUMNS, *rows, ""]), encoding="utf-8")


def _made_by() -> list[str]:
    """The command, and the kind of processor, on which the last digits depend."""
    found = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    maker = next((name for name in ("AMD", "Intel") if name in found), "another maker")
    units = ", ".join(unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {unit} " in found)
    return [
        f"Made by `{COMMAND}`",
        f"on a processor of {maker} with {units}; the same tests run in `make test`.",
        "On another kind sums come out otherwise. hq and the single bfloat16 files were recorded on one with amx_bf16:",
        "there their bfloat16 rows are 0 or near it. The other recipes were recorded on one of AMD with avx2.",
        "",
    ]


HEAD = [
    "# Agreement with the official pipeline",
    "",
    "Worst relative L2 error per golden file: tensors recorded from the official code on a tiny checkpoint, against",
    "what ltxpack computes on a CPU in one thread. float32 files are held to 1e-4 or tighter by the tests; bfloat16",
    "end to end is chaotic (the official code drifts by 1e-2 to 1.4e-1 between thread counts) and is a sanity check.",
    "",
    "*Compared* counts the tensors measured by relative L2. Ids, masks, tile layouts, eight-bit frames and fused LoRA",
    "weights are compared exactly, or to within one step of eight bits, and are not counted. A tensor compared several",
    "times (alone, in a replay, through the command line) stands with its worst error.",
    "",
    "In bfloat16 the recipes other than hq are the recorded bits up to the last latents, in one thread on a processor",
    "like the recorder's (`tests/test_end_to_end.py -k recorded_bits`).",
    "",
    "diffusers is a second oracle for distilled, text to video: its LTX2 pipeline on the same overlay, given the",
    "sigmas and first latents of each stage, makes the same latents in float32 within 1e-5 (there, `-k diffusers`).",
    "They are given because its own scheduler shifts the sigmas by the number of tokens and its noise is drawn in",
    "another layout; the latents of the sound it takes before normalisation.",
    "",
]
COLUMNS = ["| fixture | file | compared | worst | tensor |", "|---|---|---|---|---|"]
