"""What the tests of the model share: the small DiT."""

from __future__ import annotations

import pytest
from dit_parts import SMALL, SMALL_WEIGHTS, built

from ltxpack.runtime.model.model import DiT


@pytest.fixture
def dit() -> DiT:
    """Built anew for every test, which may compile it or give it other kernels."""
    return built(SMALL, SMALL_WEIGHTS)
