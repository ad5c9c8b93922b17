"""The deployment page: every figure and command is the planner's, it stands alone, and that of the docs is current."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from next_commands import fault_of
from page_support import parsed
from plan_page_support import CASES, Shown, document_of
from support import REPOSITORY, ltxpack, refused

from ltxpack.deployment import document as documents
from ltxpack.deployment import render
from ltxpack.deployment.choices import CARDS, DEVICES, FORMS, FRAMES, HOSTS, LORAS, RECIPES, SIZES, choices
from ltxpack.deployment.document import tenths
from ltxpack.deployment.grid import Subject, between, machine_of, share_of
from ltxpack.errors import DeviceError
from ltxpack.runtime.overlay import Overlay
from ltxpack.runtime.sampling.recipes import RECIPES as EVERY_RECIPE
from ltxpack.runtime.weights.report import plan_or_refuse, to_json

CURRENT = REPOSITORY / "docs" / "plan.html"
# A video of each case; together they have every size and number of frames with every recipe and every form.
VIDEOS = [((number + number // 3) % 4, number % 4) for number in range(len(CASES))]


@pytest.fixture(scope="module")
def page() -> bytes:
    return render()


@pytest.fixture(scope="module")
def document(page: bytes) -> dict[str, Any]:
    return document_of(page)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(None)


def test_the_page_of_the_docs_is_what_make_docs_makes(page: bytes) -> None:
    assert CURRENT.read_bytes() == page, "run make docs"
    assert len(page) < 500_000


@pytest.mark.parametrize("number", range(len(CASES)), ids=map("-".join, CASES))
def test_every_figure_of_a_video_is_the_planners_on_every_machine(
    number: int, document: dict[str, Any], subject: Subject
) -> None:
    """Each machine is planned by itself here, those between two that are alike, too."""
    (recipe, form), (size, frames) = CASES[number], VIDEOS[number]
    case = subject.case(EVERY_RECIPE[recipe], form)
    work = case.request((SIZES[size], FRAMES[frames])).work(case.stages)
    shown = Shown(document, list(RECIPES).index(recipe), list(FORMS).index(form), size, frames)
    assert shown.devices == [1, 2, 4]
    shares = {count: share_of(subject.dit, work, case.model.itemsize, count) for count in shown.devices}
    assert shown.work["forwards"] == sum(stage.evaluations * stage.passes for stage in work.stages)
    for (card, gigabytes), (host, memory), count in product(enumerate(CARDS), enumerate(HOSTS), shown.devices):
        machine, found = machine_of(gigabytes, memory, count), shown.on(count, card, host)
        whose, share = "the card" if count == 1 else "each card", shares[count]
        try:
            plan = to_json(plan_or_refuse(case.model, share, machine, "auto", whose), machine, 1, [])
        except DeviceError as error:
            assert found == {"refused": f"{error.problem}: {error.expected} needed, {error.found}"}
            continue
        assert (found["mode"], found["description"]) == (plan["mode"], plan["description"])
        assert found["phases"] == [(one["name"], tenths(one["card"]), tenths(one["host"])) for one in plan["phases"]]
        loading = plan["loading"]
        assert found["reads"] == (tenths(loading["first_video"]["bytes"]), tenths(loading["next_video"]["bytes"]))
        beside = document["sizes"][shown.work["beside"][shown.devices.index(count)]]
        assert beside == [tenths(one["activations"]) for one in plan["phases"]]


def test_what_is_the_same_at_both_ends_is_made_nowhere_between() -> None:
    made: list[int] = []
    assert between(9, lambda number: made.append(number) or number // 6) == [0] * 6 + [1] * 3
    assert sorted(made) == [0, 4, 5, 6, 8]


@pytest.mark.parametrize(
    ("recipe", "form", "size", "frames", "devices"),
    [(0, 0, 3, 1, 1), (0, 1, 1, 2, 2), (1, 2, 0, 0, 4), (2, 0, 2, 3, 4), (3, 1, 3, 2, 2)],
)
def test_the_page_says_what_the_command_line_says(
    recipe: int, form: int, size: int, frames: int, devices: int, document: dict[str, Any]
) -> None:
    height, width = SIZES[size]
    flags = ["--vram", "80GB", "--ram", "128GB", "--recipe", list(RECIPES)[recipe], "--format", list(FORMS)[form]]
    flags += ["--height", str(height), "--width", str(width), "--num-frames", str(FRAMES[frames])]
    flags += ["--devices", str(devices)] if devices > 1 else []
    done = ltxpack("plan", *flags, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    shown = Shown(document, recipe, form, size, frames)
    assert shown.commands(devices, 0) == [one["command"] for one in told["commands"]]
    found = shown.on(devices, list(CARDS).index(80), HOSTS.index(128))
    gain = shown.work["gains"][DEVICES.index(devices)]
    if devices == 1:
        assert found["mode"] == told["mode"] and gain == 100
        return
    schemes = [one for one in told["devices"]["schemes"] if one["for"] == "one video" and one["gain"] is not None]
    assert gain >= round(100 * max(one["gain"] for one in schemes)), "each stage is shared out in the best way"
    [each] = max(schemes, key=lambda one: one["gain"])["devices"]
    assert found["mode"] == each["mode"]
    assert max(card for _, card, _ in found["phases"]) == tenths(each["card"])
    assert max(host for _, _, host in found["phases"]) == tenths(each["host"])


def test_every_command_can_be_typed(document: dict[str, Any]) -> None:
    seen = set()
    for recipe, form, size, frames in product(*map(range, map(len, (RECIPES, FORMS, SIZES, FRAMES)))):
        shown = Shown(document, recipe, form, size, frames)
        for devices, loras in product(shown.devices, range(len(LORAS) + 1)):
            lines = shown.commands(devices, loras)
            assert [line.split()[1] for line in lines][:: len(lines) - 1] == ["materialize", "run"]
            assert sum(line.count("--add") for line in lines) == loras
            seen.update(lines)
    faults = {line: fault_of(line.replace('"…"', "TEXT")) for line in seen}
    assert not {line: fault for line, fault in faults.items() if fault}


def typed(line: str, overlay: Path, lora: Path) -> list[str | Path]:
    """The words of a command of the page, for another folder and with another file for its LoRA."""
    stands_for = {"out": str(overlay), f"{LORAS[0][0]}={LORAS[0][1]}": f"{lora}={LORAS[0][1]}"}
    return [stands_for.get(word, word) for word in shlex.split(line)[1:]]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_commands_with_a_lora_bake_what_they_run(
    recipe: str, demo: Path, tmp_path: Path, document: dict[str, Any]
) -> None:
    overlay, [main] = tmp_path / "out", (demo / "source").glob("*lora*.safetensors")
    lora = Path(shutil.copy(main, tmp_path / LORAS[0][0]))
    assert ltxpack("materialize", demo / "source", overlay).returncode == 0
    _, bake, run = Shown(document, list(RECIPES).index(recipe), 0, 0, 0).commands(1, 1)
    done = ltxpack(*typed(bake, overlay, lora))
    assert done.returncode == 0, done.stderr
    words = [word for word in typed(run, overlay, lora) if word not in ("--prompt", "…")]
    done = ltxpack("plan", *words[1:], "--vram", "24GB", "--ram", "64GB", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert all("+lora-1-0.8" in stage for stage in told["stages"]) and all(c["done"] for c in told["commands"][:-1])


def test_the_work_of_the_default_video_is_that_of_the_spec(document: dict[str, Any]) -> None:
    """Spec 07, section 5: 24,766 and 12,004 TFLOP."""
    assert Shown(document, 0, 0, SIZES.index((1088, 1920)), FRAMES.index(121)).work["petaflop"] == 368


def test_disk_is_what_is_downloaded_and_baked(document: dict[str, Any]) -> None:
    """38.0 GB a bf16 bake and 21.0 an fp8 one; a base with a LoRA in it is one more."""
    disk = {case: one["disk"] for case, one in zip(CASES, document["cases"], strict=True)}
    assert disk["hq", "bf16"] == [[791, 760, 1551]] * 2
    assert disk["one-stage", "bf16"] == [[791, 0, 791], [791, 380, 1171]]
    assert disk["distilled", "fp8"] == [[791, 210, 1001]] * 2


def test_the_page_stands_alone(page: bytes) -> None:
    found = parsed(page)
    assert not {"link", "img", "iframe", "object", "base", "a"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name in ("src", "href", "style") or name.startswith("on")]
    assert not re.search(rb"https?:|url\(|@import|fetch\(|XMLHttp|WebSocket|innerHTML|eval\(|file:", page)
    [policy] = [value for name, value in found.attributes if value.startswith("default-src")]
    assert policy.startswith("default-src 'none'; ")
    for tag, kind in ((b"style", "style-src"), (b"script", "script-src")):
        [content] = re.findall(rb"<" + tag + rb">(.*?)</" + tag + rb">", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy


def test_everything_has_a_label_and_a_place(page: bytes) -> None:
    found = parsed(page)
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    refers = ("for", "aria-describedby", "aria-labelledby")
    assert {value for name, value in found.attributes if name in refers} <= set(ids)
    wanted = set(re.findall(rb'element\("([a-z-]+)"\)', page))
    assert {name.decode() for name in wanted} <= set(ids)
    for choice in choices():
        assert {f"{choice.name}-why", f"{choice.name}-legend"} <= set(ids)
        assert all(label in found.text for label in choice.options) and choice.first in choice.options
    assert found.tags.count("fieldset") == found.tags.count("legend") == len(choices()) - 1
    assert found.tags.count("label") == found.tags.count("input") + found.tags.count("select")
    assert ("lang", "en") in found.attributes and found.tags.count("h1") == 1 and "noscript" in found.tags


@pytest.fixture
def few_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of the smallest video alone: that all are alike in every case, the tests above show."""
    monkeypatch.setattr(documents, "SIZES", SIZES[:1])
    monkeypatch.setattr(documents, "FRAMES", FRAMES[:1])


