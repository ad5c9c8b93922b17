"""``ltxpack plan``: for this machine and for another, with and without an overlay; text, JSON, commands, the docs."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import plan_table
import pytest
from _full_size import make_full_size
from support import in_fresh_process, ltxpack, refused

from ltxpack.cli.plan import plan as command
from ltxpack.cli.run import run
from ltxpack.files.publish import atomic_write
from ltxpack.ltx23.releases import DEFAULT_FILES, OFFICIAL_REPO
from ltxpack.manifest import load_schema
from ltxpack.runtime.weights import machine

CARDS = {24: "stream", 32: "stream", 48: "swap", 80: "swap", 141: "resident"}


def planned(*arguments: str | Path) -> dict[str, Any]:
    done = ltxpack("plan", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    jsonschema.Draft202012Validator(json.loads(load_schema("plan"))).validate(document)
    return document


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An overlay of the published sizes; its holes are not hashed, which takes minutes and no plan asks for."""
    return make_full_size(tmp_path_factory.mktemp("full") / "out", hashed=False)


@pytest.mark.parametrize("card", CARDS)
def test_a_full_size_overlay_on_cards_of_every_size(card: int, full_size: Path) -> None:
    document = planned(full_size, "--vram", f"{card}GB", "--ram", "128GB")
    assert document["mode"] == CARDS[card]
    assert document["peak"]["card"] < card * 10**9
    assert document["stages"] == ["distilled-0.25", "distilled-0.5"]
    assert document["peak"]["card"] == max(phase["card"] for phase in document["phases"])
    assert all(phase["card"] == phase["weights"] + phase["activations"] for phase in document["phases"])
    commands = document["commands"]
    assert [c["done"] for c in commands] == [True, True, True, False]
    assert [c["command"].split()[1] for c in commands] == ["materialize", "bake-lora", "bake-lora", "run"]
    assert commands[0]["command"] == f"ltxpack materialize Lightricks/LTX-2.3 {full_size}"
    assert commands[-1]["command"] == f'ltxpack run {full_size} --prompt "…"'


def test_an_overlay_and_the_published_sizes_give_the_same_plan(full_size: Path) -> None:
    here, there = planned(full_size, "--vram", "48GB", "--ram", "64GB"), planned("--vram", "48GB", "--ram", "64GB")
    for document in (here, there):
        document.pop("commands")
        document["loading"] = document["loading"]["disk_rate"]
    assert here == there


def test_without_an_overlay_the_commands_begin_at_nothing() -> None:
    document = planned("--vram", "24GB", "--ram", "64GB", "--height", "576", "--images", "1", "--residency", "stream")
    assert [c["command"] for c in document["commands"]] == [
        "ltxpack materialize Lightricks/LTX-2.3 out",
        "ltxpack bake-lora out --strength 0.25 --strength 0.5",
        'ltxpack run out --prompt "…" --height 576 --residency stream --image FILE',
    ]
    assert not any(c["done"] for c in document["commands"])


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_bakes_in_codes_need_little_more_than_half_the_memory(form: str, full_size: Path, tmp_path: Path) -> None:
    size = ("--vram", "64GB", "--ram", "128GB")
    assert planned(*size)["mode"] == "swap"
    # Links: the files are sparse and of full size.
    bare = Path(shutil.copytree(full_size, tmp_path / "out", symlinks=True, copy_function=os.link))
    document = json.loads((bare / "ltxpack.json").read_text()) | {"bakes": {}}
    (bare / "ltxpack.json").unlink()
    (bare / "ltxpack.json").write_text(json.dumps(document))
    for overlay, root in (((), "out"), ((bare,), str(bare)), ((full_size,), str(full_size))):
        document = planned(*overlay, *size, "--format", form)
        assert document["stages"] == [f"distilled-0.25-{form}", f"distilled-0.5-{form}"]
        assert document["mode"] == "resident"
        (bake,) = (c["command"] for c in document["commands"] if "bake-lora" in c["command"])
        assert bake == f"ltxpack bake-lora {root} --strength 0.25 --strength 0.5 --format {form}"
        assert document["commands"][-1]["command"].endswith(f"--format {form}")


