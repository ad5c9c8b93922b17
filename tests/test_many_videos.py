"""``ltxpack run --prompts``: every line checked before anything runs, one load, failures told, nothing made twice."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import HANG, Done, Notes, ltxpack, refused
from warm_processes import WarmProcess

from ltxpack.errors import LtxpackError
from ltxpack.manifest import load_schema
from ltxpack.runtime import batch, recipe_run, record
from ltxpack.runtime import run as runs
from ltxpack.runtime.codecs import video
from ltxpack.runtime.media import mp4
from ltxpack.runtime.prompts_file import read_lines
from ltxpack.runtime.request import DEFAULT_NEGATIVE_PROMPT, Request
from ltxpack.runtime.session import Session
from ltxpack.runtime.text import gemma as text
from ltxpack.runtime.video import Latents
from ltxpack.runtime.weights.keeper import Residency

pytestmark = pytest.mark.usefixtures("short_prompts")
SMALL = ("--device", "cpu", "--dtype", "float32", "--height", "64", "--width", "64", "--num-frames", "9")
FLAGS = (*SMALL, "--steps", "2")


def written(folder: Path, *lines: dict[str, Any] | str, name: str = "prompts.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def many(demo: Path, prompts: Path, *flags: str | Path) -> Done:
    return ltxpack("run", demo / "overlay", "--prompts", prompts, *FLAGS, *flags)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def statuses(done: Done) -> dict[int, str]:
    """Line number -> status, from the table."""
    rows = re.findall(r"^ +(\d+)  (done|skipped|failed) ", done.stdout, re.MULTILINE)
    return {int(number): status for number, status in rows}


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Name of a video -> the frames given to its encoder."""
    seen: dict[str, torch.Tensor] = {}

    class Recording(mp4.VideoWriter):
        def write(self, frames: torch.Tensor) -> None:
            before = seen.get(self.path.name, frames[:0])
            seen[self.path.name] = torch.cat([before, frames])
            super().write(frames)

    monkeypatch.setattr(runs, "VideoWriter", Recording)
    return seen


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with every load of the text encoder."""
    seen: list[str] = []
    load = text.load_text_encoder
    monkeypatch.setattr(text, "load_text_encoder", lambda *where: (seen.append("text"), load(*where))[1])
    return seen


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sampled and the sound is silence; prompts, pictures, decoding and files are as ever.

    For tests of what is made when; what is made is held by the others.
    """

    def sample(session: Session, request: Request, *_: object) -> Latents:
        session.prompts.contexts(request.prompts, session.reporter)
        latents = request.shape.latent_shapes.map(lambda shape: torch.full(shape, request.settings.seed / 10))
        return Latents((latents, latents), latents.video)

    monkeypatch.setattr(recipe_run, "sample", sample)
    monkeypatch.setattr(recipe_run, "decode_audio", lambda session, latents: (torch.zeros(2, 4800), 48000))


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")


def test_prompts_longer_than_the_model_reads_are_told_with_the_words(demo: Path, tmp_path: Path, quick: None) -> None:
    """By line, before any is made; of one video too, and also where the prompt is in the cache."""
    long = "boat " * 300
    lines = [{"prompt": f"{long}the end"}, {"prompt": "b", "negative_prompt": long}, {"prompt": "c"}]
    prompts = written(tmp_path, *lines)
    done = many(demo, prompts, "--negative-prompt", long)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if f"of which the model reads {text.TEXT_TOKENS}" in line]
    assert [line.partition(" tokens")[0].rpartition(": ")[0] for line in told] == [
        "warning: line 1: prompt", "warning: line 1: negative prompt and 2 more like it",
    ]  # fmt: skip
    assert told[0].endswith("boat the end") and "does not read the last" in told[0]
    assert done.stderr.index(told[1]) < done.stderr.index("line 1: " + str(tmp_path))
    for _ in range(2):
        alone = ltxpack("run", demo / "overlay", *FLAGS, "--prompt", f"{long}the end", "-o", tmp_path / "a.mp4")
        assert told[0].replace("line 1: ", "") in alone.stderr


