"""What a client may say to ``ltxpack serve``: names, sizes, pictures, keys; all else is told in JSON, never 500."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from serving import Asking

from ltxpack.errors import UsageError
from ltxpack.manifest import DISTILLED_KIND, read_manifest
from ltxpack.reporter import SilentReporter
from ltxpack.runtime.overlay import Overlay
from ltxpack.runtime.sampling.recipes import RECIPES
from ltxpack.runtime.settings import Settings
from ltxpack.serve.app import Service
from ltxpack.serve.jobs import request_of
from ltxpack.serve.limits import ServeLimits
from ltxpack.serve.models import served_models
from ltxpack.serve.server import ServeOptions, process_place, service_of

VALID = {"prompt": "a boat", "model": "ltx-2.3-hq", "size": "64x64", "num_frames": 9}
JSON = {"content-type": "application/json"}


class Client(Asking):
    """Nothing is made."""

    def __init__(self, service: Service) -> None:
        super().__init__(service)
        self.jobs, self.schema = service.jobs, service.schema

    def post(self, said: Mapping[str, Any], **more: Any) -> httpx.Response:
        return self.ask("POST", "/v1/videos", json=dict(said), **more)


Opened = Callable[..., Client]


@pytest.fixture(scope="module")
def opened(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    clients: list[Client] = []

    def make(**given: Any) -> Client:
        options = ServeOptions(demo / "overlay", tmp_path_factory.mktemp("videos"), **given)
        clients.append(Client(service_of(options, SilentReporter(), None, partial(process_place, options))))
        return clients[-1]

    yield make
    for client in clients:
        client.close()
        client.jobs.close()


@pytest.fixture(scope="module")
def client(opened: Opened) -> Client:
    return opened(limits=ServeLimits(queue=10**6))


def refusal(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """What is said of an error, in the shape that OpenAI's clients read."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return dict(error)


def png(*size: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size or (80, 64), (200, 30, 30)).save(file, "PNG")
    return file.getvalue()


def in_form(said: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, (None, str(value))) for name, value in said.items()]


async def in_pieces(count: int) -> AsyncIterator[bytes]:
    """A body that does not say how long it is."""
    for _ in range(count):
        yield b"{"


def as_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


# What is accepted


def test_a_job_has_the_fields_that_clients_read(client: Client) -> None:
    job = client.post({**VALID, "seed": 3.0, "negative_prompt": None}).json()
    assert job.pop("id").startswith("video_") and job.pop("created_at") > 1.7e9
    assert job == {
        "object": "video", "model": "ltx-2.3-hq", "status": "queued", "progress": 0, "completed_at": None,
        "expires_at": None, "prompt": "a boat", "size": "64x64", "seconds": "0.375", "error": None, "warnings": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("said", "size", "seconds", "frames"),
    [
        ({}, "1920x1088", "5.04167", 121),
        ({"model": "ltx-2.3-distilled"}, "1536x1024", "5.04167", 121),
        ({"seconds": "4"}, "1920x1088", "4", 97),
        ({"seconds": 1.5, "fps": 16, "size": "128x64"}, "128x64", "1.5", 25),
        ({"width": 128, "height": 192, "num_frames": 17}, "128x192", "0.708333", 17),
    ],
)
def test_size_and_seconds_are_those_of_the_video(
    client: Client, said: dict[str, Any], size: str, seconds: str, frames: int
) -> None:
    job = client.post({"prompt": "a boat", **said}).json()
    assert (job["size"], job["seconds"]) == (size, seconds)
    kept = client.jobs.get(job["id"])
    assert kept is not None
    request = request_of(kept.task.prompt, kept.task.settings, kept.task.images, client.jobs.pictures)
    assert request.shape.frames == frames and f"{request.shape.width}x{request.shape.height}" == size


