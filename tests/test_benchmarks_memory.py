"""benchmarks/memory.py and nullcard.py, as far as they go without a CUDA build of torch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import memory
import nullcard
import pytest
from support import benchmark

GB = 10**9
ALLOCATED = dict(zip(memory.PHASES, (5, 21, 1, 22, 6), strict=True))
PHASES = {name: {"planned": 20 * GB, "allocated": at * GB, "reserved": (at + 1) * GB} for name, at in ALLOCATED.items()}
FOUND = {"mode": "stream", "phases": PHASES}


def test_a_row_holds_each_phase_against_its_plan() -> None:
    row = memory._row(24, FOUND)
    assert row == (
        *("24 GB", "stream", "5.0 (0.250)", "21.0 (1.050)", "1.0 (0.050)", "22.0 (1.100)", "6.0 (0.300)"),
        *("1.100", "23.0"),
    )
    failed = memory._row(24, {"failed": ["error: cuda ran out of memory"]})
    assert len(failed) == len(row) and failed[1] == "failed" and "ran out" in failed[-1]


def test_without_a_cuda_build_it_says_what_to_install() -> None:
    torch = pytest.importorskip("torch")
    if torch.version.cuda:
        pytest.skip("torch here is a CUDA build")
    done = benchmark(nullcard, "true")
    assert done.returncode == 2 and "no CUDA build" in done.stderr


def test_what_is_written_by_hand_is_not_generated_again() -> None:
    runtime, driver = (nullcard.defined(nullcard.SOURCES / name) for name in ("runtime.c", "driver.c"))
    assert {"cudaMalloc", "cudnnGetLastErrorString", "cudaGetErrorString", "nullcard_take"} <= runtime
    assert {"cuMemCreate", "cuGetErrorName"} <= driver
    assert not {"remember", "number", "some"} & (runtime | driver)


def test_what_is_generated_does_nothing_and_says_so() -> None:
    text = nullcard.successes({"cudaStreamQuery", "cudnnCreateTensorDescriptor"})
    assert "int cudaStreamQuery(void) { return 0; }" in text
    assert "int cudnnCreateTensorDescriptor(void **out) { *out = calloc" in text


def test_names_of_the_driver_are_found_among_others() -> None:
    text = "x\0cuMemCreate\0cuda\0cuLaunchKernelEx\0cubin cuD8"
    assert nullcard.DRIVER.findall(text) == ["cuMemCreate", "cuLaunchKernelEx"]
    assert not nullcard.DRIVER.fullmatch("cudaMemcpy") and nullcard.KEPT.fullmatch("__cudaRegisterFatBinary")


def test_sources_need_no_header_of_the_driver(tmp_path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("no C compiler here")
    for name in ("driver.c", "nvrtc.c"):
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-o", tmp_path / f"{name}.so", nullcard.SOURCES / name], check=True
        )
