"""What ltxpack changes of torch's settings, which are the whole process's: float32 without TF32 for a while, and the
folder that torch may load compiled code from.
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

from ltxpack.reporter import Reporter
from ltxpack.runtime.text.prompt_cache import PLACE_VARIABLE, user_cache

# Inductor looks here for compiled kernels of earlier processes; Triton's own go to a folder below.
INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"
# How many processes inductor compiles in; by default as many as there are cores.
COMPILERS = "TORCHINDUCTOR_COMPILE_THREADS"
MOST_COMPILERS = 4
MOST_GRAPHS = 64
FOLDER = "ltxpack-compiled"
# What numbers are rounded by: settings below torch.backends, by their names, and kernels that torch may attend with.
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

# What restores torch's settings, once for each block of :func:`exact_float32` that is entered now.
_entered: list[Callable[[], None]] = []
_entering = Lock()


@contextmanager
def exact_float32() -> Iterator[None]:
    """In the block, convolutions and matrix products of float32 numbers on a card use float32, not TF32.

    Other threads see it too. The last block to end, in whatever thread, restores what the first one found; no other
    setting changes.
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
    """Turns TF32 off; returns what restores the settings.

    torch has two interfaces to them and refuses to read the older one while the two disagree, so both are set.
    """
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    # The newer interface came with torch 2.9. The name of a precision of products sets oneDNN's too.
    newer = (cudnn, "conv"), (cudnn, "rnn"), (torch.backends.mkldnn, "matmul")
    named = (matmul, *(getattr(library, name, None) for library, name in newer))
    operations = [each for each in named if hasattr(each, "fp32_precision")]
    before = ExitStack()  # what is added first is restored last
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
    """What torch's settings are here, as far as numbers depend on them and this torch has them."""
    found = {PRODUCTS: _read(torch.get_float32_matmul_precision)}
    found |= {name: _read(lambda name=name: attrgetter(name)(torch.backends)) for name in ROUNDING}  # type: ignore[misc]
    return found | {name: _read(getattr(torch.backends.cuda, f"{name}_enabled")) for name in ATTENDING}


def round_as(wanted: Mapping[str, Any]) -> None:
    """Set what is another here than in ``wanted``, which :func:`rounding` gave in another process."""
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
    except (AttributeError, RuntimeError):  # this torch has none, or its two interfaces to it disagree
        return None


def set_up_compiler(reporter: Reporter, alike: bool = False) -> None:
    """Have torch keep compiled code for later processes, compile in few processes, and keep as many graphs as we need.

    ``alike``: other processes compile the same and must get the same numbers, so that nothing that changes these is
    chosen by measuring. All are settings of this process and of those it starts. What the user has set for torch stays.
    """
    os.environ[INDUCTOR_CACHE] = str(compiled_code(os.environ, reporter))
    # Blocks in bf16, in codes and decoded, with and without images and STG: each is a graph of the same functions.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, MOST_GRAPHS)
    from torch._inductor import config

    if alike and hasattr(config, "deterministic"):
        config.deterministic = True
    if COMPILERS not in os.environ:
        # Each is a process with a torch of its own, which the plan of the host's memory does not count.
        config.compile_threads = min(config.compile_threads or MOST_COMPILERS, MOST_COMPILERS)


def compiled_code(environment: Mapping[str, str], reporter: Reporter) -> Path:
    """The folder that torch may load compiled code from; it is made if it is not there.

    torch executes what it finds there. So the folder is the user's own, and nobody else can enter it:
    ``ltxpack-compiled`` in the XDG cache folder, or one that the user has named for torch. ``LTXPACK_CACHE`` may be
    shared, so the folder is never below it. Where no such folder can be had, one that lasts as long as this process
    is used, and ``reporter`` gets a warning. torch keys the code by graph, version, device and settings, so it never
    uses stale code.
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
    """``folder``, made with mode 0700. Raises PermissionError if code in it could be somebody else's; OSError.

    ``open_to``: the bits of its mode that must not be set.
    """
    shared = environment.get(PLACE_VARIABLE)
    if shared and folder.resolve().is_relative_to(Path(shared).resolve()):
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
    """Whether torch has set the variable itself, to a folder that is lost when the machine restarts."""
    return folder.name.startswith("torchinductor_") and folder.parent == Path(tempfile.gettempdir())
