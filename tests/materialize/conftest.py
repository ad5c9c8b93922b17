"""What the tests of materialize share."""

from __future__ import annotations

from pathlib import Path

import pytest
from materialize import tiny_source

from ltxpack.materialize.hub import client, transfer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A complete source folder in miniature."""
    return tiny_source.make_source(tmp_path / "source")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the overlay goes."""
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries are as many as ever, without the pauses in between."""
    monkeypatch.setattr(client, "RETRY_WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(transfer, "WAITS", (0.0,) * len(transfer.WAITS))
