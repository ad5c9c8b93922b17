"""The plan: every file and its bytes, in little time and memory, at any size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from materialize import tiny_source
from materialize.modules import needs_spec, spec
from support import in_fresh_process

from ltxpack.errors import LtxpackError, SourceError, UsageError
from ltxpack.files.tensorfile import build_header
from ltxpack.files.units import parse_size
from ltxpack.ltx23.renames import CHECKPOINT_TABLES, component_of
from ltxpack.materialize import Options, plan_overlay
from ltxpack.repack.items import Copied, WriteShard
from ltxpack.reporter import SilentReporter

MEASURE = """
import sys, time
from pathlib import Path
from ltxpack.materialize import Options, plan_overlay
from ltxpack.reporter import SilentReporter
began = time.process_time()
plan = plan_overlay(Options(sys.argv[1], Path("unused")), SilentReporter()).to_json()
seconds = time.process_time() - began
answer = plan, seconds, sorted({"torch", "diffusers", "transformers", "huggingface_hub"} & sys.modules.keys())
"""


def full_size_checkpoint(path: Path, f32: bool) -> dict[str, tuple[int, ...]]:
    """A sparse file with the real model's header; returns its tensors' shapes."""
    config, shapes, _ = spec()
    dtypes = tiny_source.f32_tables if f32 else lambda name: "BF16"
    order = sorted(shapes, key=lambda name: (dtypes(name) != "F32", name))
    metadata = {"config": json.dumps(config["config"]), "model_version": config["model_version"]}
    header = build_header(((name, dtypes(name), shapes[name]) for name in order), metadata)
    widths = {"F32": 4, "BF16": 2}
    size = len(header) + sum(math.prod(shapes[name]) * widths[dtypes(name)] for name in order)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)
    assert size > 46e9
    return shapes


def shard_header(tensors: list[tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of a shard's header, computed by the format's rules alone."""
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        begin, end = end, end + 2 * math.prod(shape)
        document[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    length = len(json.dumps(document, separators=(",", ":")))
    return 8 + (length + 7) // 8 * 8


def expected_shards(shapes: dict[str, tuple[int, ...]], limit: int) -> dict[str, int]:
    """Paths and sizes of all shards, worked out from the inventory."""
    found: dict[str, int] = {}
    for component, table in CHECKPOINT_TABLES.items():
        groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
        used = 0
        for name in sorted(name for name in shapes if component_of(name) == component):
            nbytes = 2 * math.prod(shapes[name])
            if groups[-1] and used + nbytes > limit:
                groups.append([])
                used = 0
            groups[-1].append((table.rename(name), shapes[name]))
            used += nbytes
        for number, group in enumerate(groups, 1):
            part = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
            payload = sum(2 * math.prod(shape) for _, shape in group)
            found[f"{component}/diffusion_pytorch_model{part}.safetensors"] = shard_header(group) + payload
    return found


@needs_spec
@pytest.mark.parametrize("f32", [False, True], ids=["bf16", "f32 tables"])
def test_full_size_plan_is_right_to_the_byte_in_seconds_and_little_memory(tmp_path: Path, f32: bool) -> None:
    path = tmp_path / "ltx-2.3-22b-dev.safetensors"
    shapes = full_size_checkpoint(path, f32)
    (plan, seconds, heavy), peak = in_fresh_process(MEASURE, path)
    assert seconds < 60
    assert peak < 100_000 * 1024
    assert heavy == []
    files = {file["path"]: file for file in plan["files"]}
    shards = {name: file["bytes"] for name, file in files.items() if file["action"] == "repack"}
    assert shards == expected_shards(shapes, 5_000_000_000)
    assert len([name for name in shards if name.startswith("transformer/")]) == 8
    written = {name for name, file in files.items() if file["action"] == "write"}
    configs = {f"{component}/config.json" for component in CHECKPOINT_TABLES}
    indexes = {f"{c}/diffusion_pytorch_model.safetensors.index.json" for c in ("transformer", "connectors")}
    others = {"scheduler/scheduler_config.json", "model_index.json", "source/metadata.json"}
    assert written == configs | indexes | others
    assert plan["total_bytes"] == sum(file["bytes"] for file in plan["files"])
    assert [entry.split(":")[0] for entry in plan["missing"]] == ["lora", "upsampler", "text_encoder"]


def test_plan_lists_what_is_missing(source: Path, out: Path) -> None:
    (source / tiny_source.LORA).unlink()
    plan = plan_overlay(Options(str(source), out), SilentReporter()).to_json()
    (missing,) = plan["missing"]
    assert missing.startswith("lora: ") and "*distilled-lora*" in missing
    assert not [file for file in plan["files"] if file["path"].startswith("loras/")]
    assert not out.exists()


def test_ambiguous_and_broken_inputs_are_no_plan(source: Path, out: Path) -> None:
    for name in (tiny_source.CHECKPOINT, tiny_source.LORA):
        (source / f"b-{name}").touch()
        with pytest.raises(SourceError, match="several"):
            plan_overlay(Options(str(source), out), SilentReporter())
        (source / f"b-{name}").unlink()
    path = source / tiny_source.CHECKPOINT
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:100], b"", b"PK\x03\x04" + whole[4:], whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(LtxpackError) as caught:
            plan_overlay(Options(str(source), out), SilentReporter())
        assert tiny_source.CHECKPOINT in str(caught.value)


def test_actions_say_what_is_done(source: Path, out: Path) -> None:
    for copy, action in ((False, "link"), (True, "copy")):
        plan = plan_overlay(Options(str(source), out, copy=copy), SilentReporter()).to_json()
        actions = {file["path"]: file["action"] for file in plan["files"]}
        assert actions[f"loras/{tiny_source.LORA}"] == action
        assert actions["latent_upsampler/diffusion_pytorch_model.safetensors"] == action
        assert actions["transformer/diffusion_pytorch_model.safetensors"] == "repack"
        assert actions["transformer/config.json"] == "write"


@pytest.mark.parametrize("dtypes", [lambda name: "BF16", tiny_source.f32_tables], ids=["bf16", "f32"])
def test_tensors_are_read_in_file_order_but_for_casts(tmp_path: Path, dtypes: Any, out: Path) -> None:
    """A file written by the safetensors library is sorted by width and name, so reads go forward only."""
    source = tiny_source.make_source(tmp_path / "source", dtypes=dtypes)
    plan = plan_overlay(Options(str(source), out), SilentReporter())
    for item in plan.items():
        if isinstance(item, WriteShard):
            starts = [entry.producer.source.start for entry in item.entries if isinstance(entry.producer, Copied)]
            assert starts == sorted(starts)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2**31), ("1.5k", 1500), ("123", 123), ("7B", 7)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text, "--vram") == size


@pytest.mark.parametrize("text", ["", "0", "-5GB", "5 apples", "GB", "1e9", "nan", "9" * 40, "0.1"])
def test_other_sizes_are_wrong_use(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--vram is not a size"):
        parse_size(text, "--vram")