def test_settings_are_taken_by_their_names_from_json_and_forms(client: Client) -> None:
    said = {"seed": 7, "video_cfg": 2.5, "video_stg": 1.0, "video_stg_blocks": [1], "keep_steps": "none", "fps": 12.5}
    form = {**VALID, **said, "video_stg_blocks": "1"}
    for answer in (client.post({**VALID, **said}), client.ask("POST", "/v1/videos", files=in_form(form))):
        kept = client.jobs.get(answer.json()["id"])
        assert kept is not None
        found = request_of("", kept.task.settings, [], Path()).settings
        assert {name: getattr(found, name) for name in said} == {**said, "video_stg_blocks": (1,)}


def test_pictures_come_as_bytes_and_are_kept_until_the_video_is_made(client: Client) -> None:
    picture = png()
    form = in_form(VALID)
    url = as_url(picture)
    for answer in (
        client.ask("POST", "/v1/videos", files=[*form, ("input_reference", ("a.png", picture, "image/png"))]),
        client.ask("POST", "/v1/videos", files=[*form, ("input_reference[image_url]", (None, url))]),
        client.post({**VALID, "input_reference": url}),
        client.post({**VALID, "input_reference": {"image_url": url}}),
    ):
        kept = client.jobs.get(answer.json()["id"])
        assert kept is not None and kept.task.images == [[f"{kept.id}-0", 0, 1.0]]
        assert (client.jobs.pictures / f"{kept.id}-0").read_bytes() == picture
    both = {"input_reference": url, "images": [{"image_url": url, "frame": "last", "strength": 0.5}]}
    kept = client.jobs.get(client.post({**VALID, **both}).json()["id"])
    assert kept is not None and [image[1:] for image in kept.task.images] == [[0, 1.0], [8, 0.5]]
    client.ask("DELETE", f"/v1/videos/{kept.id}")
    assert not [*client.jobs.pictures.glob(f"{kept.id}*")]


# What is refused


@pytest.mark.parametrize(
    ("said", "param", "told"),
    [
        ({"size": "1280x720"}, "size", "wrong height: expected a multiple of 64, found 720, choose height 704 or 768"),
        ({"size": "0x64"}, "size", "found 0"),
        ({"num_frames": 10}, "num_frames", "a multiple of 8, plus 1"),
        ({"fps": 1e-9}, "fps", "choose fps 24"),
        ({"seconds": 4}, "seconds", "two answers to one question"),
        ({"width": 128}, "size", "two answers to one question"),
        ({"frames": 9}, "frames", "did you mean num_frames?"),
        ({"stage1": "base"}, "stage1", "the model's name picks recipe and bakes"),
        ({"video_stg_blocks": [2]}, "video_stg_blocks.0", "2 is greater than the maximum of 1"),
        ({"model": "ltx-2.3-distilled", "steps": 8}, "steps", "steps has no use in the recipe distilled"),
        ({"size": "4096x4096"}, "size", "a frame may have"),
        ({"size": "16448x64"}, "size", "choose width 16384"),
        ({"prompt": ""}, "prompt", "prompt: "),
        ({"input_reference": "/etc/passwd"}, "input_reference", "opens no path and no address"),
        ({"input_reference": "http://127.0.0.1/a.png"}, "input_reference", "opens no path and no address"),
        ({"input_reference": as_url(png()[:60])}, "input_reference", "a damaged picture"),
        ({"images": [{"image_url": as_url(png()), "frame": 9}]}, None, "image outside the video"),
    ],
)
def test_a_refusal_names_the_field_and_what_would_do(
    client: Client, said: dict[str, Any], param: str | None, told: str
) -> None:
    before = client.jobs.counts(), len([*client.jobs.pictures.iterdir()])
    error = refusal(client.post({**VALID, **said}))
    assert told in error["message"] and error["param"] == param and error["type"] == "invalid_request_error"
    assert "/videos" not in error["message"] and "--" not in error["message"]
    assert (client.jobs.counts(), len([*client.jobs.pictures.iterdir()])) == before