# Made as one by one, and not again


PICTURE = {"path": "a.png", "frame": "last", "strength": 0.5}
ALONE: list[tuple[tuple[str, ...], dict[str, dict[str, Any]]]] = [
    (
        ("--steps=2", "--no-cache"),
        {
            "one.mp4": {"prompt": "a boat", "seed": 1},
            "two.mkv": {"prompt": "a dog", "negative_prompt": "cats", "num_frames": 17},
            "three.mp4": {"prompt": "a boat", "images": [PICTURE], "fps": 12.5},
        },
    ),
    ((), {"a.mp4": {"prompt": "a", "recipe": "distilled"}, "b.mp4": {"prompt": "a", "recipe": "hq", "steps": 2}}),
    (
        ("--video-stg-blocks=1", "--audio-stg-blocks=0,1", "--video-skip-step=1"),
        {
            "a.mp4": {"prompt": "a", "recipe": "two-stage", "steps": 3},
            "b.mp4": {"prompt": "a", "recipe": "one-stage", "steps": 2},
        },
    ),
]


@pytest.mark.parametrize(("flags", "lines"), ALONE, ids=["settings", "distilled and hq", "two stages and one"])
def test_many_are_what_each_is_alone(
    flags: tuple[str, ...],
    lines: dict[str, dict[str, Any]],
    demo: Path,
    tmp_path: Path,
    frames: dict[str, torch.Tensor],
    loads: list[str],
) -> None:
    Image.new("RGB", (80, 64), (200, 30, 30)).save(tmp_path / "a.png")
    prompts = written(tmp_path, *({**said, "output": name} for name, said in lines.items()))
    done = ltxpack("run", demo / "overlay", "--prompts", prompts, *SMALL, *flags)
    assert done.returncode == 0, done.stderr
    assert loads == ["text"]
    assert statuses(done) == dict.fromkeys(range(1, len(lines) + 1), "done")
    assert f"{len(lines)} done, 0 skipped, 0 failed" in done.stdout
    together = dict(frames)
    assert list(together) == list(lines)
    assert len({video.sum().item() for video in together.values()}) == len(lines)
    for name, said in lines.items():
        assert len(together[name]) == said.get("num_frames", 9)
        recorded = json.loads((tmp_path / f"{name}.json").read_text())["request"]
        # Records of before there were recipes are of hq and do not say so.
        assert recorded.get("recipe", "hq") == said.get("recipe", "hq")
        transformers = {"distilled": "distilled-0.5", "two-stage": "base", "one-stage": "base"}
        assert recorded["stage1"] == transformers.get(said.get("recipe", ""), "distilled-0.25")
        given = {**said, "image": f"{tmp_path}/a.png@last:0.5"} if "images" in said else said
        words = [f"--{key.replace('_', '-')}={value}" for key, value in given.items() if key != "images"]
        alone = ltxpack("run", demo / "overlay", *SMALL, *flags, *words, "-o", tmp_path / name)
        assert alone.returncode == 0, alone.stderr
        assert torch.equal(together[name], frames[name][len(together[name]) :]), name


