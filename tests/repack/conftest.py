"""Fixtures of this room."""

from __future__ import annotations

from pathlib import Path

import pytest
from repack_support import make_source
from support import Notes


@pytest.fixture
def listener() -> Notes:
    return Notes()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with a checkpoint of a few tensors and a text file."""
    folder = tmp_path / "source"
    folder.mkdir()
    tensors = [(f"block.{n}.{kind}", dtype, (8, n + 1)) for n in range(4) for kind, dtype in
               (("weight", "BF16"), ("table", "F32"))]  # fmt: skip
    make_source(folder / "model.safetensors", tensors)
    make_source(folder / "lora.safetensors", [("down.weight", "BF16", (4, 4))])
    return folder
