"""The DiT with compiled blocks, and the folder that torch may load compiled code from."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ltxpack.reporter import Reporter
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.text.prompt_cache import PLACE_VARIABLE, user_cache

# Inductor looks here for compiled kernels of earlier processes; Triton's own go to a folder below.
INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"
# How many processes inductor compiles in; by default as many as there are cores.
COMPILERS = "TORCHINDUCTOR_COMPILE_THREADS"
MOST_COMPILERS = 4
FOLDER = "ltxpack-compiled"


def compile_dit(dit: DiT, reporter: Reporter) -> None:
    """Compile the blocks of ``dit`` from now on, and keep the compiled code for later processes.

    This sets, for the whole process and what it starts, the folder of torch's compiled code (unless the user has
    named one) and a bound on the number of compiler processes (unless the user has set it).
    """
    os.environ[INDUCTOR_CACHE] = str(compiled_code(os.environ, reporter))
    if COMPILERS not in os.environ:
        from torch._inductor import config

        # Each is a process with a torch of its own, which the plan of the host's memory does not count.
        config.compile_threads = min(config.compile_threads or MOST_COMPILERS, MOST_COMPILERS)
    dit.compile_blocks()


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