@pytest.mark.usefixtures("quick")
def test_what_is_done_is_skipped_and_what_changed_is_made_again(demo: Path, tmp_path: Path, loads: list[str]) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (64, 64), (200, 30, 30)).save(picture)
    lines = [
        {"prompt": "a boat", "output": "one.mp4"},
        {"prompt": "a boat", "seed": 2, "output": "two.mp4"},
        {"prompt": "a boat", "images": [{"path": "a.png"}], "output": "three.mp4"},
    ]
    prompts = written(tmp_path, *lines)
    assert many(demo, prompts).returncode == 0
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    again = many(demo, prompts, "--no-cache")
    assert again.returncode == 0
    assert statuses(again) == {1: "skipped", 2: "skipped", 3: "skipped"}
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(loads) == 1, "nothing is loaded for nothing"

    (tmp_path / "one.mp4").write_bytes(b"another video")
    (tmp_path / "two.mp4").unlink()
    Image.new("RGB", (64, 64), (30, 30, 200)).save(picture)
    assert statuses(many(demo, prompts)) == {1: "done", 2: "done", 3: "done"}

    prompts = written(tmp_path, lines[1], lines[0], lines[2] | {"seed": 3}, name="others.jsonl")
    assert statuses(many(demo, prompts)) == {1: "skipped", 2: "skipped", 3: "done"}
    assert statuses(many(demo, prompts, "--modality", "2")) == {1: "done", 2: "done", 3: "done"}
    assert len(loads) == 1, "only the prompt decides about its contexts"


@pytest.mark.usefixtures("quick")
def test_a_line_that_moved_replaces_no_video_of_another_line(demo: Path, tmp_path: Path) -> None:
    def lines(*prompts: str, name: str = "a.txt") -> Done:
        (tmp_path / name).write_text("\n".join(prompts))
        return many(demo, tmp_path / name)

    assert lines("a boat", "a cloud", "a fox").returncode == 0
    before = (tmp_path / "a-0001.mp4").read_bytes()
    told = refused(lines("a dog", "a boat", "a cloud", "a fox"), 2)
    assert "a-0001.mp4: line 1 would replace the video of line 2" in told
    assert (tmp_path / "a-0001.mp4").read_bytes() == before
    refused(lines("a cloud", "a fox"), 2)

    again = lines("a boat", "a boat")
    assert statuses(again) == {1: "skipped", 2: "done"}
    assert "1 video replaces one of another prompt, setting or overlay: " in again.stderr
    assert statuses(lines("a boat", "a bird")) == {1: "skipped", 2: "done"}, "line 1 has its own video"
    assert "2 videos replace ones" in lines("a fox", "a hen", name="a").stderr