def test_the_commands_have_every_flag_the_plan_was_made_with(full_size: Path) -> None:
    size = ("--vram", "24GB", "--ram", "64GB")
    flags = (
        "--height 576 --width 1024 --num-frames 49 --fps 12.5 --steps 8 --decode fast "
        "--stage1 base --stage2 distilled-0.25 --format int8 --dtype float32 --residency stream"
    )
    words = flags.split()
    of_run, of_plan = (
        {name for one in each.params for name in one.opts if name.startswith("--")} for each in (run, command)
    )
    assert of_run & of_plan == {*words[::2], "--recipe", "--devices"}, "what both take is passed on"
    for overlay, folder in (((), "out"), ((full_size,), str(full_size))):
        commands = [c["command"] for c in planned(*overlay, *size, *words, "--images", "1")["commands"]]
        assert commands[-1] == " ".join([f'ltxpack run {folder} --prompt "…"', *words, "--image FILE"])
        assert commands[-2] == f"ltxpack bake-lora {folder} --strength 0.25"
    assert planned(*size, "--stage1", "base", "--stage2", "base")["stages"] == ["base", "base"]
    refused(ltxpack("plan", *size, "--stage2", "mine"), 2)


def test_blocks_that_stay_on_the_host_and_what_is_brought_into_the_page_cache_are_told() -> None:
    some, all_of_it = (planned("--vram", "141GB", "--ram", ram)["loading"] for ram in ("96GB", "128GB"))
    assert 0 < some["into_cache"] < some["first_video"]["bytes"] == all_of_it["into_cache"]
    document = planned("--vram", "24GB", "--ram", "64GB")
    held = document["setup"]["held_blocks"]
    assert all(held)
    assert f"{held[0]} blocks of stage 1 and {held[1]} of stage 2 stay in pinned host memory" in document["description"]
    reads = document["loading"]
    assert reads["next_video"]["bytes"] < 0.7 * reads["first_video"]["bytes"]
    assert planned("--vram", "24GB", "--ram", "128GB")["setup"]["held_blocks"] == [0, 0]


def test_the_tiles_of_the_decoder_are_told() -> None:
    size = ("--vram", "48GB", "--ram", "64GB")
    official, fast = planned(*size), planned(*size, "--decode", "fast")
    assert official["decode"].startswith("decode official: 18 tiles")
    assert fast["decode"].startswith("decode fast: one tile of 121 frames of 1088x1920 pixels")
    video = [next(phase for phase in d["phases"] if phase["name"] == "video")["card"] for d in (official, fast)]
    assert video[0] < video[1] < 48 * 10**9
    assert fast["decode"] in ltxpack("plan", *size, "--decode", "fast").stdout


def test_loading_at_a_stated_rate(full_size: Path) -> None:
    slow, fast = (planned(full_size, "--vram", "141GB", "--ram", "128GB", "--disk-rate", r) for r in ("1GB", "4GB"))
    files = [path for path in full_size.rglob("*.safetensors") if path.parent.name not in ("transformer", "loras")]
    read = sum(path.stat().st_size for path in files)
    assert slow["loading"]["first_video"]["bytes"] == fast["loading"]["first_video"]["bytes"] == read
    assert slow["loading"]["first_video"]["seconds"] == pytest.approx(read / 1e9)
    assert fast["loading"]["first_video"]["seconds"] == pytest.approx(read / 4e9)
    assert math.ceil(slow["loading"]["next_video"]["seconds"]) == 25


