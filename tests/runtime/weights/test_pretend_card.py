"""The runtime as it runs on a CUDA device, on one that is pretended (pretend_card), at the published model's sizes.

It shows that every tensor is on the device it has to be on, in every phase and wherever weights lie; that no kernel
reads what a copy has not brought, no copy overwrites what a kernel still reads, and nothing is freed or filled anew
while a copy is under way, whatever the device's pace; that what is pinned is what is copied from; that the host waits
for nothing inside a stage; and that the bytes alive in each phase are within the plan.

It cannot show what kernels compute or how fast, whether a kernel exists for its operands, what compiled code does, what
the driver refuses, the allocator's gaps, or what two threads do at once: work of other threads is done as it is asked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import gpu
import numpy as np
import pretend_card
import pytest
import torch
import works
from _full_size import UNKNOWN, make_full_size
from _gpu_clock import Clock
from _gpu_sizes import TINY
from blake3 import blake3
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2VideoTransformer3DModel
from lora_bake.lora_support import linears, low_rank, make_overlay, official_keys, random_weights, save, shapes
from PIL import Image
from pretend_card import GIB, Card

from ltxpack.files import reader
from ltxpack.files.direct import ALIGN, CACHED, DIRECT, DirectReader
from ltxpack.lora_bake import BakeOptions, bake, stream
from ltxpack.manifest import FORMATS
from ltxpack.reporter import SilentReporter
from ltxpack.runtime import recipe_run
from ltxpack.runtime.model import kernels, quantised
from ltxpack.runtime.recipe_run import decode_video, encode_ahead, generate, work_of
from ltxpack.runtime.request import Request
from ltxpack.runtime.run import write_video
from ltxpack.runtime.sampling.recipes import RES2S
from ltxpack.runtime.sampling.sample import euler
from ltxpack.runtime.sampling.shape import AV
from ltxpack.runtime.session import Session, Timings
from ltxpack.runtime.settings import SessionSettings
from ltxpack.runtime.weights import copies, keeper, machine, placed, reading, report, slots
from ltxpack.runtime.weights import plan as planner
from ltxpack.runtime.weights.load import read_headers
from ltxpack.runtime.weights.plan import CARD, FILE, HOST, Placement

# diffusers looks at torch as it is imported: not while a card is pretended.
assert AutoencoderKLLTX2Audio and AutoencoderKLLTX2Video and LTX2VideoTransformer3DModel
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card: test_*_cuda.py run on it")
# Twelve layers of the text encoder are two of all kinds in their order.
BLOCKS, LAYERS = 3, 12
UNGUIDED: dict[str, Any] = {"video_cfg": 1.0, "audio_cfg": 1.0, "modality": 1.0}
SMALL: dict[str, Any] = {"height": 128, "width": 192, "num_frames": 9, "steps": 2, **UNGUIDED}


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretended")
    return make_full_size(folder, blocks=BLOCKS, layers=LAYERS, hashed=False, forms=FORMATS)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """The card, there for the test."""
    with there(Card(), monkeypatch) as card:
        yield card


@contextmanager
def there(card: Card, patch: pytest.MonkeyPatch) -> Iterator[Card]:
    pretend_card.install(patch, card)
    patch.setattr(keeper, "Background", pretend_card.Ahead)
    for module in (reading, slots, placed):
        patch.setattr(module, "ThreadPoolExecutor", pretend_card.AtOnce)
    patch.setattr(machine, "usable_host", lambda *_: (500 * GIB, False))
    patch.setattr(reading, "blake3", Unread)

    def scatter(file: DirectReader, views: list[memoryview], start: int) -> None:
        for view in views:
            card.host_writes(pretend_card.address(view), len(view), "read into")

    def gather(file: DirectReader, memory: memoryview, start: int, nbytes: int) -> None:
        scatter(file, [memory[start % ALIGN :][:nbytes]], start)

    def copy_bytes(view: memoryview, data: memoryview) -> None:
        scatter(file=None, views=[view], start=0)  # type: ignore[arg-type]

    patch.setattr(DirectReader, "scatter", scatter)
    patch.setattr(DirectReader, "gather", gather)
    patch.setattr(reader, "copy_bytes", copy_bytes)
    kernels.measured.cache_clear()
    try:
        with card:
            yield card
    finally:
        kernels.measured.cache_clear()


class Unread:
    """The hash of weights, which nobody reads; of whole files, whose hash begins with something, it is the true one."""

    AUTO = -1

    def __new__(cls, *begun: bytes, **more: Any) -> Any:
        return blake3(*begun, **more) if begun else super().__new__(cls)

    def __init__(self, **_: Any) -> None:
        pass

    def update(self, data: memoryview) -> None:
        pass

    def hexdigest(self) -> str:
        return UNKNOWN


def opened(overlay: Path, reporter: Any = None, **more: Any) -> Session:
    return Session(overlay, SessionSettings(**{"device": "cuda", "cache": False, **more}), reporter)


def in_brief(patch: pytest.MonkeyPatch) -> None:
    """Stages of a few Euler steps, and no sound: for what does not depend on them."""
    levels = [torch.tensor([0.9, 0.0]), torch.tensor([1.0, 0.5, 0.0])]
    patch.setitem(recipe_run.SAMPLERS, RES2S, euler)
    patch.setattr(recipe_run, "sigmas_of", lambda schedule, tokens, steps: levels[schedule.fixed is None])
    patch.setattr(recipe_run, "decode_audio", lambda make, latents: (torch.zeros(2, 24000), 48000))


def with_prompts(make: Session, request: Request) -> Request:
    """As if they had been encoded before."""
    contexts = [AV(torch.zeros(1, 1024, 4096, dtype=torch.bfloat16), torch.zeros(1, 1024, 2048, dtype=torch.bfloat16))]
    make.prompts._ahead = {request.prompts: contexts * 2}
    return request


def picture(path: Path) -> str:
    Image.fromarray(np.full((90, 160, 3), 127, dtype=np.uint8)).save(path)
    return str(path)


class Watched(SilentReporter):
    """Notes where the host waited within a stage after its first step, and how many steps it looked at."""

    def __init__(self, card: Card) -> None:
        self.card, self.steps, self.inside = card, 0, list[Any]()
        self._stage, self._from = False, -1

    def begin(self, label: str, total: int, unit: str) -> None:
        self._stage, self._from = label.startswith("stage"), -1

    def advance(self, amount: int = 1) -> None:
        if self._stage and self._from >= 0:
            self.inside += self.card.waits[self._from :]
            self.steps += 1
        self._from = len(self.card.waits)


STG = {"": 1.0, "_blocks": (1,)}
PHASES = {"text": ("text", "connectors"), "audio": ("sound",)}


def test_a_video_of_full_size(overlay: Path, card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, two images of different strength, both stages, sound, pictures: within the plan, and without a wait.

    With all four passes of guidance: cond, uncond, perturbed and isolated.
    """
    peaks: dict[str, int] = {}
    outer = Timings.phase

    @contextmanager
    def phase(timings: Timings, name: str) -> Iterator[None]:
        card.peak = card.live
        with outer(timings, name):
            yield
        peaks[name] = card.peak

    monkeypatch.setattr(Timings, "phase", phase)
    images = (f"{picture(tmp_path / 'a.png')}@0:1", f"{picture(tmp_path / 'b.png')}@last:0.7")
    reporter = Watched(card)
    with opened(overlay, residency="resident", reporter=reporter, save_activations=tmp_path / "a.st") as make:
        stg: Any = {f"{side}_stg{what}": value for side in ("video", "audio") for what, value in STG.items()}
        request = Request.of("a boat", images=images, steps=2, **stg)
        latents, waveform, _ = generate(make, request)
        found = [latents.stage1, latents.stage2]
        assert all(str(part.device) == "cuda:0" for each in found for part in (each.video, each.audio))
        assert waveform.device.type == "cpu"
        frames: list[tuple[int, ...]] = []
        decode_video(make, latents.stage2.video, lambda part: frames.append(tuple(part.shape)))
        plan = make.residency.plan
        assert plan is not None
    assert sum(shape[0] for shape in frames) == 121
    assert card.races == []
    assert reporter.inside == [] and reporter.steps == 3
    planned = {one.name: one.card for one in plan.phases}
    for name, peak in peaks.items():
        assert peak <= 1.01 * max(planned[one] for one in PHASES.get(name, (name,))), name
    del latents, found, request
    assert card.live == 0 and card.pins == []