def test_a_page_after_a_video_that_is_not_there_names_that_field(client: Client) -> None:
    assert refusal(client.ask("GET", "/v1/videos", params={"after": "video_1"}), 404)["param"] == "after"


def test_an_unknown_model_is_told_with_those_that_there_are(client: Client) -> None:
    error = refusal(client.post({**VALID, "model": "sora-2"}), 404)
    assert error["code"] == "model_not_found" and "ltx-2.3-hq" in error["message"]
    known = [model["id"] for model in client.ask("GET", "/v1/models").json()["data"]]
    assert known == [f"ltx-2.3-{name}" for name in RECIPES]


def test_bodies_pictures_and_the_queue_have_limits(opened: Opened) -> None:
    client = opened(limits=ServeLimits(queue=1, body=4000, picture=1000, picture_pixels=6000))
    assert "4000 bytes" in refusal(client.post({**VALID, "prompt": "a" * 4000}), 413)["message"]
    assert refusal(client.ask("POST", "/v1/videos", content=in_pieces(5000), headers=JSON), 413)
    assert "1000 bytes" in refusal(client.post({**VALID, "input_reference": as_url(b"a" * 1001)}), 413)["message"]
    large = refusal(client.post({**VALID, "input_reference": as_url(png(100, 61))}))
    assert "too large a picture" in large["message"]
    assert client.post({**VALID, "input_reference": as_url(png(100, 60))}).status_code == 200
    full = client.post(VALID)
    assert refusal(full, 429)["code"] == "rate_limit_exceeded" and int(full.headers["retry-after"]) == 10


def test_a_key_is_asked_for_and_pages_are_not_answered_without_one(opened: Opened) -> None:
    client = opened(api_key="sécret")
    for key in ({}, {"Authorization": "Bearer secret"}, {"Authorization": "sécret".encode()}):
        for method, path in (("GET", "/v1/videos"), ("POST", "/v1/videos"), ("DELETE", "/v1/videos/video_1")):
            answer = client.ask(method, path, headers=key)
            assert refusal(answer, 401)["code"] == "invalid_api_key"
    right = {"Authorization": "Bearer sécret".encode()}
    assert client.post(VALID, headers={**right, "Origin": "http://elsewhere"}).status_code == 200
    assert client.ask("GET", "/metrics").status_code == 200
    assert [client.ask(how, "/health").status_code for how in ("GET", "HEAD")] == [503, 503]
    client = opened()
    for origin in ("http://elsewhere", "http://localhost", "null"):
        assert refusal(client.post(VALID, headers={"Origin": origin}), 403)["code"] == "forbidden"
    assert client.post(VALID).status_code == 200


def test_without_a_key_the_server_answers_to_its_own_names(opened: Opened) -> None:
    """A page whose name was given this machine's address sends that name, and no Origin where it only reads."""
    client = opened(host="Gpu1", allow_hosts=["videos.example."])
    known = ("localhost", "LOCALHOST:8000", "gpu1:8000", "videos.example", "127.0.0.1:1", "[::1]:8000", "192.168.1.7")
    for name in known:
        assert client.ask("GET", "/v1/videos", headers={"Host": name}).status_code == 200, name
    for name in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "1.2.3", ""):
        for method, path in (("GET", "/v1/videos"), ("POST", "/v1/videos"), ("GET", "/metrics"), ("GET", "/none")):
            error = refusal(client.ask(method, path, headers={"Host": name}), 421)
            assert error["code"] == "unknown_host" and "--allow-host" in error["message"]
    assert 'status="421"' in client.ask("GET", "/metrics").text
    for free in (opened(allow_hosts=["*"]), opened(api_key="secret")):
        answer = free.ask("GET", "/v1/models", headers={"Host": "evil.example", "Authorization": "Bearer secret"})
        assert answer.status_code == 200
    for wrong in ("", "http://gpu1", "gpu1:8000", "*.example.com", "a b"):
        with pytest.raises(UsageError, match="takes a name alone"):
            opened(allow_hosts=[wrong])


