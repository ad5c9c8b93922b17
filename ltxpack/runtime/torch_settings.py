"""The settings of torch that ltxpack changes for the whole process: float32 without TF32 for a while, and the folder
of compiled code.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from ltxpack.errors import DeviceError
from ltxpack.files.typed import at_home
from ltxpack.reporter import Reporter
from ltxpack.runtime.text.prompt_cache import PLACE_VARIABLE, user_cache

# Inductor's folder for compiled kernels of earlier processes; Triton's kernels are in a folder below.
INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"
# The number of inductor's compile processes; by default one for each core.
COMPILERS = "TORCHINDUCTOR_COMPILE_THREADS"
MOST_COMPILERS = 4
MOST_GRAPHS = 64
FOLDER = "ltxpack-compiled"
# Settings that change the rounding of numbers: names below torch.backends, and the allowed attention kernels.
ROUNDING = (
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cuda.matmul.fp32_precision",
    "cudnn.allow_tf32",
    "cudnn.conv.fp32_precision",
    "cudnn.enabled",
    "mkldnn.matmul.fp32_precision",
)
ATTENDING = ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp")
PRODUCTS = "float32_matmul_precision"

# A function that restores torch's settings, for each open block of :func:`exact_float32`.
_entered: list[Callable[[], None]] = []
_entering = Lock()


@contextmanager
def exact_float32() -> Iterator[None]:
    """In the block, convolutions and matrix products of float32 numbers on a card use float32, not TF32.

    This holds for other threads too. The last block to end, in any thread, restores the settings that the first one
    found; no other setting changes.
    """
    with _entering:
        _entered.append(_entered[0] if _entered else _without_tf32())
    try:
        yield
    finally:
        with _entering:
            restore = _entered.pop()
            if not _entered:
                restore()


def _without_tf32() -> Callable[[], None]:
    """Turns TF32 off; returns a function that restores the settings.

    torch has two interfaces to them and refuses to read the older one while the two disagree, so both are set.
    """
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    # The newer interface came with torch 2.9. The name of a precision of products sets oneDNN's too.
    newer = (cudnn, "conv"), (cudnn, "rnn"), (torch.backends.mkldnn, "matmul")
    named = (matmul, *(getattr(library, name, None) for library, name in newer))
    operations = [each for each in named if hasattr(each, "fp32_precision")]
    before = ExitStack()  # restores in reverse order
    for operation in operations:
        before.callback(setattr, operation, "fp32_precision", operation.fp32_precision)
    with suppress(RuntimeError):  # they disagree already
        products = torch.get_float32_matmul_precision()
        if products != "highest":
            before.callback(torch.set_float32_matmul_precision, products)
            torch.set_float32_matmul_precision("highest")
    with suppress(RuntimeError):
        before.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    for operation in operations:
        operation.fp32_precision = "ieee"
    return before.close


def rounding() -> dict[str, Any]:
    """The settings of this torch that numbers depend on."""
    found = {PRODUCTS: _read(torch.get_float32_matmul_precision)}
    found |= {name: _read(lambda name=name: attrgetter(name)(torch.backends)) for name in ROUNDING}  # type: ignore[misc]
    return found | {name: _read(getattr(torch.backends.cuda, f"{name}_enabled")) for name in ATTENDING}


def round_as(wanted: Mapping[str, Any]) -> None:
    """Set torch as in ``wanted``, the result of :func:`rounding` in another process."""
    for name, value in wanted.items():
        if value is None or rounding()[name] == value:
            continue
        if name == PRODUCTS:
            torch.set_float32_matmul_precision(value)
        elif name in ATTENDING:
            getattr(torch.backends.cuda, f"enable_{name}")(value)
        else:
            holder, _, attribute = name.rpartition(".")
            setattr(attrgetter(holder)(torch.backends), attribute, value)


def _read(setting: Callable[[], Any]) -> Any:
    try:
        return setting()
    except (AttributeError, RuntimeError):  # this torch lacks it, or its two interfaces disagree
        return None


def set_up_compiler(reporter: Reporter, alike: bool = False) -> None:
    """Have torch keep compiled code for later processes, compile in few processes, and keep enough graphs.

    ``alike``: other processes compile the same code and must get the same numbers, so that no measurement may choose
    between kernels that round differently. The settings hold for this process and those it starts. The user's own
    settings of torch stay.
    """
    os.environ[INDUCTOR_CACHE] = str(compiled_code(os.environ, reporter))
    # Blocks in bf16, in codes and decoded, with and without images and STG, are different graphs of the same functions.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, MOST_GRAPHS)
    from torch._inductor import config

    if alike and hasattr(config, "deterministic"):
        config.deterministic = True
    if COMPILERS not in os.environ:
        # Each is a process with its own torch, which the plan of the host's memory does not include.
        config.compile_threads = min(config.compile_threads or MOST_COMPILERS, MOST_COMPILERS)


def tell_failed_compiler(error: Exception) -> None:
    """Raises DeviceError if ``error`` says that torch cannot compile: without a compiler, or with damaged code."""
    from torch._dynamo.exc import TorchDynamoException

    if isinstance(error, TorchDynamoException):
        kept = f"if it worked before, remove {os.environ.get(INDUCTOR_CACHE)}, whose code may be damaged"
        found = str(error).partition("\n\n")[0]
        raise DeviceError(
            "torch cannot compile the transformer", found=found, next=f"leave --compile out ({kept})"
        ) from error


def compiled_code(environment: Mapping[str, str], reporter: Reporter) -> Path:
    """The folder from which torch may load compiled code; makes it if it does not exist.

    torch executes the code there. So the folder is the user's own, and nobody else can enter it: ``ltxpack-compiled``
    in the XDG cache folder, or a folder that the user has named for torch. ``LTXPACK_CACHE`` may be shared, so the
    folder is never below it. If no such folder is possible, it is a temporary one for this process, and ``reporter``
    gets a warning. torch keys the code by graph, version, device and settings, so it never uses stale code.
    """
    named = environment.get(INDUCTOR_CACHE)
    try:
        if named and not _is_torchs_own(Path(named)):
            return _private(Path(named), environment, open_to=0o022)
        return _private(user_cache(environment) / FOLDER, environment, open_to=0o077)
    except (OSError, RuntimeError) as error:
        reporter.warn(f"compiled code is not kept for the next run: {error}")
        return _lasting_as_long_as_this_process()


def _private(folder: Path, environment: Mapping[str, str], open_to: int) -> Path:
    """``folder``, made with mode 0700. Raises PermissionError if it could hold another user's code; OSError.

    ``open_to``: the bits of its mode that must not be set.
    """
    shared = environment.get(PLACE_VARIABLE)
    if shared and folder.resolve().is_relative_to(at_home(shared).resolve()):
        raise PermissionError(f"{folder} is below {PLACE_VARIABLE}, which may be shared")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{folder} belongs to another user")
    if found.st_mode & open_to:
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        raise PermissionError(f"{folder} is open to other users (mode {mode}); chmod 700 closes it")
    return folder


@functools.cache
def _lasting_as_long_as_this_process() -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _is_torchs_own(folder: Path) -> bool:
    """Whether torch itself has set the variable, to a folder that a restart of the machine removes."""
    return folder.name.startswith("torchinductor_") and folder.parent == Path(tempfile.gettempdir())
