"""Every way to run gives the same video; parts come, stay and go as the plan says; nothing that changed is used."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import works
from _measure import make_cold, resident
from support import Notes, until
from torch import Tensor
from works import hq_work

from ltxpack.demo.checkpoint import TEXT_LAYERS
from ltxpack.errors import DeviceError, OverlayError
from ltxpack.files import direct, reader
from ltxpack.reporter import SilentReporter
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.model.weights import load_dit
from ltxpack.runtime.overlay import Overlay
from ltxpack.runtime.recipe_run import decode_audio, decode_video, generate, sample, work_of
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling.recipes import HQ
from ltxpack.runtime.sampling.shape import VideoShape
from ltxpack.runtime.session import Session
from ltxpack.runtime.settings import SessionSettings
from ltxpack.runtime.weights import keeper, machine, reading, slots
from ltxpack.runtime.weights import plan as planner
from ltxpack.runtime.weights.keeper import Residency
from ltxpack.runtime.weights.load import read_headers
from ltxpack.runtime.weights.plan import CARD, FILE, HOST, Placement, Plan

pytestmark = pytest.mark.usefixtures("short_prompts", "fsync_waits")
CPU = torch.device("cpu")
SHAPE = VideoShape(9, 64, 64, 24.0)
STAGES = ("distilled-0.25", "distilled-0.5")
WORK = hq_work(SHAPE, STAGES)
WEIGHTS = "diffusion_pytorch_model.safetensors"
FROM_FILE = Placement()


@dataclass(frozen=True)
class Way:
    """Every part's placement by a few choices; ``streamed`` and ``held``: how many of both transformers' blocks."""

    transformer: Placement = FROM_FILE
    small: str = FILE
    text: str = ""
    streamed: tuple[int, int] = (0, 0)
    held: tuple[int, int] = (0, 0)

    @property
    def placements(self) -> Mapping[str, Placement]:
        counts: Any = {"blocks": 2, "layers": TEXT_LAYERS, "streamed": self.streamed, "held": self.held}
        return works.placements(self.transformer, self.small, self.text, **counts)

    def __str__(self) -> str:
        return "-".join(word for word in (self.transformer.home, self.transformer.source, self.text) if word)


PARTS = tuple(f"bakes/{name}" for name in STAGES)
SWAP, STAGED = Way(), Way(Placement(ahead=True))
RESIDENT = Way(Placement(CARD), CARD)
# Every value of every field, and the combinations that auto would choose.
WAYS = (
    RESIDENT,
    Way(Placement(CARD), text=HOST),
    SWAP,
    Way(Placement(HOST), CARD),
    Way(Placement(ahead=True), text=HOST),
    Way(Placement(HOST, source=HOST), text=HOST, streamed=(2, 1)),
    Way(Placement(source=HOST), text=FILE, streamed=(1, 2)),
    Way(Placement(source=FILE), text=FILE, streamed=(2, 2)),
    Way(Placement(source=HOST), streamed=(1, 1), held=(2, 1)),
    Way(Placement(source=FILE), streamed=(2, 2), held=(1, 0)),
)
HELD = WAYS[8:]
ways = pytest.mark.parametrize("way", WAYS, ids=str)
# Without guidance: blocks come and go as often for one pass as for several (tests/test_end_to_end.py has these).
SMALL = {"height": 64, "width": 64, "num_frames": 9, "steps": 2, "video_cfg": 1.0, "audio_cfg": 1.0, "modality": 1.0}


def request() -> Request:
    return Request.of("a boat", **SMALL)


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[Way], None]:
    """Lets every plan be the given one."""

    def forced(way: Way) -> None:
        monkeypatch.setattr(
            keeper.report,
            "plan_or_refuse",
            lambda model, work, *_: planner.plan_for(model, work, "forced", way.placements),
        )

    return forced


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """Bytes read of each file."""
    found: Counter[Path] = Counter()
    original = reader.ReadQueue._begin

    def begin(queue: Any, read: Any, file: Any) -> Any:
        found[read.file] += read.nbytes
        return original(queue, read, file)

    monkeypatch.setattr(reader.ReadQueue, "_begin", begin)
    return found


def pipeline(overlay: Path, reporter: Any = None, **options: Any) -> Session:
    return Session(overlay, SessionSettings(device="cpu", dtype="float32", cache=False, **options), reporter)


def video(make: Session, wanted: Request, codecs: bool = True) -> dict[str, Tensor]:
    """The latents of both stages; with ``codecs`` also the sound and the frames."""
    make.residency.prepare([wanted.work(STAGES)])
    latents = sample(make, wanted)
    found = {
        "stage1.video": latents.stage1.video,
        "stage1.audio": latents.stage1.audio,
        "upsampled": latents.upsampled,
        "stage2.video": latents.stage2.video,
        "stage2.audio": latents.stage2.audio,
    }
    if codecs:
        frames: list[Tensor] = []
        decode_video(make, latents.stage2.video, frames.append)
        found |= {"waveform": decode_audio(make, latents.stage1.audio)[0], "frames": torch.cat(frames)}
    return found


@functools.cache
def reference(overlay: Path) -> dict[str, Tensor]:
    """Parts loaded one at a time, each whole."""
    make = pipeline(overlay)
    make.residency.prepare = lambda works: None
    found = video(make, request())
    make.close()
    return found


@functools.cache
def met(overlay: Path) -> bytes:
    """The activations file of the same video, whole parts again."""
    with TemporaryDirectory() as folder, pipeline(overlay, save_activations=Path(folder) / "a") as make:
        make.residency.prepare = lambda works: None
        video(make, request(), codecs=False)
        make.end_video()
        return (Path(folder) / "a").read_bytes()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], expected[name]) for name in found)


@ways
def test_every_way_to_run_gives_the_same_bits_twice(
    way: Way, demo: Path, tmp_path: Path, force: Callable[[Way], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And meets the same largest inputs, of each block by its number; noting them changes nothing."""
    streamed: list[int] = []
    original = slots.Slots.open
    monkeypatch.setattr(slots.Slots, "open", lambda self: (streamed.append(len(self.blocks)), original(self))[1])
    force(way)
    largest = met(demo / "overlay")
    with pipeline(demo / "overlay", save_activations=tmp_path / "a.safetensors") as make:
        # The codecs know of a plan only whether they stay.
        for codecs in (way in (WAYS[0], WAYS[2]), False):
            make.begin_video()
            assert same(video(make, request(), codecs), reference(demo / "overlay"))
            make.end_video()
            assert (tmp_path / "a.safetensors").read_bytes() == largest
        assert make.residency.plan is not None and make.residency.plan.placements == way.placements
    layers = TEXT_LAYERS if way.text else 0
    assert [count for count in streamed if count] == 2 * [count for count in (layers, *way.streamed) if count]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ltxpack")]