def test_this_machine_has_no_card(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_card", lambda number: None)
    document = planned(demo / "overlay")
    assert document["machine"]["card"] is None and document["mode"] == "resident"
    done = ltxpack("plan", demo / "overlay")
    assert "no NVIDIA card found" in done.stdout
    assert "residency resident: both transformers stay" in done.stdout
    assert "stage 2" in done.stdout and "next  ltxpack run" in done.stdout


def asked(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """From now on ``script`` is the driver's tool, which says what is free on a card; no card is hidden."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def cards_here(folder: Path, monkeypatch: pytest.MonkeyPatch, **free: int) -> None:
    """So many MiB are free on each card, by the name that the driver's tool has for it."""
    cases = [f"[ $1 = --id={name} ] && echo {mebibytes}" for name, mebibytes in free.items()]
    asked(folder, monkeypatch, "\n".join([*cases, "true"]))


def test_the_card_of_this_machine_is_asked(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards_here(tmp_path, monkeypatch, **{"2": 24000})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert planned(demo / "overlay")["machine"]["card"] == 24000 * 2**20
    for answer in ("exit 9", "echo nothing", "echo"):
        asked(tmp_path, monkeypatch, answer)
        assert planned(demo / "overlay")["machine"]["card"] is None
    asked(tmp_path, monkeypatch, "echo 24000")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert planned(demo / "overlay")["machine"]["card"] is None


def schemes(*arguments: str | Path) -> dict[str, dict[str, Any]]:
    return {one["scheme"]: one for one in planned(*arguments)["devices"]["schemes"]}


def test_several_cards_scheme_by_scheme(full_size: Path) -> None:
    size = ("--vram", "48GB", "--ram", "128GB", "--devices", "2")
    document = planned(*size)
    assert document["devices"] == planned(full_size, *size)["devices"]
    assert [(one["passes"], one["video_tokens"]) for one in document["devices"]["work"]] == [(93, 8160), (7, 32640)]
    assert document["devices"]["machine"] == {"card": 48 * 10**9, "host": document["machine"]["host"] // 2}
    found = schemes(*size)
    assert {name: round(one["gain"], 2) for name, one in found.items()} == {
        "guidance": 1.29, "sequence": 1.97, "both": 1.63, "stages": 1.47, "data": 2.0,
    }  # fmt: skip
    assert found["guidance"]["follows_from"] == "1 / (0.68 · 0.67 + 0.32)"
    alone = planned("--vram", "48GB", "--ram", "65GB")
    assert found["data"]["devices"] == [{"mode": alone["mode"], **alone["peak"]}], "half of the host is each one's"
    # Both transformers stay where they are, each on its own card, which one card of this size has no room for.
    assert alone["mode"] == "swap"
    assert [one["mode"] for one in found["stages"]["devices"]] == ["resident", "resident"]
    assert all(38e9 < one["card"] < 48e9 for one in found["stages"]["devices"])
    peaks = {name: max(device["card"] for device in one["devices"]) for name, one in found.items()}
    assert peaks["guidance"] == peaks["data"], "of a stage of one pass every card makes all"
    assert peaks["data"] - peaks["sequence"] > 1e9, "of its tokens half"
    slow = schemes(*size, "--link-rate", "5GB")["sequence"]["received"]
    assert slow["bytes"] == found["sequence"]["received"]["bytes"]
    assert slow["seconds"] == pytest.approx(slow["bytes"] / 5e9)
    assert document["commands"][-1]["command"] == 'ltxpack run out --prompt "…" --devices 0,1'


def test_several_cards_in_words() -> None:
    said = ltxpack("plan", "--vram", "24GB", "--ram", "128GB", "--devices", "3").stdout
    assert "3 devices, for each 24.0 GB of card and 42.0 GB of the host" in said
    assert "stage 1 is 93 passes of 8160 video tokens, 68% of the work" in said
    assert "32 heads do not divide by 3" in said and "there are 2 stages" in said
    assert "Counted, not measured" in said
    said = ltxpack("plan", "--vram", "24GB", "--ram", "20GB", "--devices", "8").stdout
    assert "the host has too little free memory" in said, "each has an eighth of what is enough for one"


def test_the_smallest_of_the_named_cards_counts(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards_here(tmp_path, monkeypatch, **{"0": 24000, "1": 48000, "2": 32000})
    overlay = demo / "overlay"
    assert planned(overlay, "--devices", "1,2")["machine"]["card"] == 32000 * 2**20
    assert planned(overlay, "--devices", "2")["machine"]["card"] == 24000 * 2**20, "a number: like the first one"
    assert planned(overlay, "--devices", "cpu:2")["machine"]["card"] is None
    message = refused(ltxpack("plan", overlay, "--devices", "1,3"), 2)
    assert "cards that are not here" in message and "found 3" in message
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    assert planned(overlay)["machine"]["card"] == 32000 * 2**20
    assert planned(overlay, "--devices", "cuda:1,0")["machine"]["card"] == 32000 * 2**20


class Driver:
    """CUDA's own library on a machine whose first card by PCI bus is the second of two to CUDA."""

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = number
        return 0 if number < 2 else 101

    def cuDeviceGetUuid_v2(self, uuid: Any, device: Any) -> int:
        uuid[:] = [device.value] * 16
        return 0


def test_cards_are_numbered_as_cuda_numbers_them(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi, which counts them in another order, is asked by UUID."""
    first, second = (f"GPU-{byte * 4}-{byte * 2}-{byte * 2}-{byte * 2}-{byte * 6}" for byte in ("00", "01"))
    cards_here(tmp_path, monkeypatch, **{first: 48000, second: 24000})
    assert planned(demo / "overlay")["machine"]["card"] is None
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: Driver())
    assert planned(demo / "overlay")["machine"]["card"] == 48000 * 2**20
    assert planned(demo / "overlay", "--devices", "0,1")["machine"]["card"] == 24000 * 2**20
    assert "found 2" in refused(ltxpack("plan", demo / "overlay", "--devices", "0,2"), 2)


def test_an_overlay_without_bakes_is_planned_with_the_official_pair(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "my out"
    assert ltxpack("materialize", demo / "source", out).returncode == 0
    commands = planned(out, "--vram", "24GB", "--ram", "64GB")["commands"]
    assert [c["done"] for c in commands] == [True, False, False]
    assert commands[1]["command"] == f"ltxpack bake-lora '{out}' --strength 0.25 --strength 0.5"
    refused(ltxpack("plan", out, "--stage2", "mine"), 2)
    assert planned(out, "--stage1", "base", "--stage2", "base")["stages"] == ["base", "base"]


def test_the_commands_name_the_distilled_checkpoint_and_a_lora_of_ones_own(demo: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(demo / "source", source)
    (checkpoint,) = source.glob("*-dev.safetensors")
    distilled = checkpoint.rename(source / checkpoint.name.replace("dev", "distilled"))
    (lora,) = source.glob("*lora*.safetensors")
    mine = lora.rename(tmp_path / "mine.safetensors")
    (upsampler,) = source.glob("*upscaler*.safetensors")
    larger = upsampler.rename(tmp_path / "my larger.safetensors")
    out = tmp_path / "out"
    made = ltxpack("materialize", source, out, "--checkpoint", distilled.name, "--upsampler", larger)
    assert made.stdout.splitlines()[-1] == f"next: ltxpack run {out} --prompt 'Waves on a beach' --recipe distilled"
    assert ltxpack("bake-lora", out, "--lora", mine, "--strength", "0.5").returncode == 0
    coded = ("--name", "coded", "--format", "fp8", "--keep-blocks", "1")
    assert ltxpack("bake-lora", out, "--lora", mine, "--strength", "0.7", *coded).returncode == 0
    given = ("--recipe", "distilled", "--stage1", "mine-0.5", "--stage2", "coded")
    commands = planned(out, *given, "--vram", "24GB", "--ram", "64GB")["commands"]
    assert [each["command"] for each in commands][:3] == [
        f"ltxpack materialize SOURCE {out} --checkpoint {distilled.name} --upsampler 'my larger.safetensors'",
        f"ltxpack bake-lora {out} --lora mine.safetensors --strength 0.5",
        f"ltxpack bake-lora {out} --lora mine.safetensors --strength 0.7 {' '.join(coded)}",
    ]


def test_the_commands_name_inputs_that_are_not_the_published_ones(overlay: Path) -> None:
    document = json.loads((overlay / "ltxpack.json").read_bytes())
    names = {"checkpoint": DEFAULT_FILES["checkpoint"], "lora": "b.safetensors", "upsampler": "a.safetensors"}
    for file in document["source"]["files"]:
        file["name"] = names.get(file["role"], file["name"])
        file["repo"] = {"lora": "me/loras", "text_encoder": "me/gemma"}.get(file["role"], OFFICIAL_REPO)
    document["source"]["repo"] = OFFICIAL_REPO
    atomic_write(overlay / "ltxpack.json", json.dumps(document).encode())
    told = planned(overlay, "--vram", "24GB", "--ram", "64GB")["commands"][0]["command"]
    flags = "--lora me/loras/b.safetensors --upsampler a.safetensors --text-encoder me/gemma"
    assert told == f"ltxpack materialize {OFFICIAL_REPO} {overlay} {flags}"


def test_what_fits_nowhere_is_refused_with_numbers_and_what_is_no_overlay(tmp_path: Path) -> None:
    assert "ltxpack materialize" in refused(ltxpack("plan", tmp_path), 1)
    message = refused(ltxpack("plan", "--vram", "6GB", "--ram", "64GB"), 1)
    assert "GB" in message and "6.0 GB free" in message
    message = refused(ltxpack("plan", "--vram", "24GB", "--ram", "64GB", "--residency", "resident"), 1)
    assert "next: the same command with --residency stream" in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--vram lots", ["--vram is not a size", "lots", "5GB"]),
        ("--ram -1", ["--ram is not a size", "-1"]),
        ("--disk-rate 0", ["--disk-rate is not a size", "0"]),
        ("--height 100", ["height", "multiple of"]),
        ("--height 3200000", ["choose --height 16384"]),
        ("--num-frames 24", ["frames"]),
        ("--dtype int8", ["int8"]),
        ("--vram 24GB --devices cpu:2", ["--vram goes with cards"]),
        *((f"--devices {wrong}", ["--devices"]) for wrong in ["0", "1", "65", "9" * 11, "cpu", "cpu:1", "0,0", "x"]),
    ],
)
def test_wrong_use(flags: str, words: list[str]) -> None:
    message = refused(ltxpack("plan", *flags.split()), 2)
    assert all(word in message for word in words)


# The largest sides of a video file, and frames by the million.
HUGE = ("--height", "16128", "--width", "16384", "--num-frames", "9000001")


@pytest.mark.parametrize(
    "flags", [HUGE[:2], HUGE[4:], HUGE, (*HUGE[4:], "--decode", "fast"), (*HUGE[4:], "--fps", "1e-7")]
)
@pytest.mark.parametrize("machine", [("--vram", "24GB", "--ram", "64GB"), ("--ram", "64GB")])
def test_sizes_and_counts_that_no_machine_has_room_for_are_answered_at_once(
    flags: tuple[str, ...], machine: tuple[str, ...]
) -> None:
    begin = time.process_time()
    message = refused(ltxpack("plan", *machine, *flags), 1)
    assert "too little free memory" in message
    assert time.process_time() - begin < 60, "whoever counts what such sizes take one by one needs hours"


@pytest.mark.parametrize(("flag", "most"), [("--height", 16384), ("--width", 16384), ("--num-frames", 2**31)])
@pytest.mark.parametrize("multiple", [2**40, 10**4000], ids=["2^40", "10^4000"])
def test_sizes_that_no_plan_can_count_are_wrong_use(flag: str, most: int, multiple: int) -> None:
    message = refused(ltxpack("plan", flag, str(multiple + (flag == "--num-frames"))), 2)
    assert f"at most {most}" in message and len(message) < 5000


def test_planning_loads_no_torch(full_size: Path) -> None:
    code = """
    import sys
    from ltxpack.cli import cli
    cli.main(["plan", sys.argv[1], "--vram", "24GB"], standalone_mode=False)
    answer = sorted({"torch", "diffusers", "transformers"} & set(sys.modules))
    """
    assert in_fresh_process(code, full_size)[0] == []


def test_the_table_of_plans_is_the_planners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["plan_table.py", "--check"])
    assert plan_table.main() == 0