def test_only_videos_of_jobs_are_fetched_and_ranges_are_bounded(client: Client) -> None:
    job_id = client.post(VALID).json()["id"]
    while (claimed := client.jobs.claim(0)) is not None and claimed.id != job_id:
        client.jobs.fail(claimed.id, "server_error", "not this one")
    client.jobs.video(job_id).write_bytes(b"0123456789")
    client.jobs.complete(job_id)
    path = f"/v1/videos/{job_id}/content"
    for header, status, content in (
        ("", 200, b"0123456789"), ("bytes=2-4", 206, b"234"), ("bytes=-3", 206, b"789"),
        ("bytes=4-2", 200, b"0123456789"), ("lines=1", 200, b"0123456789"),
    ):  # fmt: skip
        answer = client.ask("GET", path, headers={"Range": header})
        assert (answer.status_code, answer.content) == (status, content), header
    assert "10 bytes" in refusal(client.ask("GET", path, headers={"Range": "bytes=10-"}), 416)["message"]
    assert "only the video" in refusal(client.ask("GET", path, params={"variant": "thumbnail"}))["message"]
    client.jobs.video(job_id).unlink()
    assert refusal(client.ask("GET", path), 404)["message"] == "the video was removed"
    for other in ("jobs.sqlite", "..%2Fjobs.sqlite", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "video_" + "0" * 32):
        refusal(client.ask("GET", f"/v1/videos/{other}/content"), 404)


# A thousand malformed requests

Malformed = tuple[str, str, dict[str, Any]]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
SIZES = st.sampled_from(
    ["0x0", "63x64", "64x", "x", "99999x99999", "64x64x64", "-64x64", "６４x64", "64 x 64", "1e2x64"]
)
NUMBERS = st.sampled_from([
    ("num_frames", 10**18), ("num_frames", 0), ("seed", 2**70), ("fps", 0), ("fps", -1), ("fps", 1e308), ("fps", 1e-9),
    ("steps", 1), ("steps", 10**6), ("width", 2**40), ("image_crf", 52), ("video_skip_step", -1), ("decode", "no"),
    ("keep_steps", "0"), ("keep_steps", "first,,"), ("model", "../../etc"),
])  # fmt: skip
SECONDS = st.sampled_from(["nan", "inf", "-1", "1e999", "", "four", "0", "1e3", "٣", True, [], 1e300])
PICTURES = (
    st.sampled_from(["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/", "data:,", "data:;base64,!", "../a.png"])
    | st.binary().map(as_url)
    | st.binary().map(lambda data: as_url(png()[:60] + data))
)
METHODS = st.sampled_from(["PUT", "PATCH", "OPTIONS", "TRACE", "DELETE"])
TYPES = st.sampled_from(["", "text/plain", "application/x-www-form-urlencoded", "application/xml", "json", "\t;"])
FORMS = st.sampled_from(["multipart/form-data", "multipart/form-data; boundary=x", "multipart/form-data; boundary="])
QUERIES = st.sampled_from(["limit=0", "limit=101", "limit=x", "order=up", "after=video_1", "after=", "limit=1e9"])