def options_of(document: dict[str, Any]) -> Sequence[str]:
    return [document["texts"][case["no"]] if "no" in case else "" for case in document["cases"]]


@pytest.mark.usefixtures("few_videos")
def test_the_page_of_an_overlay_is_about_that(demo: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.html"
    done = ltxpack("plan", demo / "overlay", "--page", file)
    assert done.returncode == 0 and done.stdout.startswith(f"{file}: "), done.stderr
    document = document_of(file.read_bytes())
    assert not any(options_of(document))
    shown = Shown(document, 0, 0, 0, 0)
    told = json.loads(ltxpack("plan", demo / "overlay", "--vram", "12GB", "--ram", "32GB", "--json").stdout)
    assert shown.text(shown.case["stages"]) == "stage 1: distilled-0.25, stage 2: distilled-0.5"
    assert shown.on(1, 0, 0)["description"] == told["description"]
    root = demo / "overlay"
    _, bake, run = shown.commands(1, 2)
    names = [f"distilled-{strength}+lora-1-0.8+lora-2-0.6" for strength in (0.25, 0.5)]
    assert bake.startswith(f"ltxpack bake-lora {root} --strength 0.25 --strength 0.5 --add ")
    assert run.endswith(f"--stage1 {names[0]} --stage2 {names[1]}")


@pytest.mark.usefixtures("few_videos")
def test_the_page_names_an_overlay_by_its_folder(demo: Path, tmp_path: Path) -> None:
    assert Subject(Overlay.open(demo / "overlay" / "vae" / "..")).name == "overlay"
    latin_1 = tmp_path / os.fsdecode(b"gr\xfcn")
    try:
        latin_1.symlink_to(demo / "overlay")
    except OSError:
        pytest.skip("this filesystem takes UTF-8 names only")
    assert rb"/gr\udcfcn" in render(Overlay.open(latin_1))


@pytest.mark.usefixtures("few_videos")
def test_bakes_that_auto_cannot_choose_between_leave_the_official_ones(demo: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "out"
    assert ltxpack("materialize", demo / "source", overlay).returncode == 0
    assert ltxpack("bake-lora", overlay, "--strength", "0.3", "--strength", "0.4").returncode == 0
    document = document_of(render(Overlay.open(overlay)))
    assert not any(options_of(document))
    shown = Shown(document, 0, 0, 0, 0)
    assert shown.text(shown.case["stages"]) == "stage 1: distilled-0.25, stage 2: distilled-0.5"
    assert shown.commands(1, 0)[1] == f"ltxpack bake-lora {overlay} --strength 0.25 --strength 0.5"


@pytest.mark.usefixtures("few_videos")
def test_what_an_overlay_cannot_run_cannot_be_picked(demo: Path, tmp_path: Path) -> None:
    source, overlay = tmp_path / "source", tmp_path / "out"
    shutil.copytree(demo / "source", source)
    [checkpoint] = source.glob("*-dev.safetensors")
    distilled = checkpoint.rename(source / checkpoint.name.replace("dev", "distilled"))
    [lora] = source.glob("*lora*.safetensors")
    lora.unlink()
    assert ltxpack("materialize", source, overlay, "--checkpoint", distilled.name).returncode == 0
    document = document_of(render(Overlay.open(overlay)))
    reasons = dict(zip(CASES, options_of(document), strict=True))
    assert [recipe for recipe in RECIPES if not reasons[recipe, "bf16"]] == ["distilled"]
    assert "wants the full model" in reasons["hq", "fp8"]
    _, bake, run = Shown(document, list(RECIPES).index("distilled"), 0, 0, 0).commands(1, 2)
    assert bake.endswith("--strength 0.6 --lora lora-2.safetensors --add lora-1.safetensors=0.8")
    assert "--stage1 lora-2-0.6+lora-1-0.8 --stage2 lora-2-0.6+lora-1-0.8" in run


def test_the_page_goes_with_an_overlay_alone(tmp_path: Path) -> None:
    message = refused(ltxpack("plan", "--page", tmp_path / "plan.html", "--vram", "24GB", "--json"), 2)
    assert "--vram, --json" in message
    assert "is a folder" in refused(ltxpack("plan", "--page", tmp_path), 2)
    assert "no such folder" in refused(ltxpack("plan", "--page", tmp_path / "no" / "plan.html"), 2)
    assert "ltxpack materialize" in refused(ltxpack("plan", tmp_path, "--page", tmp_path / "plan.html"), 1)
    assert not list(tmp_path.iterdir())
