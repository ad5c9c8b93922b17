"""benchmarks/loading.py goes through to its tables; ratios are taken within a round."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import _loading
from _gpu_sizes import TINY


def test_the_dry_run_ends_in_a_dated_table(tmp_path: Path) -> None:
    scratch, results = tmp_path / "scratch", tmp_path / "results"
    scratch.mkdir()
    command = [sys.executable, REPOSITORY / "benchmarks" / "loading.py", "--quick", "--rounds", "2", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--scratch", scratch, "--results", results], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not list(scratch.iterdir())
    [table, figures] = sorted(results.iterdir(), reverse=True)
    text, document = table.read_text(), json.loads(figures.read_text())
    assert done.stdout == text + "\n"
    assert table.stem == f"loading-{TINY.kept_blocks}-blocks-{document['machine']['date']}"
    assert str(tmp_path) not in text and str(REPOSITORY) not in text
    found = document["found"]
    for way in (*_loading.OURS.values(), "safetensors"):
        assert len(found[f"loading.{way}.seconds"]) == 2 and all(
            0 < one < 60 for one in found[f"loading.{way}.seconds"]
        )
        assert 0 < found[f"loading.{way}.memory beside the weights"] < 2e9
    ours = _loading.OURS["direct"]
    reads = [found[f"loading.{read}.seconds"] for read in _loading.READ.values()]
    copies, mine = found[f"loading.{_loading.COPY}.seconds"], found[f"loading.{ours}.seconds"]
    ratios = [one / max(copy, min(read)) for one, copy, *read in zip(mine, copies, *reads, strict=True)]
    assert found[f"loading.{ours} to the floor"] == pytest.approx(sum(ratios) / 2)