@pytest.mark.parametrize("way", [WAYS[0], WAYS[3], *HELD], ids=str)
def test_past_the_page_cache_the_same_bits(
    way: Way, demo: Path, force: Callable[[Way], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the device, to host memory, and of files that were hashed before only the blocks that are wanted."""
    expected = reference(demo / "overlay")
    asked: list[str] = []
    original = reader.DirectReader.__init__
    monkeypatch.setattr(
        reader.DirectReader, "__init__", lambda file, path, reads: (asked.append(reads), original(file, path, reads))[1]
    )
    force(way)
    notes = Notes()
    with pipeline(demo / "overlay", notes, reads="direct") as make:
        make.residency.prepare([WORK])
        asked.clear()
        for _ in range(2):
            assert same(video(make, request(), codecs=False), expected)
    # The statistics of the video VAE, two small tensors, come through the cache.
    assert asked.count("direct") > 4 and asked.count("cached") <= 2 and "auto" not in asked
    assert notes.notes[2] == "reads direct: as asked for"


def test_a_filesystem_that_has_only_the_cache_is_told_once(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "why_cached", lambda path: "here all is faster that way")
    notes = Notes()
    with pipeline(demo / "overlay", notes, reads="direct") as make:
        assert same(video(make, request(), codecs=False), reference(demo / "overlay"))
    assert [note for note in notes.notes if "through the page cache" in note] == [
        "text_encoder: files are read through the page cache: here all is faster that way"
    ]


def weights_of(overlay: Path) -> tuple[list[Path], set[Path]]:
    """The overlay's files of weights, and those of them that a run uses."""
    files = sorted(path for path in overlay.rglob("*.safetensors") if "loras" not in path.parts)
    used = set(files) - {overlay / "transformer" / WEIGHTS}
    assert {overlay / part / WEIGHTS for part in PARTS} < used and len(used) == 8
    return files, used


@pytest.fixture
def own(demo: Path, tmp_path: Path) -> Path:
    """The demo's overlay in files of its own: nobody else reads them into the page cache."""
    return Path(shutil.copytree(demo / "overlay", tmp_path / "own", symlinks=True))


def test_a_run_leaves_the_page_cache_to_others(demo: Path, own: Path, force: Callable[[Way], None]) -> None:
    force(SWAP)
    files, _ = weights_of(own)
    make_cold(files)
    if any(map(resident, files)):
        pytest.skip("this filesystem keeps its files in memory")
    notes = Notes()
    with pipeline(own, notes, reads="direct") as make:
        assert same(video(make, request(), codecs=False), reference(demo / "overlay"))
        # Of the video VAE the statistics come through the cache in any case.
        assert {path for path in files if resident(path) == 1} <= {own / "vae" / WEIGHTS}
    assert not any("come into the page cache" in note for note in notes.notes)


@pytest.mark.parametrize("refused", [False, True], ids=["past the cache", "through the cache"])
def test_all_files_come_into_the_page_cache_for_the_next_run_if_that_is_asked_for(
    refused: bool, demo: Path, own: Path, force: Callable[[Way], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and nothing puts them out again. What the system then keeps is its own affair, on a full machine."""
    force(SWAP)
    if refused:
        monkeypatch.setattr(direct, "why_cached", lambda path: "here all is faster that way")
    files, used = weights_of(own)
    make_cold(files)
    called, asked, dropped = os.posix_fadvise, Counter[Path](), set[Path]()

    def advise(fd: int, start: int, nbytes: int, advice: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if advice == os.POSIX_FADV_WILLNEED:
            asked[path] += nbytes
        elif advice == os.POSIX_FADV_DONTNEED:
            dropped.add(path)
        called(fd, start, nbytes, advice)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    notes = Notes()
    wanted = {path.resolve(): path.stat().st_size for path in used}
    with pipeline(own, notes, reads="direct", warm_cache=True) as make:
        assert same(video(make, request(), codecs=False), reference(demo / "overlay"))
        until(lambda: asked == wanted)
    assert not dropped
    assert any("come into the page cache" in note for note in notes.notes)


def test_what_stays_is_not_read_again(demo: Path, force: Callable[[Way], None], read_bytes: Counter[Path]) -> None:
    root = demo / "overlay"
    transformers = {root / "bakes" / name / "diffusion_pytorch_model.safetensors" for name in STAGES}
    for way, stays in ((WAYS[0], True), (WAYS[3], True), (WAYS[5], True), (WAYS[2], False)):
        force(way)
        with pipeline(root) as make:
            video(make, request(), codecs=False)
            assert transformers <= set(read_bytes)
            once = all(nbytes <= path.stat().st_size for path, nbytes in read_bytes.items())
            assert once or way is not RESIDENT, "hashing and loading are one reading"
            read_bytes.clear()
            sample(make, request())
        again = transformers & set(read_bytes)
        assert again == (set() if stays else transformers), way
        assert (root / "latent_upsampler" / WEIGHTS in read_bytes) is (way.small == FILE)
        assert root / "vae" / WEIGHTS not in read_bytes
        assert root / "text_encoder" / "model.safetensors" in read_bytes
        read_bytes.clear()


def test_another_bake_is_read_once_where_it_can_stay(
    demo: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: Counter[Path]
) -> None:
    """Different transformers in turn; where memory is short, the others make room."""
    root = demo / "overlay"
    weights = {"base": root / "transformer", **{name: root / "bakes" / name for name in STAGES}}
    files = {folder / "diffusion_pytorch_model.safetensors": name for name, folder in weights.items()}

    def turns() -> list[set[str]]:
        found = []
        with pipeline(root, notes := Notes()) as make:
            for stages in (STAGES, ("base", STAGES[1]), STAGES, ("base", STAGES[1])):
                read_bytes.clear()
                with make.taking(stages):
                    make.prepare([work_of(make, request())])
                    for name in make.transformers(HQ).stages:
                        make.transform(name, lambda _: None)
                assert make.settings.transformers == ("auto", "auto")
                found.append({files[path] for path in files.keys() & set(read_bytes)})
        told = [note for note in notes.notes if note.endswith("stays loaded too, beside what is")]
        assert told == ["transformer: stays loaded too, beside what is"] * (found[2] == set())
        return found

    assert turns() == [{*STAGES}, {"base"}, set(), set()]
    continued = planner.continued

    def for_known(before: Plan, *given: Any) -> Plan | None:
        found = continued(before, *given)
        return found if found is not None and found.placements == before.placements else None

    monkeypatch.setattr(planner, "continued", for_known)
    assert turns() == [{*STAGES}, {"base", STAGES[1]}] * 2


@pytest.mark.parametrize("text", ["", HOST, FILE])
def test_the_text_encoder_is_read_once(
    text: str, demo: Path, force: Callable[[Way], None], read_bytes: Counter[Path]
) -> None:
    """Also where its layers stream from the file: they are hashed meanwhile (REVIEW 3.15)."""
    force(Way(text=text))
    path = demo / "overlay" / "text_encoder" / "model.safetensors"
    with pipeline(demo / "overlay") as make:
        make.residency.prepare([WORK])
        make.prompts.contexts(("a boat", "rain"), SilentReporter())
    # Two layers come into the two slots again after the last.
    again = 2 * sum(entry.nbytes for name, entry in read_headers(path.parent).items() if ".layers.0." in name)
    assert read_bytes[path] <= path.stat().st_size + (again if text == FILE else 0)


@pytest.mark.parametrize("way", HELD, ids=str)
def test_only_what_is_not_held_is_read_again(
    way: Way, demo: Path, force: Callable[[Way], None], read_bytes: Counter[Path]
) -> None:
    force(way)
    files = {part: demo / "overlay" / part / WEIGHTS for part in PARTS}
    with pipeline(demo / "overlay") as make:
        first = video(make, request(), codecs=False)
        assert all(read_bytes[path] >= path.stat().st_size for path in files.values())
        read_bytes.clear()
        assert same(video(make, request(), codecs=False), first)
        kept = make.residency._held
        held = {part: sorted(kept[part][1]) if part in kept else [] for part in PARTS}
    assert [len(numbers) for numbers in held.values()] == list(way.held)
    for part, path in files.items():
        sizes = block_sizes(path.parent)
        if held[part]:
            # Two streamed blocks stay in the two slots: those of a file are read once too.
            assert read_bytes[path] == sum(sizes.values()) - sum(sizes[number] for number in held[part])
        else:
            assert read_bytes[path] >= path.stat().st_size


def block_sizes(folder: Path) -> dict[int, int]:
    """Bytes of each block of a transformer, and of everything else as number -1."""
    found: Counter[int] = Counter()
    for name, entry in read_headers(folder).items():
        words = name.split(".")
        found[int(words[1]) if words[0] == "transformer_blocks" else -1] += entry.nbytes
    return found


def test_held_blocks_of_files_that_changed_are_not_used(
    overlay: Path, force: Callable[[Way], None], read_bytes: Counter[Path]
) -> None:
    path = overlay / "bakes" / STAGES[0] / WEIGHTS
    content = path.read_bytes()
    force(HELD[0])
    with pipeline(overlay) as make:
        first = video(make, request(), codecs=False)
        path.unlink()
        path.write_bytes(content)
        read_bytes.clear()
        assert same(video(make, request(), codecs=False), first)
        assert read_bytes[path] >= len(content), "written anew: read whole and hashed"
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(OverlayError, match="changed since the overlay was written"):
            sample(make, request())


def test_what_is_held_is_given_back(demo: Path, force: Callable[[Way], None]) -> None:
    force(HELD[0])
    make = pipeline(demo / "overlay")
    video(make, request(), codecs=False)
    memories = [weakref.ref(source.memory) for _, held in make.residency._held.values() for source in held.values()]
    gc.collect()
    assert len(memories) == sum(HELD[0].held) and all(memory() is not None for memory in memories)
    make.close()
    gc.collect()
    assert all(memory() is None for memory in memories)


def test_of_the_video_vae_only_its_statistics_are_read_between_the_stages(
    demo: Path, read_bytes: Counter[Path], force: Callable[[Way], None]
) -> None:
    path = demo / "overlay" / "vae" / WEIGHTS
    force(SWAP)
    with pipeline(demo / "overlay") as make:
        latents, _, _ = generate(make, request())
        stored = read_headers(path.parent)
        generate(make, request())
        assert read_bytes[path] == stored["latents_mean"].nbytes + stored["latents_std"].nbytes
        decode_video(make, latents.stage2.video, lambda frames: None)
        assert read_bytes[path] > path.stat().st_size


class TestUse:
    @pytest.fixture
    def residency(self, demo: Path) -> Iterator[Residency]:
        found = Residency(Overlay.open(demo / "overlay"), CPU, torch.float32, "auto")
        yield found
        found.close()

    def planned(self, residency: Residency, way: Way) -> Residency:
        residency.plan = planner.plan_for(residency._sizes_of(WORK), WORK, "forced", way.placements)
        return residency

    @pytest.mark.parametrize("way", [SWAP, STAGED, WAYS[6]])
    def test_what_is_dropped_is_gone_when_the_work_is_done(self, residency: Residency, way: Way) -> None:
        seen: list[weakref.ref[DiT]] = []
        self.planned(residency, way).use(PARTS[0], load_dit, lambda m: seen.append(weakref.ref(m)))
        assert seen[0]() is None
        with pytest.raises(RuntimeError, match="on purpose"):
            residency.use(PARTS[0], load_dit, failing(seen))
        gc.collect()
        assert seen[1]() is None

    def test_weights_are_gone_though_somebody_holds_the_module(self, residency: Residency) -> None:
        held: list[DiT] = []
        weights: list[weakref.ref[Tensor]] = []

        def work(model: DiT) -> None:
            held.append(model)
            weights.extend(map(weakref.ref, model.parameters()))

        self.planned(residency, SWAP).use(PARTS[0], load_dit, work)
        assert held and weights and all(weight() is None for weight in weights)

    @pytest.mark.parametrize("ahead", [False, True])
    def test_weights_are_inference_tensors_on_whichever_thread_they_came(
        self, residency: Residency, ahead: bool
    ) -> None:
        self.planned(residency, RESIDENT)
        if ahead:
            residency.load_ahead(PARTS[0], load_dit)
        kinds = residency.use(PARTS[0], load_dit, lambda m: {weight.is_inference() for weight in m.parameters()})
        assert kinds == {True}

    @pytest.mark.parametrize(("way", "times", "streamed"), [(RESIDENT, 1, False), (WAYS[6], 2, True)])
    def test_what_stays_is_prepared_once(self, residency: Residency, way: Way, times: int, streamed: bool) -> None:
        prepared: list[bool] = []
        for _ in range(2):
            self.planned(residency, way).use(PARTS[0], load_dit, id, lambda m, streamed: prepared.append(streamed))
        assert prepared == [streamed] * times

    @pytest.mark.parametrize(
        ("way", "ahead"),
        [
            (RESIDENT, True),
            (Way(Placement(HOST)), True),
            (STAGED, True),
            (SWAP, False),
            (WAYS[5], True),
            (WAYS[6], False),
            (WAYS[7], False),
        ],
    )
    def test_the_next_stage_is_loaded_while_one_works(self, residency: Residency, way: Way, ahead: bool) -> None:
        threads: list[str] = []

        def load(*where: Any) -> DiT:
            threads.append(threading.current_thread().name)
            return load_dit(*where)

        self.planned(residency, way)
        residency.use(PARTS[0], load, lambda _: residency.load_ahead(PARTS[1], load))
        found = residency.use(PARTS[1], load, lambda dit: dit.proj_in.weight.clone())
        expected = load_dit(residency.overlay.folder(PARTS[1]), CPU, torch.float32)
        assert torch.equal(found, expected.proj_in.weight)
        assert threads == ["MainThread", "ltxpack-ahead" if ahead else "MainThread"]

    def test_only_one_is_staged_at_a_time(self, residency: Residency) -> None:
        self.planned(residency, STAGED)
        for stage in (0, 1, 0):
            residency.load_ahead(PARTS[stage], load_dit)
        assert list(residency._ahead) == [PARTS[0]]

    def test_what_is_in_use_is_not_loaded_a_second_time(self, residency: Residency) -> None:
        self.planned(residency, RESIDENT)
        residency.use(PARTS[0], load_dit, lambda _: residency.load_ahead(PARTS[0], load_dit))
        assert not residency._ahead

    def test_a_load_ahead_that_fails_is_told_where_it_is_needed(self, residency: Residency) -> None:
        self.planned(residency, RESIDENT)
        half: list[weakref.ref[Tensor]] = []

        def load(*_: Any) -> DiT:
            weights = torch.ones(1)
            half.append(weakref.ref(weights))
            raise OverlayError("no such luck")

        residency.load_ahead(PARTS[0], load)
        used: list[DiT] = []
        gc.disable()
        try:
            residency.use(PARTS[0], load_dit, used.append)
        except OverlayError as told:
            assert told.problem == "no such luck"
        finally:
            gc.enable()
        assert half[0]() is None, "what it has loaded is freed without the collector"
        assert not used
        residency.use(PARTS[0], load_dit, used.append)
        assert used

    def test_closing_ends_what_is_under_way(self, residency: Residency, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reading.FileReader.__init__, "__kwdefaults__", {"read_bytes": 64, "in_flight": 1})
        self.planned(residency, RESIDENT)
        residency.load_ahead(PARTS[0], load_dit)
        residency.close()
        assert not residency._ahead
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("ltxpack")]

    def test_memory_that_cannot_be_pinned_is_told(self, residency: Residency, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ltxpack.runtime.weights.copies.Copies.pin", lambda *_: False)
        residency.reporter = notes = Notes()
        self.planned(residency, WAYS[6]).use(PARTS[0], load_dit, id)
        assert any("would not pin" in warning for warning in notes.warnings)


def failing(seen: list[Any]) -> Callable[[DiT], None]:
    def work(model: DiT) -> None:
        seen.append(weakref.ref(model))
        raise RuntimeError("on purpose")

    return work


@pytest.mark.parametrize(
    ("victim", "way"),
    [
        *(("bakes/distilled-0.5", way) for way in WAYS),
        *(("text_encoder", way) for way in (WAYS[0], WAYS[4], WAYS[7])),
        ("vae", WAYS[0]),
    ],
)
def test_a_changed_shard_is_refused_and_never_used(
    victim: str, way: Way, overlay: Path, force: Callable[[Way], None]
) -> None:
    path = next((overlay / victim).glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.unlink()
    path.write_bytes(content)
    opened = Overlay.open(overlay)
    residency = Residency(opened, CPU, torch.float32, "auto")
    residency.plan = planner.plan_for(residency._sizes_of(WORK), WORK, "forced", way.placements)
    from ltxpack.runtime.codecs import video as codecs
    from ltxpack.runtime.text import gemma as text

    loads: dict[str, Any] = {"text_encoder": text.load_text_encoder, "vae": codecs.load_video_vae}
    used: list[Any] = []
    # What streams for the first time is hashed meanwhile: then what comes of the work is refused.
    work = (lambda _: "not to be used") if (victim, way.text) == ("text_encoder", FILE) else used.append
    for ahead in (False, True):
        load = loads.get(victim, load_dit)
        if ahead:
            residency.load_ahead(victim, load)
        with pytest.raises(OverlayError, match="changed since the overlay was written") as caught:
            residency.use(victim, load, work)
        assert caught.value.file == str(path)
        assert caught.value.next == f"ltxpack verify {overlay}"
    assert not used
    residency.close()


class TestPlans:
    def test_the_plan_is_told_once_and_kept_for_smaller_videos(self, demo: Path) -> None:
        notes = Notes()
        with pipeline(demo / "overlay", notes, residency="stream") as make:
            for frames in (17, 9, 9):
                make.residency.prepare([hq_work(VideoShape(frames, 64, 64, 24.0), STAGES, 2)])
        assert [note.split(":")[0] for note in notes.notes] == ["residency stream", "peak memory planned", "reads auto"]

    def test_the_largest_of_many_videos_counts(self, demo: Path) -> None:
        with pipeline(demo / "overlay") as make:
            works = [hq_work(VideoShape(frames, 64, 64, 24.0), STAGES) for frames in (9, 121, 17)]
            plan, alone = make.residency.prepare(works), make.residency.plan_for(works[1])
        assert plan.card == alone.card

    def test_too_little_memory_is_refused_before_loading(
        self, demo: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: Counter[Path]
    ) -> None:
        monkeypatch.setattr(machine, "free_host", lambda: 1_000_000_000)
        monkeypatch.setattr(machine, "own_memory", lambda: 0)
        with pipeline(demo / "overlay") as make, pytest.raises(DeviceError) as caught:
            generate(make, request())
        assert "cpu has too little free memory" in caught.value.problem
        assert "GB" in str(caught.value.expected) and str(caught.value.found) == "0.5 GB free"
        assert not read_bytes

    def test_a_system_that_does_not_say_is_not_asked(self, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "free_host", lambda: 0)
        with pipeline(demo / "overlay") as make:
            assert make.residency.prepare([WORK]).mode == "resident"

    @pytest.mark.parametrize(("mode", "word"), [("resident", "swap"), ("swap", "stream"), ("stream", "--num-frames")])
    def test_out_of_memory_names_what_to_do_instead(
        self, mode: str, word: str, demo: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pipeline(demo / "overlay", residency=mode) as make:
            with monkeypatch.context() as patch:
                patch.setattr(DiT, "passes", out_of_memory)
                with pytest.raises(DeviceError, match="ran out of memory") as caught:
                    generate(make, request())
            assert word in caught.value.next
            assert same(video(make, request(), codecs=False), reference(demo / "overlay"))


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")
