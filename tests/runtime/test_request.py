"""``--image`` as typed, and requests no run could use."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ltxpack.errors import UsageError
from ltxpack.runtime.request import ImageSpec, Request
from ltxpack.runtime.sampling.recipes import Guidance
from ltxpack.runtime.sampling.shape import AV
from ltxpack.runtime.settings import SessionSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("images")
    for name in ("a.png", "b@3.png", "c@4:0.5", "d:1"):
        (made / name).touch()
    return made


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.png", ("a.png", 0, 1.0)),
        ("a.png@8", ("a.png", 8, 1.0)),
        ("a.png:0.5", ("a.png", 0, 0.5)),
        ("a.png@8:0.5", ("a.png", 8, 0.5)),
        ("a.png@last", ("a.png", 24, 1.0)),
        ("a.png@last:0", ("a.png", 24, 0.0)),
        ("b@3.png", ("b@3.png", 0, 1.0)),
        ("b@3.png@2", ("b@3.png", 2, 1.0)),
        ("c@4:0.5", ("c@4:0.5", 0, 1.0)),
        ("c@4:0.5@1:0.25", ("c@4:0.5", 1, 0.25)),
        ("d:1", ("d:1", 0, 1.0)),
        ("d:1:0.5", ("d:1", 0, 0.5)),
    ],
)
def test_read_from_the_right_and_a_path_as_typed_wins(
    text: str, expected: tuple[str, int, float], folder: Path
) -> None:
    spec = ImageSpec.parse(f"{folder}/{text}", 25)
    assert (spec.path, spec.frame, spec.strength) == (folder / expected[0], *expected[1:])


@pytest.mark.parametrize(
    "text", ["none.png", "a.png@25", "a.png@-1", "a.png:1.1", "a.png:-0.1", "a.png:nan", "a.png@x", "a.png@last:inf"]
)
def test_what_no_image_condition_can_be(text: str, folder: Path) -> None:
    with pytest.raises(UsageError):
        ImageSpec.parse(f"{folder}/{text}", 25).check(25)


def test_a_tilde_is_the_users_folder_unless_a_file_is_called_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    assert ImageSpec.parse("~/a.png@8:0.5", 25) == ImageSpec(folder / "a.png", 8, 0.5)
    for name in ("~a.png", "~nobody-of-this-name/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        assert ImageSpec.parse(name, 25).path == Path(name)
        (tmp_path / name).touch()
        assert ImageSpec.parse(f"{name}@3", 25) == ImageSpec(Path(name), 3)


@pytest.mark.parametrize(
    ("text", "found", "better"),
    [
        ("none.png", "No such file", "--help"),
        ("x" * 300, "name too long", "--help"),
        ("a.png/b.png", "Not a directory", "--help"),
        ("", "a folder", "give a picture in it"),
        ("https://example.org/a.png", "No such file", "download the picture first"),
        ("a\0.png", "null", "--help"),
    ],
)
def test_an_image_that_is_no_file_is_told_with_the_reason(text: str, found: str, better: str, folder: Path) -> None:
    image = ImageSpec.parse(text if "//" in text else f"{folder}/{text}", 25)
    with pytest.raises(UsageError, match="no such image") as refused:
        image.check(25)
    assert found in str(refused.value.found) and better in refused.value.next


def request(**changes: object) -> Request:
    values: dict[str, object] = {"height": 64, "width": 64, "num_frames": 9}
    return Request.of("x", **{**values, **changes})  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 1},
        {"seed": 2**64},
        {"height": 96},
        {"video_cfg": float("inf")},
        {"recipe": "lq"},
        {"video_stg": -1.0},
        {"audio_stg_blocks": (0, -1)},
        {"recipe": "distilled", "steps": 8},
        {"recipe": "distilled", "modality": 3.0},
        {"recipe": "two-stage", "height": 96},
        {"seed": "1"},
        {"seed": None},
        {"steps": 2.5},
        {"fps": None},
        {"images": None},
        {"video_stg_blocks": [0.5]},
        {"video_stg_blocks": 0},
        {"video_skip_step": 1.5},
        {"negative_prompt": 3},
        {"keep_steps": 3},
        {"decode": None},
    ],
)
def test_refused_requests(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        request(**changes)


def test_a_prompt_of_a_megabyte_is_refused_before_it_is_tokenised() -> None:
    Request.of("boat " * 20_000, negative_prompt="blurry " * 14_000)
    for long in ({"prompt": "boat " * 20_001}, {"prompt": "a boat", "negative_prompt": "x" * 100_001}):
        with pytest.raises(UsageError, match="too long") as refused:
            Request.of(**long)  # type: ignore[arg-type]
        assert refused.value.expected == "at most 100000 letters, of which the model reads 1024 tokens"


def test_a_prompt_is_text_and_one_video_has_one() -> None:
    for wrong in (None, 3, b"x", ["a boat", "a car"]):
        with pytest.raises(UsageError, match="a prompt that is no text"):
            Request.of(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"devices": [0, 1]}, "--devices expected text"),
        ({"devices": 2}, "--devices expected text"),
        ({"stage1": None}, "--stage1 expected text"),
        ({"compile": "no"}, "--compile expected True or False"),
        ({"cache": 3}, "--cache expected a path"),
        ({"cache": None}, "--cache expected a path"),
        ({"save_activations": 3}, "--save-activations expected a path"),
        ({"cache": "a\0b"}, "--cache expected a path"),
        ({"save_activations": Path("a\0b")}, "--save-activations expected a path"),
    ],
)
def test_a_session_refuses_values_of_another_kind(given: Any, wanted: str) -> None:
    with pytest.raises(UsageError) as refused:
        SessionSettings.of(given)
    assert " ".join(refused.value.render().split()).startswith(f"wrong {wanted}, found")


def test_a_session_takes_dtypes_and_devices_of_torch_and_truth_of_numpy() -> None:
    given = SessionSettings.of({"dtype": torch.float32, "device": torch.device("cuda:1"), "compile": np.True_})  # type: ignore[typeddict-item]
    assert (given.dtype, given.device, given.compile) == ("float32", "cuda:1", True)
    assert SessionSettings.of({"devices": None, "attention": None, "cache": False}).cache is False


def test_numbers_of_numpy_are_numbers_and_one_image_is_a_list_of_one() -> None:
    given = request(seed=np.int64(10), num_frames=np.int32(9), height=64.0, images=(path for path in [__file__]))
    assert given == request(seed=10, images=__file__) == pickle.loads(pickle.dumps(given))
    assert [type(number) for number in (given.settings.seed, given.shape.frames, given.shape.height)] == [int] * 3
    assert type(ImageSpec(Path(__file__), strength=np.float32(1)).strength) is float


@pytest.mark.parametrize(
    ("size", "refusal"),
    [
        (
            {"height": 1080},
            "wrong height\n  expected a multiple of 64, found 1080\n  next: choose --height 1024 or 1088",
        ),
        (
            {"width": 16448},
            "too large a width\n  expected at most 16384 pixels, which x264 takes, found 16448\n"
            "  next: choose --width 16384",
        ),
        (
            {"height": 16384, "width": 16384},
            "too large a picture\n  expected at most 16384x16128, which FFmpeg takes, found 16384x16384\n"
            "  next: choose --height 16128",
        ),
    ],
)
def test_sizes_are_those_that_the_recipe_and_the_video_file_can_have(size: dict[str, int], refusal: str) -> None:
    with pytest.raises(UsageError) as refused:
        request(**size)
    assert refused.value.render() == refusal
    flag, _, fitting = refusal.rpartition("choose --")[2].split(" or ")[0].partition(" ")
    assert request(**{**size, flag: int(fitting)})


def test_each_recipe_has_its_defaults_its_sizes_and_its_prompts() -> None:
    quick, one = Request.of("x", recipe="distilled"), request(recipe="one-stage", height=96)
    assert (quick.shape.height, quick.shape.width, quick.prompts) == (1024, 1536, ("x",))
    assert [(work.evaluations, work.passes) for work in quick.work(("base", "base")).stages] == [(8, 1), (3, 1)]
    assert [(work.evaluations, work.passes) for work in one.work(["base"]).stages] == [(30, 4)]
    for name, *size in (("two-stage", 1024, 1536), ("one-stage", 512, 768)):
        found = Request.of("x", recipe=name)
        assert [found.shape.height, found.shape.width] == size
        assert found.settings.guidance == AV(3.0, 7.0).map(lambda cfg: Guidance(cfg, 0.7, 3.0, 1.0, frozenset({28})))
    two = Request.of("x", recipe="two-stage", video_stg=0.0)
    assert two.settings.guidance.video.perturbed == frozenset(), "with stg 0 the list counts for nothing"


def test_the_default_negative_prompt_is_the_official_one_to_the_letter() -> None:
    digest = hashlib.sha256(request().negative_prompt.encode()).hexdigest()
    assert digest == "5d3fc170ddbab647fd3baf4694dfcca44dd817fe489bc3ab0684e12505472be4"


def test_steps_with_decoded_weights_are_named_by_number_or_by_their_place() -> None:
    kept = Request.of("x", keep_steps="first, 2,last")
    assert [sorted(kept.kept_steps(stage)) for stage in (0, 1)] == [[0, 1, 14], [0, 1, 2]]
    assert [Request.of("x").kept_steps(stage) for stage in (0, 1)] == [{0}, frozenset()], "the first, where guided"
    assert (
        Request.of("x", recipe="distilled").kept_steps(0) == Request.of("x", keep_steps="none").kept_steps(0) == set()
    )
    assert Request.of("x", recipe="distilled", keep_steps="8").kept_steps(1) == {7}, "a step that stage 2 has not"
    for wrong in ("0", "16", "-1", "middle", "", "1;2", "1.0"):
        with pytest.raises(UsageError, match="wrong --keep-steps"):
            Request.of("x", keep_steps=wrong)
