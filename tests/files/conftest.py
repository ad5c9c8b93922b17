"""Fixtures of this room."""

from __future__ import annotations

import pytest
from repack_support import Listener


@pytest.fixture
def listener() -> Listener:
    return Listener()