@pytest.mark.usefixtures("quick")
def test_a_video_that_another_run_replaced_is_not_taken_for_ours(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Replaced(mp4.VideoWriter):
        def __exit__(self, *what: Any) -> None:
            super().__exit__(*what)
            self.path.write_bytes(b"the video of another run")

    prompts = written(tmp_path, {"prompt": "a boat", "output": "boat.mp4"})
    with monkeypatch.context() as patch:
        patch.setattr(runs, "VideoWriter", Replaced)
        assert statuses(many(demo, prompts)) == {1: "done"}
    assert statuses(many(demo, prompts)) == {1: "done"}
    assert statuses(many(demo, prompts)) == {1: "skipped"}


@pytest.mark.usefixtures("quick")
def test_another_overlay_makes_another_video(demo: Path, overlay: Path, tmp_path: Path) -> None:
    prompts = written(tmp_path, {"prompt": "a boat", "output": "one.mp4"})
    assert statuses(many(demo, prompts)) == {1: "done"}
    assert statuses(many(demo, prompts, "--stage1", "base")) == {1: "done"}
    assert statuses(many(tmp_path, prompts, "--stage1", "base")) == {1: "skipped"}, "the place is not the content"
    assert ltxpack("bake-lora", overlay, "--strength", "0.7").returncode == 0
    assert statuses(many(tmp_path, prompts, "--stage1", "base")) == {1: "skipped"}
    stages = ("--stage1", "base", "--stage2", "distilled-0.7")
    assert statuses(many(tmp_path, prompts, *stages)) == {1: "done"}


@pytest.mark.usefixtures("quick")
def test_all_are_decoded_in_larger_tiles_if_the_command_says_so(demo: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": "a boat", "output": "one.mp4"},
        {"prompt": "a boat", "output": "two.mp4", "width": 832},
        {"prompt": "a boat", "output": "three.mp4", "width": 832, "seed": 2},
    ]
    prompts = written(tmp_path, *lines)
    usual = many(demo, prompts)
    assert [line for line in usual.stdout.splitlines() if line.startswith("decode ")] == [
        "decode official: one tile of 9 frames of 64x64 pixels",
        "decode official: 2 tiles of at most 9 frames of 64x768 pixels",
    ]
    larger = (
        "decode fast: one tile of 9 frames of 64x832 pixels (official: 2 tiles of at most 9 frames of 64x768 pixels)"
    )
    fast = many(demo, prompts, "--decode", "fast")
    assert statuses(fast) == {1: "done", 2: "done", 3: "done"}, "others than those made in official tiles"
    assert larger in fast.stdout and fast.stdout.count("decode fast") == 2
    assert larger in fast.stderr
    assert statuses(many(demo, prompts, "--decode", "fast")) == {1: "skipped", 2: "skipped", 3: "skipped"}


@pytest.mark.usefixtures("quick")
def test_the_plan_counts_the_prompts_of_all_lines(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[tuple[int, bool]] = []
    prepare = Residency.prepare

    def prepared(self: Residency, works: Any) -> Any:
        planned.extend((work.prompts, work.once) for work in works)
        return prepare(self, works)

    monkeypatch.setattr(Residency, "prepare", prepared)
    lines = [{"prompt": prompt, "output": f"{prompt}.mp4"} for prompt in ("a boat", "a dog", "a cat")]
    assert many(demo, written(tmp_path, *lines)).returncode == 0
    assert planned == [(3, False)] * 6
    planned.clear()
    alone = ltxpack("run", demo / "overlay", *FLAGS, "--prompt", "a boat", "-v", "-o", tmp_path / "v.mp4")
    assert alone.returncode == 0 and planned == [(1, True)]
    assert "decode official: one tile of 9 frames of 64x64 pixels\n" in alone.stdout


@pytest.mark.usefixtures("quick")
def test_a_record_says_what_the_video_was_made_from(demo: Path, tmp_path: Path) -> None:
    assert many(demo, written(tmp_path, {"prompt": "a boat", "output": "one.mp4"})).returncode == 0
    assert names(tmp_path) == ["one.mp4", "one.mp4.json", "prompts.jsonl"]
    content = (tmp_path / "one.mp4.json").read_text()
    found = json.loads(content)
    assert found["request"]["prompt"] == "a boat"
    assert found["request"]["negative_prompt"] == DEFAULT_NEGATIVE_PROMPT
    assert (found["request"]["stage1"], found["request"]["stage2"]) == ("distilled-0.25", "distilled-0.5")
    assert found["attention"] == "sdpa"
    assert str(tmp_path) not in content
    assert str(demo) not in content


@pytest.mark.usefixtures("quick")
def test_a_damaged_record_is_made_again_with_its_video(demo: Path, tmp_path: Path) -> None:
    """It stopped all lines, as a file that ltxpack had not written."""
    prompts, path = written(tmp_path, {"prompt": "a boat", "output": "one.mp4"}), tmp_path / "one.mp4.json"
    assert many(demo, prompts).returncode == 0
    whole = path.read_bytes()
    for damaged in (b"", whole[:9], whole[:200], whole.replace(b'"format": 1', b'"format": 2')):
        path.write_bytes(damaged)
        assert statuses(many(demo, prompts)) == {1: "done"}
        assert json.loads(path.read_text())["fingerprint"] == json.loads(whole)["fingerprint"]


# Lines that cannot be used


BAD_LINES: list[tuple[str, str]] = [
    ("{", "JSON"),
    ("[]", "not of type 'object'"),
    ('"a boat"', "not of type 'object'"),
    ("{}", "prompt"),
    ('{"prompt": 3}', "3 is not of type 'string'"),
    ('{"prompt": "a", "prompt": "b"}', "twice"),
    ('{"prompt": "a", "heigth": 64}', "heigth"),
    ('{"prompt": "a", "height": 100}', "height: 100"),
    ('{"prompt": "a", "width": "64"}', "width"),
    ('{"prompt": "a", "seed": 1.5, "steps": 1}', "seed: 1.5 is not of type 'integer'; steps: 1"),
    ('{"prompt": "a", "seed": true}', "seed"),
    ('{"prompt": "a", "seed": 18446744073709551616}', "64 bits"),
    ('{"prompt": "a", "num_frames": 24}', "multiple of 8, plus 1"),
    ('{"prompt": "a", "fps": 0}', "fps"),
    ('{"prompt": "a", "fps": 1e9}', "sound"),
    ('{"prompt": "a", "fps": NaN}', "NaN"),
    ('{"prompt": "a", "negative_prompt": null}', "negative_prompt"),
    ('{"prompt": "a", "images": [{"path": "none.png"}]}', "none.png"),
    ('{"prompt": "a", "images": [{"path": "text.png"}]}', "text.png"),
    ('{"prompt": "a", "images": [{"path": "a.png", "frame": 9}]}', "frame from 0 to 8"),
    ('{"prompt": "a", "images": [{"path": "a.png", "frame": "first"}]}', "images: 0: frame"),
    ('{"prompt": "a", "images": [{"path": "a.png", "strength": 1.5}]}', "1.5"),
    ('{"prompt": "a", "images": ["a.png"]}', "images: 0"),
    ('{"prompt": "a", "decode": "fast"}', "decode"),
    ('{"prompt": "a", "output": "b.gif"}', "b.gif"),
    ('{"prompt": "a", "output": "nowhere/b.mp4"}', "nowhere"),
    ('{"prompt": "a", "output": "b\\u0000.mp4"}', "file name"),
    ('{"prompt": "a", "output": "' + "b" * 300 + '.mp4"}', "file name"),
    ('{"prompt": "a", "output": "taken.mp4"}', "taken.mp4.json"),
    ('{"prompt": "a", "output": "./good.mp4"}', "same output as line 1"),
    ('{"prompt": "a", "output": "link/good.mp4"}', "same output as line 1"),
]


def test_all_bad_lines_are_told_with_their_numbers_before_anything_runs(demo: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "taken.mp4.json").write_text('{"mine": true}')
    (tmp_path / "link").symlink_to(tmp_path)
    good = {"prompt": "a", "output": "good.mp4"}
    prompts = written(tmp_path, good, *(line for line, _ in BAD_LINES))
    before = names(tmp_path)
    message = refused(many(demo, prompts), 2)
    assert f"{len(BAD_LINES)} of {len(BAD_LINES) + 1} lines" in message
    told = dict(re.findall(r"^  - line (\d+): (.*)$", message, re.MULTILINE))
    for number, (line, words) in enumerate(BAD_LINES, start=2):
        assert words in told[str(number)], (line, told[str(number)])
    assert len(told) == len(BAD_LINES)
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--prompt", "x", "--prompts", "p.jsonl"],
        ["--prompts", "nowhere.jsonl"],
        ["--prompts", "."],
        ["--prompts", "p.jsonl", "--save-tensors", "t.safetensors"],
    ],
)
def test_one_prompt_or_many(arguments: list[str], demo: Path, tmp_path: Path) -> None:
    written(tmp_path, {"prompt": "x"}, name="p.jsonl")
    refused(ltxpack("run", demo / "overlay", *arguments, cwd=tmp_path), 2)
    assert names(tmp_path) == ["p.jsonl"]