def malformed(schema: Mapping[str, Any]) -> st.SearchStrategy[Malformed]:
    """Requests with one thing wrong."""
    properties = schema["properties"]

    def fits(name: str, value: Any) -> bool:
        return value is None or jsonschema.Draft202012Validator(properties[name]).is_valid(value)

    def json_of(said: Mapping[str, Any]) -> Malformed:
        return "POST", "/v1/videos", {"content": json.dumps({**VALID, **said}).encode(), "headers": JSON}

    def no_object(content: bytes) -> bool:
        try:
            return not isinstance(json.loads(content), dict)
        except (ValueError, RecursionError):
            return True

    def form_of(pairs: list[tuple[str, str]]) -> Malformed:
        return "POST", "/v1/videos", {"files": [(name, (None, text)) for name, text in pairs]}

    wrong = st.tuples(st.sampled_from([*properties]), VALUES).filter(lambda pair: not fits(*pair))
    unknown = st.tuples(st.text().filter(lambda name: name not in properties), VALUES.filter(lambda v: v is not None))
    whole = json.dumps(VALID).encode()
    damaged = st.binary() | st.integers(0, len(whole) - 1).map(lambda end: whole[:end]) | st.just(b"[" * 10**5)
    unsound = st.sampled_from([b'{"prompt": "\\ud800"}', b'{"prompt": NaN}', b'{"prompt": "a", "prompt": "b"}'])
    text = st.text(min_size=1).filter(lambda name: "\0" not in name)
    return (
        (wrong | unknown).map(lambda pair: json_of({pair[0]: pair[1]}))
        | SIZES.map(lambda size: json_of({"size": size}))
        | NUMBERS.map(lambda pair: json_of({"size": None, pair[0]: pair[1]} if pair[0] == "width" else dict([pair])))
        | SECONDS.map(lambda seconds: json_of({"num_frames": None, "seconds": seconds}))
        | PICTURES.map(lambda url: json_of({"input_reference": url}))
        | PICTURES.map(lambda url: json_of({"images": [{"image_url": url}]}))
        | (damaged.filter(no_object) | unsound).map(
            lambda content: ("POST", "/v1/videos", {"content": content, "headers": JSON})
        )
        | st.tuples(TYPES, st.binary()).map(
            lambda pair: ("POST", "/v1/videos", {"content": pair[1], "headers": {"content-type": pair[0]}})
        )
        | st.tuples(FORMS, st.binary()).map(
            lambda pair: ("POST", "/v1/videos/sync", {"content": pair[1], "headers": {"content-type": pair[0]}})
        )
        | st.tuples(st.sampled_from([*properties]), text).map(lambda pair: form_of([("prompt", "a"), pair, pair]))
        | st.binary().map(lambda data: ("POST", "/v1/videos", {"files": {"input_reference": ("a.png", data)},
                                                               "data": VALID}))
        | METHODS.map(lambda method: (method, "/v1/videos", {}))
        | st.tuples(st.sampled_from(["GET", "DELETE"]), text, st.sampled_from(["", "/content", "/x"])).map(
            lambda parts: (parts[0], f"/v1/videos/{quote(parts[1], safe='')}{parts[2]}", {})
        )
        | text.map(lambda path: ("GET", f"/{quote(path, safe='')}", {}))
        | QUERIES.map(lambda query: ("GET", f"/v1/videos?{query}", {}))
    )  # fmt: skip


def test_a_thousand_malformed_requests_are_told_in_json(client: Client) -> None:
    counts = client.jobs.counts()
    asked = 0

    @settings(max_examples=1000, suppress_health_check=[*HealthCheck], database=None)
    @given(malformed(client.schema))
    def told(request: Malformed) -> None:
        nonlocal asked
        method, path, more = request
        answer = client.ask(method, path, **more)
        assert 400 <= answer.status_code < 500, (answer.status_code, answer.text)
        error = answer.json()["error"]
        assert error["message"] and error["type"] == "invalid_request_error"
        asked += 1

    told()
    assert asked >= 1000 and client.jobs.counts() == counts


# Written down once


def test_the_schema_is_made_of_the_settings_and_published(client: Client) -> None:
    properties = client.schema["properties"]
    jsonschema.Draft202012Validator.check_schema(client.schema)
    own = {"prompt", "model", "size", "seconds", "input_reference", "images"}
    assert set(properties) == own | {one.name for one in fields(Settings)} - {"recipe"}
    for one in fields(Settings):
        if one.name in ("recipe", "images") or one.default in (None, ()):
            continue
        assert jsonschema.Draft202012Validator(properties[one.name]).is_valid(one.default), one.name
    described = client.ask("GET", "/openapi.json").json()
    for path in ("/v1/videos", "/v1/videos/sync"):
        content = described["paths"][path]["post"]["requestBody"]["content"]
        published = content["application/json"]["schema"]["properties"]
        assert {name: one.get("type") for name, one in published.items()} == {
            name: one.get("type") for name, one in properties.items()
        }
        assert content["multipart/form-data"]["schema"]["properties"]["input_reference"]["format"] == "binary"
    assert set(described["paths"]) == {
        "/v1/videos", "/v1/videos/sync", "/v1/videos/{video_id}", "/v1/videos/{video_id}/content", "/v1/models",
        "/health", "/metrics",
    }  # fmt: skip