# Every place for weights there is; half of the blocks streamed, where some are.
PARTS = ("bakes/distilled-0.25", "bakes/distilled-0.5")
SOME, HELD = (3, 2), (1, 3)
placements = partial(works.placements, blocks=BLOCKS, layers=LAYERS)
PLACEMENTS = {
    "swap, the next read ahead": placements(Placement(ahead=True), CARD),
    "swap, kept": placements(Placement(HOST), CARD),
    "stream, kept": placements(Placement(HOST, source=HOST), streamed=SOME),
    "stream from memory, some held": placements(Placement(source=HOST), streamed=SOME, held=HELD),
    "stream from the file, some held": placements(Placement(source=FILE), streamed=SOME, held=HELD),
}
SOME_HELD = PLACEMENTS["stream from memory, some held"]


def planned(patch: pytest.MonkeyPatch, placements: Mapping[str, Placement]) -> None:
    """Have every plan be of ``placements``."""

    def plan(model: Any, work: Any, *_: Any) -> Any:
        return planner.plan_for(model, work, "forced", placements)

    patch.setattr(report, "plan_or_refuse", plan)
    patch.setattr(planner, "continued", lambda before, model, work, machine: plan(model, work))


# Whatever is read before a stage is read the same way into its place; what streams from files, in both.
READS = [
    ("swap, the next read ahead", DIRECT), ("swap, kept", CACHED), ("stream, kept", DIRECT),
    ("stream from memory, some held", CACHED), ("stream from the file, some held", DIRECT),
    ("stream from the file, some held", CACHED),
]  # fmt: skip
assert {name for name, _ in READS} == PLACEMENTS.keys()