def test_two_at_once_at_one_file_are_refused(demo: Path, tmp_path: Path) -> None:
    prompts = written(tmp_path, {"prompt": "x"})
    with batch._claimed(prompts):
        assert "another ltxpack run" in refused(many(demo, prompts), 2)


# How lines are read


def jobs(path: Path, output: Path | None = None, **settings: Any) -> list[Any]:
    small = {"height": 64, "width": 64, "num_frames": 9, "steps": 2}
    return read_lines(path, {**small, **settings}, output)  # type: ignore[typeddict-item]


def test_flags_give_what_a_line_leaves_out(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "flag.png")
    full = {
        "prompt": "b", "negative_prompt": "n", "seed": 7.0, "height": 128, "width": 192, "num_frames": 17, "fps": 30,
        "steps": 4, "images": [],
    }  # fmt: skip
    path = written(tmp_path, {"prompt": "a"}, full)
    plain, given = jobs(path, fps=12.0, images=[f"{tmp_path}/flag.png@last"])
    assert (plain.request.prompt, plain.request.negative_prompt) == ("a", DEFAULT_NEGATIVE_PROMPT)
    assert (plain.request.shape.fps, plain.request.settings.seed) == (12.0, 10)
    assert [(image.path.name, image.frame) for image in plain.request.images] == [("flag.png", 8)]
    shape = given.request.shape
    assert (shape.height, shape.width, shape.frames, shape.fps) == (128, 192, 17, 30)
    assert (given.request.prompt, given.request.negative_prompt, given.request.settings.seed) == ("b", "n", 7)
    assert isinstance(given.request.settings.seed, int)
    assert (given.request.settings.steps, list(given.request.images)) == (4, [])


