"""Run a command with a CUDA build of torch where there is no card: on one that computes nothing.

    python benchmarks/nullcard.py COMMAND …

    NULLCARD_BYTES=24000000000    memory of the card (149 GB)
    NULLCARD_HIDDEN=500000000     of it, what libraries take: free until cuBLAS is first used, and never given out
    NULLCARD_COPIES=1             make every copy, not only small ones and those to the host

torch's own code runs, with its allocator, its streams and its choice of kernels, and so do ``torch.compile`` and
Triton, which compile for sm_90; what lies below it (CUDA's runtime and driver, cuBLAS, cuDNN, NVRTC) is replaced by
nullcard/*.c. So memory is given out as on a card of that size, calls that torch refuses are refused, and the host's
share of the time is real. Numbers and times of the card are not: nothing is computed, and every event is a millisecond
from the next. Tried with torch 2.11 for CUDA 13 on Linux; needs a C compiler and ``nm``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

SOURCES = Path(__file__).with_name("nullcard")
ASKING = ("libc10_cuda.so", "libtorch_cuda.so", "libtorch_cuda_linalg.so", "libtorch_python.so", "libcaffe2_nvrtc.so")
RUNTIME = re.compile(r"(?:cuda|__cuda|cublas|cudnn|cufft|cusparse|cusolver)\w+")
# Kernels are entered as they are loaded, without a card.
KEPT = re.compile(r"__cuda(?:Register|Unregister|Init|Push|Pop)\w+")
DRIVER = re.compile(
    r"\b(cu(?:Init|Ctx|Dev|Func|Get|Green|Launch|Link|Mem|Module|Multicast|Occupancy|Pointer|Stream|Tensor)[A-Za-z0-9_]*)\b"
)
DEFINED = re.compile(r"^(?:int|void|size_t|const char \*)\s*(\w+)\(", re.MULTILINE)


def main() -> int:
    """Build the libraries, run the command with them, and exit as it does."""
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    torch = importlib.util.find_spec("torch")
    packages = Path(torch.origin).parent.parent if torch is not None and torch.origin else None
    if packages is None or not (packages / "torch/lib/libtorch_cuda.so").is_file():
        print("torch here is no CUDA build: install one, such as torch==2.11.0 from PyPI", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="nullcard-") as folder:
        return subprocess.run(sys.argv[1:], env=built(packages, Path(folder)), check=False).returncode


def built(packages: Path, folder: Path) -> dict[str, str]:
    """Compile the libraries in ``folder``; the environment in which they are found first."""
    compiler = [os.environ.get("CC", "cc"), "-O1", "-w", "-shared", "-fPIC"]
    includes = [f"-I{path}" for path in sorted(packages.glob("nvidia/*/include"))]
    includes.append(f"-I{packages / 'triton/backends/nvidia/include'}")
    asked = wanted(packages)
    runtime, driver, nvrtc = folder / "runtime.so", folder / "libcuda.so.1", folder / "libnvrtc.so.13"
    rest = {
        "runtime": {name for name in asked if RUNTIME.fullmatch(name) and not KEPT.fullmatch(name)},
        "driver": {name for name in asked if DRIVER.fullmatch(name)},
    }
    for part, names in rest.items():
        (folder / f"{part}.c").write_text(successes(names - defined(SOURCES / f"{part}.c")), encoding="utf-8")
    versions = folder / "nvrtc.map"
    versions.write_text("libnvrtc.so.13 { global: nvrtc*; };", encoding="utf-8")
    for command in (
        [*includes, "-o", runtime, SOURCES / "runtime.c", folder / "runtime.c", "-ldl", "-lpthread"],
        ["-Wl,-soname,libcuda.so.1", "-o", driver, SOURCES / "driver.c", folder / "driver.c"],
        ["-Wl,-soname,libnvrtc.so.13", f"-Wl,--version-script={versions}", "-o", nvrtc, SOURCES / "nvrtc.c"],
    ):
        subprocess.run([*compiler, *map(str, command)], check=True)
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "LD_PRELOAD": f"{runtime} {nvrtc}",
        "TRITON_LIBCUDA_PATH": str(folder),
        "PYTORCH_NVML_BASED_CUDA_CHECK": "0",
    }


def wanted(packages: Path) -> set[str]:
    """What torch and Triton take from CUDA: names they are linked to, and names of the driver that they look up."""
    libraries = [path for name in ASKING if (path := packages / "torch/lib" / name).is_file()]
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", *map(str, libraries)], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines() if " U " in line}
    looking = [packages / "torch/lib/libc10_cuda.so", packages / "torch/lib/libtorch_python.so"]
    looking += sorted((packages / "triton/backends/nvidia").glob("driver.*"))
    for path in looking:
        names |= set(DRIVER.findall(path.read_bytes().decode("latin-1")))
    return names


def defined(source: Path) -> set[str]:
    """The functions of a C file that others can call."""
    return set(DEFINED.findall(source.read_text(encoding="utf-8")))


def successes(names: Iterable[str]) -> str:
    """C functions that do nothing and say that all went well; what makes something makes an empty one."""
    lines = ["#include <stdlib.h>"]
    for name in sorted(names):
        made = name.startswith("cudnnCreate")
        lines.append(
            f"int {name}(void **out) {{ *out = calloc(1, 4096); return 0; }}"
            if made
            else f"int {name}(void) {{ return 0; }}"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
