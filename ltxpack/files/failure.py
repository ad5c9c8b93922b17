"""What to tell when a file cannot be written, and how to go on."""

from __future__ import annotations

import errno
from pathlib import Path

from ltxpack.errors import OverlayError

WRITE_PROBLEMS = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    getattr(errno, "EDQUOT", -1): ("the disk quota is used up", "free some space"),
    errno.EFBIG: ("is larger than this filesystem allows", "use a smaller --max-shard-size"),
    errno.EACCES: ("may not be written", "see to the permissions"),
    errno.EPERM: ("may not be written", "see to the permissions"),
    errno.EROFS: ("lies on a read-only filesystem", "choose another folder"),
}
RESUME = "then run the same command again: what is complete is kept"


def write_failure(error: OSError, path: Path) -> OverlayError:
    """What to tell when ``path`` could not be written."""
    problem, remedy = WRITE_PROBLEMS.get(error.errno or 0, (f"cannot be written: {error.strerror}", "see to that"))
    return OverlayError(problem, file=path, next=f"{remedy}, {RESUME}")