def test_paths_are_relative_to_the_file_and_numbers_are_those_of_lines(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "sub" / "a.png")
    path = tmp_path / "sub" / "list.jsonl"
    lines = ['{"prompt": "a", "images": [{"path": "a.png", "frame": 3}]}', "", '{"prompt": "b", "output": "../c.mov"}']
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, '{"prompt": "\u2028"}']).encode())
    found = jobs(path)
    assert [job.number for job in found] == [1, 3, 4]
    assert [job.output for job in found] == [path.with_name("list-0001.mp4"), tmp_path / "sub" / "../c.mov",
                                             path.with_name("list-0004.mp4")]  # fmt: skip
    assert [(image.path, image.frame, image.strength) for image in found[0].request.images] == [
        (tmp_path / "sub" / "a.png", 3, 1.0)
    ]
    assert found[2].request.prompt == "\u2028"


def test_the_output_flag_serves_one_line(tmp_path: Path) -> None:
    (only,) = jobs(written(tmp_path, {"prompt": "a"}), tmp_path / "x.mp4")
    assert only.output == tmp_path / "x.mp4"
    with pytest.raises(LtxpackError, match="same output as line 1; -o is for a single line"):
        jobs(written(tmp_path, {"prompt": "a"}, {"prompt": "b"}), tmp_path / "x.mp4")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=6,
)
FIELDS = sorted(json.loads(load_schema("prompts"))["properties"])


@given(
    line=st.binary(max_size=60) | st.dictionaries(st.sampled_from(FIELDS), VALUES).map(lambda f: json.dumps(f).encode())
)
def test_whatever_a_line_holds_it_is_a_job_or_told(line: bytes, caches: Path) -> None:
    folder = caches / "fuzz"
    folder.mkdir(exist_ok=True)
    (folder / "p.jsonl").write_bytes(line)
    try:
        found = jobs(folder / "p.jsonl")
    except LtxpackError as error:
        assert error.exit_status == 2
    else:
        assert found


# Failures


THREE = [{"prompt": "a boat", "seed": seed, "output": f"{seed}.mp4"} for seed in (1, 2, 3)]
FAILURES = {
    2: (LtxpackError("fell over", next="stand up"), "fell over"),
    3: (OSError(28, "No space left on device"), "No space left on device"),
    4: (ZeroDivisionError("surprise"), "ZeroDivisionError: surprise"),
}


