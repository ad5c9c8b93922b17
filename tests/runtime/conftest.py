"""What the tests of the model share: the small DiT, and a compiler that remembers nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from dit_parts import SMALL, SMALL_WEIGHTS, built

from ltxpack.runtime.model.model import DiT


@pytest.fixture
def dit() -> DiT:
    """Built anew for every test, which may compile it or give it other kernels."""
    return built(SMALL, SMALL_WEIGHTS)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()
