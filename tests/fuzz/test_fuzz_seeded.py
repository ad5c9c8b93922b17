"""Thousands of broken and hostile files, the same ones every time, through the ways that the commands read them."""

from __future__ import annotations

import random
import time
import zlib
from collections import Counter
from pathlib import Path

import pytest
from fuzz_mutations import mutate
from fuzz_targets import MEMORY, Finding, Target, guard, make_targets

# By what one attempt costs: about a second of processor time per target, fifteen in all.
COUNTS = {
    "header": 2500,
    "index": 1000,
    "activations": 1000,
    "prompts.jsonl": 300,
    "prompts.txt": 300,
    "picture": 600,
    "checkpoint": 15,
    "lora": 100,
    "upsampler": 200,
    "gemma config.json": 200,
    "gemma tokenizer_config.json": 100,
    "gemma processor_config.json": 100,
    "gemma weights": 150,
    "gemma index": 150,
    "manifest, verify": 20,
    "manifest, bake": 40,
    "transformer config.json": 30,
    "transformer diffusion_pytorch_model.safetensors.index.json": 30,
    "transformer shard": 30,
    "adapter": 400,
    "peft config": 200,
}


@pytest.fixture(scope="module")
def targets(demo: Path, memory: Path) -> dict[str, Target]:
    (memory / "fuzz").mkdir()
    found = make_targets(memory / "fuzz", demo / "source")
    assert set(found) == set(COUNTS)
    return found


@pytest.mark.parametrize("name", COUNTS)
def test_the_seeds_are_sound(name: str, targets: dict[str, Target]) -> None:
    for seed in targets[name].seeds:
        assert targets[name].attempt(seed) is None


@pytest.mark.parametrize("name", COUNTS)
def test_a_file_changed_anyhow_is_taken_or_refused_in_one_message(name: str, targets: dict[str, Target]) -> None:
    target = targets[name]
    rng = random.Random(zlib.crc32(name.encode()))
    ends: Counter[bool] = Counter()
    for number in range(COUNTS[name]):
        data = target.seeds[number % len(target.seeds)]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            data = mutate(data, rng)
        ends[target.attempt(data) is None] += 1
    assert ends[False] > 0, "nothing was refused, so nothing hostile was tried"


def test_the_guard_sees_what_it_is_for(tmp_path: Path) -> None:
    """A target that misbehaves is found out, in each way that counts."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()

    def hungry() -> None:
        bytearray(b"x") * (2 * MEMORY)

    def slow() -> None:
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            pass

    def wrong() -> None:
        raise KeyError("x")

    bad = {
        "KeyError": wrong,
        "MB": hungry,
        "s, ": slow,
        "open": lambda: (outside / "x").write_bytes(b""),
        "os.mkdir": (inside / ".." / "made").mkdir,
        "os.rename": lambda: (inside / "file").rename(outside / "moved"),
    }
    for told, call in bad.items():
        with pytest.raises(Finding, match=told):
            Target("bad", inside / "file", call, (), seconds=0.1).attempt(b"")
    assert Target("good", inside / "file", lambda: (inside / "more").write_bytes(b""), ()).attempt(b"") is None
    assert guard().allowed is None