@pytest.mark.usefixtures("quick")
def test_a_failed_line_does_not_stop_the_rest(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = written(tmp_path, *({"prompt": "a", "seed": seed, "output": f"{seed}.mp4"} for seed in range(1, 6)))
    generate = recipe_run.generate

    def failing(session: Session, request: Request, **options: Any) -> Any:
        if request.settings.seed in FAILURES:
            raise FAILURES[request.settings.seed][0]
        return generate(session, request, **options)

    with monkeypatch.context() as patch:
        patch.setattr(recipe_run, "generate", failing)
        done = many(demo, prompts)
    message = refused(done, 1)
    assert statuses(done) == {1: "done", 2: "failed", 3: "failed", 4: "failed", 5: "done"}
    assert "2 done, 0 skipped, 3 failed" in done.stdout
    last = message[message.rindex("error: ") :]
    assert "3 of 5 videos were not made" in last
    assert all(re.search(f"^  - line {n}: .*{words}", last, re.MULTILINE) for n, (_, words) in FAILURES.items())
    assert names(tmp_path) == ["1.mp4", "1.mp4.json", "5.mp4", "5.mp4.json", "prompts.jsonl"]
    again = many(demo, prompts)
    assert statuses(again) == {1: "skipped", 2: "done", 3: "done", 4: "done", 5: "skipped"}


@pytest.mark.usefixtures("quick")
def test_nothing_is_loaded_ahead_for_a_line_that_failed(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed: list[Request | None] = []
    sample, described = recipe_run.sample, record.described

    def sampled(session: Session, request: Request, following: Request | None, halfway: None) -> Latents:
        followed.append(following)
        return sample(session, request)

    def failing(request: Request, *arguments: Any) -> Any:
        # The second time, when the line is made.
        if request.settings.seed == 1 and request in asked:
            raise FAILURES[3][0]
        asked.append(request)
        return described(request, *arguments)

    asked: list[Request] = []
    monkeypatch.setattr(recipe_run, "sample", sampled)
    monkeypatch.setattr(record, "described", failing)
    assert statuses(many(demo, written(tmp_path, *THREE))) == {1: "failed", 2: "done", 3: "done"}
    assert followed == [asked[-1], None]


def not_finite(*arguments: Any) -> Any:
    """What the text encoder gives, with a NaN in it."""
    found = hidden_states(*arguments)
    found[0].states[0, -1, 0, 0] = torch.nan
    return found


hidden_states = text.hidden_states


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("module", "name", "fails", "words"),
    [
        (video, "decode_video", out_of_memory, r"ran out of memory\n.*7 GiB\n  next: \w+"),
        (text, "load_text_encoder", out_of_memory, r"(ran out of memory[\s\S]*){3}"),
        (text, "hidden_states", not_finite, "not finite"),
    ],
    ids=["memory for the frames", "memory for the text encoder", "NaN"],
)
def test_what_fails_in_every_line_is_told_and_leaves_the_older_video(
    module: ModuleType,
    name: str,
    fails: object,
    words: str,
    demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = written(tmp_path, *THREE)
    (tmp_path / "1.mp4").write_bytes(b"older")
    monkeypatch.setattr(module, name, fails)
    done = many(demo, prompts)
    assert re.search(words, refused(done, 1))
    assert statuses(done) == {1: "failed", 2: "failed", 3: "failed"}
    assert names(tmp_path) == ["1.mp4", "prompts.jsonl"]
    assert (tmp_path / "1.mp4").read_bytes() == b"older"


def test_what_would_be_written_into_an_overlay_is_told(demo: Path, tmp_path: Path) -> None:
    notes, overlay = Notes(), (demo / "overlay").resolve()
    videos = [(name, overlay / name) for name in ("a.mp4", "bakes/b.mp4", "c.mp4", "vae/d.mp4")]
    runs.check_outputs(runs.RunOptions(overlay), [("-o", tmp_path / "a.mp4")], notes)
    assert notes.warnings == []
    runs.check_outputs(runs.RunOptions(overlay, save_tensors=overlay / "t.safetensors"), videos, notes)
    assert len(notes.warnings) == 3 and all(f"lies in the overlay {overlay}" in told for told in notes.warnings)


@pytest.mark.parametrize("flag", ["--save-tensors", "--save-activations"])
@pytest.mark.parametrize("place", ["vae/x.safetensors", "vae/config.json", "bakes/distilled-0.5/a.safetensors"])
def test_what_would_spoil_an_overlay_is_refused_before_anything_is_loaded(
    place: str, flag: str, overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight file more, or another file in the place of the overlay's own: its folder could not be loaded again."""
    before = names(overlay / place.rpartition("/")[0])
    monkeypatch.setattr(runs, "Session", None)
    given = ("--prompt", "a boat", "-o", tmp_path / "v.mp4", flag, overlay / place)
    message = refused(ltxpack("run", overlay, *FLAGS, *given), 2)
    assert place in message and f"next: choose {flag} in another folder" in message
    assert names(overlay / place.rpartition("/")[0]) == before


@pytest.mark.usefixtures("quick")
def test_a_line_that_would_not_fit_fails_before_anything_is_loaded(
    demo: Path, tmp_path: Path, loads: list[str]
) -> None:
    lines = [{"prompt": "a", "num_frames": 8 * 10**8 + 1, "output": "vast.mp4"}, {"prompt": "b", "output": "small.mp4"}]
    done = many(demo, written(tmp_path, *lines))
    assert "memory" in refused(done, 1)
    assert statuses(done) == {1: "failed", 2: "done"}
    assert len(loads) == 1


@pytest.mark.usefixtures("quick")
def test_after_an_interrupt_the_same_command_goes_on(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = written(tmp_path, *THREE)
    decode, count = video.decode_video, []

    def interrupted(*arguments: Any) -> Any:
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return decode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(video, "decode_video", interrupted)
        done = many(demo, prompts)
    assert done.returncode == 130
    assert "goes on from where it stopped" in done.stderr
    assert names(tmp_path) == ["1.mp4", "1.mp4.json", "prompts.jsonl"]
    assert statuses(many(demo, prompts)) == {1: "skipped", 2: "done", 3: "done"}
    assert names(tmp_path) == sorted(["prompts.jsonl", *(f"{n}.mp4{end}" for n in (1, 2, 3) for end in ("", ".json"))])


# A shell that starts the tests in the background has them, and all they start, ignore Ctrl-C.
SLOWLY_DECODED = """
import signal
import time
signal.signal(signal.SIGINT, signal.default_int_handler)
from ltxpack.runtime.codecs import video
decode = video.decode_video
def slowly(*arguments):
    for frames in decode(*arguments):
        yield frames
        time.sleep(10**6)
video.decode_video = slowly
from ltxpack.cli import main
main()
"""


def test_a_real_interrupt_leaves_nothing_half_written(demo: Path, tmp_path: Path) -> None:
    prompts = written(tmp_path, {"prompt": "a boat"})
    command = [sys.executable, "-c", SLOWLY_DECODED, "run", demo / "overlay", "--prompts", prompts, *FLAGS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = WarmProcess(command, **pipes)
    assert process.stderr is not None
    assert b"decode\n" in process.stderr
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=HANG)
    assert process.returncode == 130
    assert "goes on from where it stopped" in told
    assert "Traceback" not in told
    assert names(tmp_path) == ["prompts.jsonl"]


# Encoded prompts on disk, from the command line


def test_a_second_video_with_the_same_prompt_loads_no_text_encoder(
    demo: Path, tmp_path: Path, loads: list[str], cache: Path
) -> None:
    def one(*flags: str | Path) -> bytes:
        tensors = tmp_path / "t.safetensors"
        given = (*FLAGS, "--prompt", "a boat", "-o", tmp_path / "v.mp4", "--save-tensors", tensors, *flags)
        assert ltxpack("run", demo / "overlay", *given).returncode == 0
        return tensors.read_bytes()

    first = one("--no-cache")
    assert not cache.exists()
    assert one() == first
    assert len(loads) == 2
    assert len(list((cache / "contexts").iterdir())) == 1
    assert one() == first
    assert len(loads) == 2