@pytest.mark.parametrize(("name", "reads"), READS)
def test_weights_wherever_they_lie(
    name: str, reads: str, overlay: Path, card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two videos one after the other: what is kept between them serves again. Activations are noted without a wait."""
    way = PLACEMENTS[name]
    planned(monkeypatch, way)
    in_brief(monkeypatch)
    reporter = Watched(card)
    with opened(overlay, reporter=reporter, reads=reads, save_activations=tmp_path / "a.st") as make:
        request = with_prompts(make, Request.of("a boat", **SMALL))
        pinned, streams = [], []
        for following in (request, None):
            generate(make, request, following=following)
            pinned.append(card.pinned)
            streams.append(len(card.streams))
        plan = make.residency.plan
        assert plan is not None and plan.placements == way
    assert card.races == []
    assert streams[1] == streams[0], "two streams beside the one that computes serve every load (REVIEW 3.8)"
    assert not [where for where in card.uploads if "copies.py" in where], "weights came from memory that is not pinned"
    if way[PARTS[0]].source != FILE:
        assert reporter.inside == []
    if way[PARTS[0]].ahead or way[PARTS[0]].home == HOST:
        assert pinned[1] == pinned[0], "pinning holds up the card: what was pinned for a video serves the next one"
    assert card.live == 0 and card.pins == []


CODED = ("distilled-0.25-fp8", "distilled-0.5-int8")


def test_blocks_in_codes_pass_through_the_slots(overlay: Path, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two sizes, a stage in fp8 and one in int8; that the card multiplies codes is pretended too."""
    names = dict(zip(PARTS, (f"bakes/{coded}" for coded in CODED), strict=True))
    way = {names.get(part, part): placed for part, placed in SOME_HELD.items()}
    planned(monkeypatch, way)
    in_brief(monkeypatch)
    monkeypatch.setattr(quantised, "fault", lambda *_: None)
    reporter, peaks = Watched(card), []
    transform = Session.transform

    def metered(make: Session, *given: Any) -> Any:
        card.peak = card.live
        found = transform(make, *given)
        peaks.append(card.peak)
        return found

    monkeypatch.setattr(Session, "transform", metered)
    sizes = {**SMALL, "height": 512, "width": 768}
    with opened(overlay, reporter=reporter, stage1=CODED[0], stage2=CODED[1]) as make:
        generate(make, with_prompts(make, Request.of("a boat", **sizes, keep_steps="last")))
        plan = make.residency.plan
        assert plan is not None
    assert card.races == [] and reporter.inside == []
    assert [peak <= 1.01 * phase.card for peak, phase in zip(peaks, plan.phases[2::2], strict=False)] == [True, True]
    assert all(any(what.startswith(f"aten.{product}") for what in card.asked) for product in ("_scaled_mm", "_int_mm"))
    assert card.live == 0 and card.pins == []


@pytest.mark.parametrize("text", [HOST, FILE])
def test_the_text_encoder_layer_by_layer(text: str, overlay: Path, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch, placements(Placement(), text=text))
    with opened(overlay) as make:
        encode_ahead(make, [Request.of("a boat", **SMALL)])
        assert make.prompts.ahead == 1
    assert card.races == [] and card.live == 0 and card.pins == []


def test_another_card_than_the_first(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is done on the first: not even a context of the driver, which takes half a gigabyte."""
    planned(monkeypatch, SOME_HELD)
    in_brief(monkeypatch)
    with there(Card(count=2), monkeypatch) as card:
        with opened(overlay, device="cuda:1") as make:
            latents, _, _ = generate(make, with_prompts(make, Request.of("a boat", **SMALL)))
        assert latents.stage2.video.device == torch.device("cuda:1")
        assert card.races == [] and card.contexts == {1}


def test_frames_become_planes_on_the_card(
    overlay: Path, card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a file, which a thread writes meanwhile."""
    in_brief(monkeypatch)
    with opened(overlay, residency="resident") as make:
        request = with_prompts(make, Request.of("a boat", **{**SMALL, "decode": "fast"}))
        write_video(make, request, tmp_path / "boat.mp4", save_tensors=tmp_path / "boat.safetensors")
    assert (tmp_path / "boat.mp4").stat().st_size > 0 and (tmp_path / "boat.safetensors").stat().st_size > 0
    assert card.races == []


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "copies begin before the memory is free": (copies.Copies, "now", lambda self: None),
    "the computation does not wait for copies": (copies.Copies, "before_computing", lambda self, event: None),
    "buffers are filled while they are copied from": (copies.Copies, "finish", lambda self, event: None),
    "slots are given back while they are copied to": (slots.Slots, "_finish", lambda self, slot: None),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_what_would_be_seen(
    fault: tuple[Any, str, Any], overlay: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the orders that the code asks for, left out."""
    monkeypatch.setattr(*fault)
    planned(monkeypatch, SOME_HELD)
    in_brief(monkeypatch)
    monkeypatch.setattr(Session, "upsample", lambda make, latents: pytest.fail("enough"))
    with opened(overlay) as make, pytest.raises(pytest.fail.Exception, match="enough"):
        generate(make, with_prompts(make, Request.of("a boat", **SMALL)))
    assert card.races


OF_THE_THREAD = {
    "now": lambda copies: copies._event(torch.cuda.current_stream(copies.device)),
    "before_computing": lambda copies, event: event and torch.cuda.current_stream(copies.device).wait_event(event),
    "computing": lambda copies: nullcontext(),
}


@pytest.mark.parametrize("faults", [(), ("computing",), tuple(OF_THE_THREAD)], ids=["right", "memory", "as before"])
def test_a_caller_that_computes_in_a_stream_of_its_own(
    faults: tuple[str, ...], overlay: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another thread loads is for the caller's stream, not for that thread's (REVIEW 3.7)."""
    for fault in faults:
        monkeypatch.setattr(copies.Copies, fault, OF_THE_THREAD[fault])
    planned(monkeypatch, placements(Placement(CARD), CARD))
    in_brief(monkeypatch)
    monkeypatch.setattr(Session, "upsample", lambda make, latents: pytest.fail("enough"))
    enough = pytest.raises(pytest.fail.Exception, match="enough")
    with torch.cuda.stream(torch.cuda.Stream()), opened(overlay) as make, enough:
        generate(make, with_prompts(make, Request.of("a boat", **SMALL)))
    assert bool(card.races) is bool(faults)


def test_what_lies_elsewhere_is_seen(card: Card) -> None:
    here, there = torch.ones(3, device="cuda"), torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        here + there
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn((3,), device="cuda", generator=torch.Generator())
    here.cpu()
    here.copy_(there)
    assert [what for what, _ in card.waits] == ["to the host", "from memory that is not pinned"]


READING = {
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool(t.isnan().any()),
    "nonzero": lambda t: t.nonzero(),
    "tolist": lambda t: t.flatten()[:2].tolist(),
    "unique": lambda t: t.unique(),
    "masked": lambda t: t[t > 0],
}


@pytest.mark.parametrize("how", READING)
def test_reading_a_value_back_is_seen(how: str, card: Card) -> None:
    """As a wait, or as a shape that follows values, which a fake cannot have."""
    with suppress(RuntimeError):
        READING[how](torch.ones(3, device="cuda"))
        assert card.waits


PRODUCTS = {"addmm": "aten.addmm", "fp32": "aten.mm", "official": "aten.mm"}
# The card's fixture reads nothing; a bake looks at the hash of what it read.
REAL = [(DirectReader, name, getattr(DirectReader, name)) for name in ("scatter", "gather")]
REAL.append((reader, "copy_bytes", reader.copy_bytes))


@pytest.mark.parametrize(("rule", "added"), [("fp32", False), ("fp32", True), ("official", True)])
def test_bakes_are_summed_on_the_card(
    rule: str, added: bool, card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By each of the three kernels; what comes back is written, and its numbers are not looked at."""
    monkeypatch.setattr(stream, "ThreadPoolExecutor", pretend_card.AtOnce)
    for owner, name, real in REAL:
        monkeypatch.setattr(owner, name, real)
    distilled = official_keys(low_rank(linears(shapes(1))))
    overlay = make_overlay(tmp_path / "out", random_weights(layers=1), shards=2, distilled=distilled)
    stack = ((str(save(tmp_path / "style.safetensors", official_keys(low_rank(linears(shapes(1)), seed=3)))), 0.5),)
    options = BakeOptions(overlay, (0.25, 0.5), added=stack if added else (), rule=rule, device="cuda")
    reports = bake(options, SilentReporter())
    expected = {(False, "fp32"): "addmm", (True, "fp32"): "fp32", (True, "official"): "official"}[added, rule]
    assert [(report.document["kernel"], report.document["device"]) for report in reports] == [(expected, "cuda")] * 2
    products = sum(count for name, count in card.asked.items() if name.startswith(PRODUCTS[expected]))
    assert card.races == [] and products >= len(linears(shapes(1)))
    wanted, *found = (layout(overlay / path) for path in ("transformer", *(report.path for report in reports)))
    assert wanted and found == [wanted] * 2


def layout(folder: Path) -> dict[str, str]:
    return {name: str(entry) for name, entry in read_headers(folder).items()}


def test_the_benchmark_runs_at_the_first_attempt(card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sections that need no overlay, in tiny widths; what they take at full size has to be seen on a card."""
    names = ("rates", "attention", "decode")
    sections = tuple(section for section in gpu.SECTIONS if section.name in names)
    monkeypatch.setattr(gpu, "REAL", TINY)
    monkeypatch.setattr(Clock, "median", lambda clock, work, seconds, warm_ups=1: clock.once(work)[0])
    settings = gpu.Settings(600.0, sections, tmp_path, False, "none", time.monotonic())
    _, document, well = gpu.run(settings, lambda line: None)
    assert well and document["failures"] == [] and len(sections) == len(names)
    assert card.races == []


def test_a_stage_that_fails_leaves_nothing_under_way(
    overlay: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are still being copied from host memory when that is given back."""
    planned(monkeypatch, PLACEMENTS["swap, kept"])
    in_brief(monkeypatch)
    with opened(overlay) as make, pytest.raises(pytest.fail.Exception, match="enough"):
        request = with_prompts(make, Request.of("a boat", **SMALL))
        make.prepare([work_of(make, request)])
        make.transform("distilled-0.5", lambda model: pytest.fail("enough"))
    assert card.races == [] and card.pins == []