def test_names_pick_recipes_and_bakes(demo: Path, overlay: Path) -> None:
    """A name is found for every stack of LoRAs and every form, as far as the overlay has its bakes."""
    pair = ("distilled-0.25", "distilled-0.5")
    assert {name: model.stages for name, model in served_models(Overlay.open(overlay)).items()} == {
        "ltx-2.3-hq": pair, "ltx-2.3-distilled": pair[1:] * 2, "ltx-2.3-two-stage": ("base", pair[1]),
        "ltx-2.3-one-stage": ("base",),
    }  # fmt: skip
    manifest = read_manifest(overlay)
    quarter, half = (manifest.bakes[name] for name in pair)
    style = replace(half.loras[0], name="style", blake3="5" * 64, strength=0.8)

    def with_bakes(**more: Any) -> dict[str, tuple[str, ...]]:
        bakes = {**manifest.bakes, **{name.replace("_", "+"): bake for name, bake in more.items()}}
        found = Overlay(overlay, replace(manifest, bakes=bakes))
        return {name: model.stages for name, model in served_models(found).items()}

    def stacked(bake: Any, strength: float = 0.8) -> Any:
        return replace(bake, loras=(replace(style, strength=strength), *bake.loras))

    with_style = with_bakes(a_style=stacked(quarter), b_style=stacked(half))
    for name in ("style", "style-0.8"):
        assert with_style[f"ltx-2.3-hq+{name}"] == ("a+style", "b+style")
        assert with_style[f"ltx-2.3-distilled+{name}"] == ("b+style",) * 2
        assert f"ltx-2.3-two-stage+{name}" not in with_style, "the base has no style in it"
    both = with_bakes(a_style=stacked(quarter), b_style=stacked(half), c_style=stacked(half, 0.5))
    assert "ltx-2.3-distilled+style" not in both and both["ltx-2.3-distilled+style-0.5"] == ("c+style",) * 2
    coded = with_bakes(half8=replace(half, format="fp8"))
    assert coded["ltx-2.3-distilled-fp8"] == ("half8",) * 2 and coded["ltx-2.3-hq-fp8"] == (pair[0], "half8")
    other = with_bakes(mine=replace(half, loras=(style,)))
    assert other["ltx-2.3-one-stage+mine"] == ("mine",) and "ltx-2.3-hq+mine" not in other
    codes = replace(half, loras=(replace(style, strength=0.0),), format="fp8")
    manifest = replace(manifest, transformer_kind=DISTILLED_KIND, bakes={})
    assert with_bakes(mine=replace(half, loras=(style,)), base8=codes) == {
        "ltx-2.3-distilled": ("base",) * 2, "ltx-2.3-distilled-fp8": ("base8",) * 2,
        "ltx-2.3-distilled+mine": ("mine",) * 2,
    }, "no other recipe goes with a distilled checkpoint"  # fmt: skip


def test_further_names_are_given_on_the_command_line(overlay: Path) -> None:
    found = served_models(Overlay.open(overlay), "bf16", ["anime=hq:distilled-0.5,base", "quick=distilled"])
    assert found["anime"].stages == ("distilled-0.5", "base") and found["quick"].stages == ("distilled-0.5",) * 2
    for wrong in ("anime", "=hq", "a=slow", "a=hq:none,base", "a=one-stage:base,base"):
        with pytest.raises(UsageError):
            served_models(Overlay.open(overlay), "bf16", [wrong])
