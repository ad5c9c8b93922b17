"""benchmarks/loading.py goes through to its tables; ratios are taken within a round."""

from __future__ import annotations

import json
from pathlib import Path

import _loading
import loading
import pytest
from _gpu_sizes import TINY
from support import REPOSITORY, benchmark, refuse_direct
from warm_processes import WARM

pytestmark = pytest.mark.usefixtures("fsync_waits")


def test_the_dry_run_ends_in_a_dated_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch, results = tmp_path / "scratch", tmp_path / "results"
    scratch.mkdir()
    monkeypatch.setattr(loading, "subprocess", WARM)
    for name, value in loading.KEEP_PAGES.items():  # else it begins anew in another process
        monkeypatch.setenv(name, value)
    flags = ("--quick", "--rounds", "2", "--device", "cpu")
    done = benchmark(loading, *flags, "--scratch", scratch, "--results", results)
    assert done.returncode == 0, done.stderr
    assert not list(scratch.iterdir())
    [table, figures] = sorted(results.iterdir(), reverse=True)
    text, document = table.read_text(), json.loads(figures.read_text())
    assert done.stdout == text + "\n"
    assert table.stem == f"loading-{TINY.kept_blocks}-blocks-{document['machine']['date']}"
    assert str(tmp_path) not in text and str(REPOSITORY) not in text
    found = document["found"]
    for way in (*_loading.OURS.values(), "safetensors"):
        seconds = found[f"loading.{way}.seconds"]
        assert len(seconds) == 2 and all(one > 0 for one in seconds)
        assert 0 < found[f"loading.{way}.memory beside the weights"] < 2e9
    ours = _loading.OURS["auto"]
    for way in _loading.OURS_AGAIN.values():
        assert len(found[f"loading again.{way}.seconds"]) == 2
    reads = [found[f"loading.{read}.seconds"] for read in _loading.READ.values()]
    copies, mine = found[f"loading.{_loading.COPY}.seconds"], found[f"loading.{ours}.seconds"]
    ratios = [one / max(copy, min(read)) for one, copy, *read in zip(mine, copies, *reads, strict=True)]
    assert found[f"loading.{ours} to the floor"] == pytest.approx(sum(ratios) / 2)


def test_where_the_cache_cannot_be_passed_the_floor_is_read_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100_001))
    refused = refuse_direct(monkeypatch)
    assert _loading._read_floor([path], direct=True) > 0
    assert refused == [path] * _loading.READS
