"""Compiled blocks: the same numbers, the same graphs for all blocks and both stages, hooks still run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dit_parts import SMALL, built, cast, distance, random_streams, random_weights, recipe, tracing, with_timesteps
from support import Notes
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.runtime.runtime_utils import cache_dir

from ltxpack.reporter import SilentReporter
from ltxpack.runtime.calibration import LargestInputs
from ltxpack.runtime.model.block import PLAIN
from ltxpack.runtime.model.model import DiT, Stream
from ltxpack.runtime.sampling.shape import AV
from ltxpack.runtime.torch_settings import COMPILERS, FOLDER, INDUCTOR_CACHE, compiled_code, set_up_compiler

pytestmark = pytest.mark.usefixtures("fresh_compiler")
STAGES = [AV(24, 9), AV(50, 14)]
# Streams of the same widths have kernels in common, each of which takes the C++ compiler two seconds.
EVEN = SMALL | {f"audio_{name}": SMALL[name] for name in SMALL if f"audio_{name}" in SMALL}
CXX = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")


def masked(streams: AV[Stream], distinct: int) -> AV[Stream]:
    """Image conditioning: the video tokens use several timesteps."""
    index = [token % distinct for token in range(streams.video.latents.shape[1])]
    return AV(with_timesteps(streams.video, [0.1 * (k + 1) for k in range(distinct)], index), streams.audio)


needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler: inductor builds no kernels for the CPU")


def lookups() -> AV[int]:
    """How many graphs the compiler found in its cache, and how many not."""
    found = counters["inductor"]
    return AV(found["fxgraph_cache_hit"], found["fxgraph_cache_miss"])


# Whether the compiler knows the processor's vectors takes it six seconds to find out.
VECTORS = {"cpp.vec_isa_ok": True}


# The C++ compiler takes half as long for kernels without vectors; those of the test below have them.
@config.patch(VECTORS | {"cpp.simdlen": 0})
@needs_compiler
def test_compiled_agrees_with_eager_and_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guided passes at both stages, with image conditioning; then as in a new process."""
    dit = built(EVEN, random_weights(EVEN))
    monkeypatch.setenv(INDUCTOR_CACHE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    streams = [masked(random_streams(dit, lengths), 2) for lengths in STAGES]
    eager = [dit.passes(recipe(each)[:2]) for each in streams]
    for attempt in range(2):
        torch.compiler.reset()
        counters.clear()
        set_up_compiler(SilentReporter())
        assert Path(cache_dir()) == tmp_path / FOLDER
        dit.compile_blocks()
        for each, expected in zip(streams, eager, strict=True):
            assert max(map(distance, dit.passes(recipe(each)[:2]), expected)) <= 1e-6
        assert lookups() == (AV(0, 3) if attempt == 0 else AV(3, 0)), "text, attend, exchange"
    assert any((tmp_path / FOLDER).rglob("*.so"))


@config.patch(VECTORS)
@needs_compiler
def test_compiled_agrees_with_eager_in_bfloat16() -> None:
    """A compiled block rounds less often, so neither is the exact one; both are as near to float32.

    The pass is isolated: what exchanges is compiled in the test above.
    """
    dit = built(EVEN, random_weights(EVEN))
    streams = random_streams(dit, STAGES[0])
    exact = dit(streams, isolated=True)
    half, rounded = dit.bfloat16(), cast(streams, torch.bfloat16)
    eager = half(rounded, isolated=True)
    half.compile_blocks(fullgraph=True)
    compiled = half(rounded, isolated=True)
    assert distance(compiled, eager) <= 1.4e-2
    assert distance(compiled, exact) <= 1.1 * distance(eager, exact)


@pytest.mark.parametrize(("asked", "found"), [(None, 4), ("9", 16)])
def test_no_more_compilers_than_the_host_has_room_for(
    asked: str | None, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user says how many."""
    monkeypatch.setenv(COMPILERS, asked or "")
    if asked is None:
        monkeypatch.delenv(COMPILERS)
    monkeypatch.setenv(INDUCTOR_CACHE, str(tmp_path / "mine"))
    with config.patch(compile_threads=16, deterministic=False):
        set_up_compiler(SilentReporter())
        assert config.compile_threads == found and not config.deterministic
        set_up_compiler(SilentReporter(), alike=True)
        assert config.deterministic, "ranks that make a video together do not choose by measuring"


@pytest.mark.parametrize("named", [None, "torch's own", "the user's"])
def test_where_compiled_code_is_kept(named: str | None, tmp_path: Path) -> None:
    folders = {"torch's own": Path(tempfile.gettempdir()) / "torchinductor_somebody", "the user's": tmp_path / "mine"}
    environment = {"XDG_CACHE_HOME": str(tmp_path / "xdg"), INDUCTOR_CACHE: str(folders.get(named or "", ""))}
    environment["LTXPACK_CACHE"] = str(tmp_path / "of the prompts")
    reporter = Notes()
    found = compiled_code(environment, reporter)
    assert found == (tmp_path / "mine" if named == "the user's" else tmp_path / "xdg" / FOLDER)
    assert found.stat().st_mode & 0o777 == 0o700, "nobody else may put code there"
    assert compiled_code(environment, reporter) == found and not reporter.warnings


def test_compiled_code_is_never_loaded_from_a_folder_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor from below LTXPACK_CACHE, which a team may share: a folder of this process is used, with a warning."""
    cache, reporter = tmp_path / "cache", Notes()
    folder = cache / FOLDER

    def refused(**more: str) -> str:
        found = compiled_code({"XDG_CACHE_HOME": str(cache), **more}, reporter)
        assert not found.is_relative_to(tmp_path) and found.stat().st_mode & 0o777 == 0o700
        return reporter.warnings.pop()

    assert "is below LTXPACK_CACHE" in refused(LTXPACK_CACHE=str(cache))
    (tmp_path / "link").symlink_to(cache)
    assert "is below LTXPACK_CACHE" in refused(LTXPACK_CACHE=str(tmp_path / "link"))
    assert "is below LTXPACK_CACHE" in refused(LTXPACK_CACHE=str(cache), **{INDUCTOR_CACHE: str(cache / "mine")})
    folder.mkdir(parents=True)
    folder.chmod(0o750)
    assert f"{folder} is open to other users (mode 0750); chmod 700 closes it" in refused()
    folder.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert "belongs to another user" in refused()
    monkeypatch.undo()
    folder.rmdir()
    folder.write_text("a file")
    assert "compiled code is not kept for the next run" in refused()


def test_blocks_with_images_share_their_graphs_and_agree_with_eager(dit: DiT) -> None:
    """Both stages, with a row per token; benchmarks/guard.py counts the graphs of a video without images.

    The same graphs of all blocks note the largest inputs, of a model that was compiled, and used, before it was
    watched; the numbers it computes stay.
    """
    images = [masked(random_streams(dit, lengths), distinct) for lengths, distinct in zip(STAGES, (2, 4), strict=True)]
    perturbed = AV(frozenset({1}), frozenset({0}))
    works: list[tuple[int, str, Callable[[], list[AV[Tensor]]]]] = [
        (3, "text, attend, exchange", lambda: [dit(each) for each in images]),
        (4, "another exchange", lambda: [dit(each, isolated=True) for each in images]),
        (6, "attend of two blocks", lambda: [dit(each, perturbed=perturbed) for each in images]),
    ]
    assert dit.config.num_layers > 1
    eager = [work() for _, _, work in works]
    graphs, backend = tracing()
    dit.compile_blocks(backend=backend, fullgraph=True)
    for (count, why, work), expected in zip(works, eager, strict=True):
        assert max(map(distance, work(), expected)) <= 1e-6
        assert len(graphs) == count, why
    before, largest = dit(images[0]), LargestInputs(torch.device("cpu"))
    largest.watch(dit)
    after = dit(images[0])
    assert len(graphs) == 6 + 3, "text, attend, exchange"
    assert torch.equal(before.video, after.video) and torch.equal(before.audio, after.audio)
    compiled = largest.read()
    largest.clear()
    for block in dit.blocks():
        block.functions = PLAIN
    dit(images[0])
    assert compiled == pytest.approx(largest.read(), rel=1e-6) and all(compiled.values())
