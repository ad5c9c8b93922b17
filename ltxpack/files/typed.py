"""Paths as people type them."""

from __future__ import annotations

import os
from pathlib import Path


def at_home(text: str | Path) -> Path:
    """``text`` with the user's folder for a ``~`` in front; unchanged where there is no such user."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 (a Path raises for a user that is not there)
