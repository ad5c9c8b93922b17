"""The hub client against a local server that speaks the hub's protocol: found, refused, broken, resumed, offline."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hub_server import MEMBER, STRANGER, HubServer, use_endpoint
from hypothesis import given
from hypothesis import strategies as st
from support import HANG, Notes, until

from ltxpack.errors import FormatError, LtxpackError, SourceError, UsageError
from ltxpack.materialize.hub import client as hub
from ltxpack.materialize.hub import errors as hub_errors
from ltxpack.materialize.hub import transfer as hub_transfer
from ltxpack.materialize.hub.client import Hub, HubUnreachable, RepoFile, is_safe_name, parse_reference

REPO = "Lightricks/LTX-2.3"
GATED = "google/gemma-3"
BIG = "model.safetensors"
SMALL = "config.json"


def safetensors(payload: int, seed: int = 0) -> bytes:
    header = json.dumps({"x": {"dtype": "U8", "shape": [payload], "data_offsets": [0, payload]}}).encode()
    return len(header).to_bytes(8, "little") + header + random.Random(seed).randbytes(payload)


FILES = {
    SMALL: b'{"model_type": "gemma3"}',
    "empty.txt": b"",
    "sub/notes.txt": b"notes\n",
    BIG: safetensors(1_000_000),
    "sub/other.safetensors": safetensors(70_000, seed=1),
}
REVISIONS = {"v1": {SMALL: b'{"old": 1}'}, "refs/pr/1": {SMALL: b'{"pr": 1}'}}


Listing = Mapping[str, RepoFile]


def commit_of(files: Listing) -> str:
    [commit] = {file.commit for file in files.values()}
    return commit


def stated(files: Listing) -> dict[str, tuple[int, str | None]]:
    return {name: (file.size, file.sha256) for name, file in files.items()}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Callable[..., HubServer]]:
    """Starts a server that holds the given repositories, for this process to use."""
    with contextlib.ExitStack() as stack:

        def start(repos: Any, **more: Any) -> HubServer:
            server = stack.enter_context(HubServer(repos, **more))
            server.use(monkeypatch, cache)
            return server

        yield start


@pytest.fixture
def server(serve: Callable[..., HubServer]) -> HubServer:
    repos = {REPO: FILES, GATED: {BIG: FILES[BIG]}, "me/private": FILES}
    return serve(repos, gated={GATED}, private={"me/private"}, revisions={REPO: REVISIONS})


@pytest.fixture
def files(server: HubServer) -> Listing:
    return Hub().files(REPO)


def told_by(call: Callable[[], object], kind: type[LtxpackError] = SourceError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.next, "an error ends in what to do next"
    return str(caught.value)


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def blobs(cache: Path, repo: str = REPO) -> dict[str, bytes]:
    folder = cache / f"models--{repo.replace('/', '--')}" / "blobs"
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


# What the hub says


def test_listing_holds_files_with_sizes_and_the_stated_sha256(server: HubServer, files: Listing) -> None:
    assert {(file.repo, file.commit) for file in files.values()} == {(REPO, server.commit(REPO))}
    assert {name: file.size for name, file in files.items()} == {name: len(data) for name, data in FILES.items()}
    hashes = {name: file.sha256 for name, file in files.items() if file.sha256}
    assert hashes == {name: hashlib.sha256(FILES[name]).hexdigest() for name in FILES if name.endswith("safetensors")}


@pytest.mark.parametrize("revision", REVISIONS)
def test_revision_is_pinned(server: HubServer, revision: str) -> None:
    hub_ = Hub()
    files = hub_.files(REPO, revision)
    assert commit_of(files) == server.commit(REPO, revision) != server.commit(REPO)
    assert stated(hub_.files(REPO, commit_of(files))) == stated(files)
    assert hub_.fetch(files[SMALL]).read_bytes() == REVISIONS[revision][SMALL]


@pytest.mark.parametrize("token", [None, STRANGER])
def test_missing_and_private_look_alike(server: HubServer, token: str | None) -> None:
    for repo in ("nobody/nothing", "me/private"):
        told = told_by(lambda repo=repo: Hub(token).files(repo))
        assert "no such repository, or a private one" in told
        assert f"{server.endpoint}/{repo}" in told and "hf auth login" in told


def test_private_and_gated_repositories_open_with_the_token(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_ = Hub(MEMBER)
    assert hub_.fetch(hub_.files(GATED)[BIG]).read_bytes() == FILES[BIG]
    assert hub_.files("me/private")
    monkeypatch.setenv("HF_TOKEN", MEMBER)
    assert Hub().files("me/private")


@pytest.mark.parametrize(("token", "reason"), [(None, "none is logged in"), (STRANGER, "has no access")])
def test_gated_repository_names_the_page_before_anything_is_downloaded(
    server: HubServer, token: str | None, reason: str
) -> None:
    told = told_by(lambda: Hub(token).files(GATED))
    assert "gated" in told and reason in told
    assert f"open {server.endpoint}/{GATED} and accept the licence" in told
    assert "hf auth login" in told
    assert not server.sent()


def test_refused_and_forbidden_tokens(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    told = told_by(lambda: Hub("hf_wrong").files(REPO))
    assert "refuses the access token" in told and "hf auth login" in told
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "HF_TOKEN" in told_by(lambda: Hub().files(REPO))
    server.faults.always = 403
    assert f"{server.endpoint}/settings/tokens" in told_by(lambda: Hub(MEMBER).files(REPO))


def test_token_that_is_none_is_not_quoted(server: HubServer) -> None:
    for token in ("hf_secret\x00more", "hf_secretß", "hf secret"):
        with pytest.raises(SourceError) as caught:
            Hub(token).files(REPO)
        assert "secret" not in f"{caught.value!r} {caught.value.__cause__!r}"
    assert not server.requests


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_stored_token_that_cannot_be_read_is_named(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None
) -> None:
    from huggingface_hub import constants

    stored = tmp_path / "token"
    stored.mkdir() if content is None else stored.write_bytes(content)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(stored))
    told = told_by(lambda: Hub().files(REPO))
    assert "access token cannot be read" in told and f"found {stored}: " in told and "set HF_TOKEN" in told
    monkeypatch.setenv("HF_TOKEN", MEMBER)
    assert Hub().files(REPO)


def test_token_goes_to_the_hub_and_not_to_the_storage(server: HubServer) -> None:
    hub_ = Hub(MEMBER)
    files = hub_.files(REPO)
    hub_.header(files[BIG])
    hub_.fetch(files[BIG])
    hub_.fetch(files[SMALL])
    tokens = {(request.host.split(":")[0], request.token) for request in server.requests}
    assert tokens == {("127.0.0.1", MEMBER), ("localhost", None)}


def test_revision_not_found_and_file_that_is_gone(server: HubServer, files: Listing) -> None:
    told = told_by(lambda: Hub().files(REPO, "v9"))
    assert "no such revision" in told and f"{REPO}@v9" in told
    del server.commits[REPO]["main"].files[BIG]
    for call in (Hub().header, Hub().fetch):
        assert "no such file" in told_by(lambda call=call: call(files[BIG]))


@pytest.mark.parametrize("status", [500, 503, 429])
def test_passing_trouble_is_tried_again(server: HubServer, status: int) -> None:
    server.faults.statuses = [status, status]
    assert Hub().files(REPO)
    assert [request.status for request in server.requests][:3] == [status, status, 200]


def test_password_in_the_endpoint_is_not_shown(server: HubServer, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    use_endpoint(monkeypatch, server.endpoint.replace("//", "//me:secret@"), cache)
    monkeypatch.setattr(hub.time, "sleep", lambda _: None)
    server.tokens.add(f"Basic {base64.b64encode(b'me:secret').decode()}")
    hub_ = Hub(reporter=(reporter := Notes()))
    file = hub_.files(REPO)[BIG]
    for status in (403, 404, 503):
        server.faults.always, server.faults.after = status, {"Retry-After": "11"}
        for call in (lambda: hub_.files(REPO), lambda: hub_.header(file)):
            assert "secret" not in told_by(call)
    assert reporter.notes and "secret" not in str(reporter.said)


def test_lasting_trouble_is_told_after_some_tries(server: HubServer) -> None:
    server.faults.always = 503
    told = told_by(lambda: Hub().files(REPO), HubUnreachable)
    assert "HTTP 503" in told and "HF_HUB_OFFLINE=1" in told
    assert len(server.requests) == 4


@pytest.mark.parametrize("after", ["17", "Thu, 01 Jan 1970 00:01:17 GMT"])
def test_rate_limit_says_how_long(server: HubServer, monkeypatch: pytest.MonkeyPatch, after: str) -> None:
    waits: list[float] = []
    monkeypatch.setattr(hub, "time", mock.Mock(sleep=waits.append))
    monkeypatch.setattr(hub_errors, "time", mock.Mock(time=lambda: 60.0))
    server.faults.always, server.faults.after = 429, {"Retry-After": after}
    assert "wait 17 s" in told_by(lambda: Hub().files(REPO), HubUnreachable)
    assert waits == [17.0] * 3


def test_a_long_wait_in_a_download_is_told_once(
    server: HubServer, files: Listing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar stood still for minutes without a word."""
    monkeypatch.setattr(hub_transfer, "WAITS", (0.0,) * 5)
    monkeypatch.setattr(hub_transfer, "asked_wait", lambda _: 0.01)

    def limited(data: bytes) -> bytes:
        server.faults.statuses, server.faults.body = [429, 429], lambda data: data
        return data

    server.faults.drops, server.faults.body = [1000], limited
    assert Hub(reporter=(reporter := Notes())).fetch(files[BIG]).read_bytes() == FILES[BIG]
    assert [note.partition(": ")[2] for note in reporter.notes] == ["the server asks to wait, trying again in 0 s"]


def test_answer_of_something_else_than_a_hub(server: HubServer) -> None:
    for answer in ([], {"id": 1}, "text", {"id": REPO, "sha": "0" * 40}, {"id": REPO, "siblings": []}):
        server.faults.listing = lambda _, answer=answer: answer
        assert "cannot be used" in told_by(lambda: Hub().files(REPO))


def test_answer_that_cannot_be_decoded(server: HubServer, files: Listing) -> None:
    server.faults.metadata = {"Content-Encoding": "gzip"}
    assert "cannot be decoded" in told_by(lambda: Hub().fetch(files[SMALL]), HubUnreachable)


def one_file(**change: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def listing(stated: dict[str, Any]) -> dict[str, Any]:
        file = {"rfilename": "a.bin", "size": 1, "lfs": {"sha256": "0" * 64, "size": 1, "pointerSize": 1}}
        return {**stated, "siblings": [{**file, **change}]}

    return listing


HOSTILE_NAMES = ["../x", "/etc/x", "a/../../x", "a//b", "./x", "", "..", "a\\..\\x", "a\nb", "a\x00", "\x1b[2J", "x/",
                 "../\u202fx", "n" * 300, "a/" * 600 + "b", 7, None, ["a"]]  # fmt: skip
UNSEEN_NAMES = ["\u202egpj.exe", "Screenshot at 3.45\u202fPM.png", "a/\u200d.png"]
HOSTILE_SIZES = [-1, 2**63, 1.0, "1", None, True]
HOSTILE_HASHES = ["", "../../x", "0" * 63, "Z" * 64, 5, None]


HOSTILE = (
    *(one_file(rfilename=name) for name in HOSTILE_NAMES),
    *(one_file(size=size, lfs=None) for size in HOSTILE_SIZES),
    *(one_file(size=size, lfs={"sha256": "0" * 64, "size": size, "pointerSize": 1}) for size in HOSTILE_SIZES),
    *(one_file(lfs={"sha256": value, "size": 1, "pointerSize": 1}) for value in HOSTILE_HASHES),
    *(one_file(size=2), one_file(lfs={"size": 1}), one_file(lfs=[1])),
    lambda stated: {**stated, "siblings": stated["siblings"] * 2},
    *(
        lambda stated, sha=sha: {**stated, "sha": sha, "siblings": []}
        for sha in ["../..", "", None, "main", 5, "A" * 40]
    ),
)


def test_hostile_listings_are_refused(server: HubServer, cache: Path) -> None:
    listing = server.faults.listing
    for hostile in HOSTILE:
        server.faults.listing = hostile
        told = told_by(lambda: Hub().files(REPO))
        assert set(told) - {"\n"} <= set(filter(str.isprintable, told))
    server.faults.listing = listing
    assert Hub().files(REPO) and not server.sent()
    assert not cache.exists() or not any(path.is_file() for path in cache.rglob("*"))


def test_names_that_could_upset_a_terminal_are_left_out(server: HubServer, files: Listing) -> None:
    odd = [sibling for name in UNSEEN_NAMES for sibling in one_file(rfilename=name)({})["siblings"]]
    server.faults.listing = lambda stated: {**stated, "siblings": [*odd, *stated["siblings"]]}
    assert Hub().files(REPO) == files and files.keys() == FILES.keys()


def test_file_that_is_not_the_listed_one_is_refused(server: HubServer, files: Listing, cache: Path) -> None:
    for metadata in (
        {"X-Linked-Etag": '"../../../../x"'}, {"X-Linked-Etag": f'"{"1" * 64}"'}, {"X-Linked-Etag": '""', "ETag": '""'},
        {"X-Linked-Size": "5"}, {"X-Repo-Commit": "1" * 40}, {"X-Repo-Commit": "../.."}, {"Location": "http://["},
        {"Location": "http://storage:99999/"},
    ):  # fmt: skip
        server.faults.metadata = metadata
        told_by(lambda: Hub().fetch(files[BIG]))
        told_by(lambda: Hub().header(files[BIG]))
        told_by(lambda: Hub().files(REPO))
    assert not server.sent()
    assert not blobs(cache)


# Downloads


@pytest.mark.parametrize("name", FILES)
def test_fetch_puts_the_file_into_the_hub_cache(server: HubServer, files: Listing, cache: Path, name: str) -> None:
    path = Hub(reporter=(reporter := Notes())).fetch(files[name])
    assert path == cache / "models--Lightricks--LTX-2.3" / "snapshots" / commit_of(files) / name
    assert path.read_bytes() == FILES[name]
    git = hashlib.sha1(b"blob %d\0" % len(FILES[name]) + FILES[name]).hexdigest()
    assert path.resolve() == cache / "models--Lightricks--LTX-2.3" / "blobs" / (files[name].sha256 or git)
    assert reporter.phases == [[f"{REPO}/{name}", "B", len(FILES[name]), len(FILES[name])]]
    assert server.sent() == len(FILES[name])


def test_blob_of_another_revision_is_linked_not_downloaded(serve: Callable[..., HubServer]) -> None:
    server = serve({REPO: FILES}, revisions={REPO: {"v1": {BIG: FILES[BIG]}}})
    hub_ = Hub()
    one = hub_.fetch(hub_.files(REPO)[BIG])
    sent = server.sent()
    two = hub_.fetch(hub_.files(REPO, "v1")[BIG])
    assert one != two
    assert one.resolve() == two.resolve()
    assert server.sent() == sent


@pytest.mark.parametrize("name", [BIG, "sub/notes.txt"])
def test_dropped_connection_is_taken_up_where_it_broke(server: HubServer, files: Listing, name: str) -> None:
    size = len(FILES[name])
    half = size // 2
    server.faults.drops = [half]
    assert Hub(reporter=(reporter := Notes())).fetch(files[name]).read_bytes() == FILES[name]
    assert [(r.range, r.sent) for r in server.content_requests()] == [
        (None, half),
        (f"bytes={half}-{size - 1}", size - half),
    ]
    assert reporter.advanced == size


def test_download_in_pieces_survives_many_drops(
    server: HubServer, files: Listing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_transfer, "PIECE", 50_000)
    server.faults.drops = [10_000, 0, 49_999, 1, 30_000]
    assert Hub(reporter=(reporter := Notes())).fetch(files[BIG]).read_bytes() == FILES[BIG]
    assert server.sent() == reporter.advanced == len(FILES[BIG])


def test_next_run_goes_on_where_the_last_one_broke_off(server: HubServer, files: Listing, cache: Path) -> None:
    size, half = len(FILES[BIG]), 400_000
    server.faults.drops = [half] + [0] * 5
    told = told_by(lambda: Hub().fetch(files[BIG]), HubUnreachable)
    assert f"expected {size} bytes, found {half} bytes" in told
    assert "it goes on from there" in told
    (partial,) = blobs(cache).items()
    assert partial == (f"{files[BIG].sha256}.ltxpack.incomplete", FILES[BIG][:half])

    before = len(server.content_requests())
    assert Hub(reporter=(reporter := Notes())).fetch(files[BIG]).read_bytes() == FILES[BIG]
    (rest,) = server.content_requests()[before:]
    assert (rest.range, rest.sent) == (f"bytes={half}-{size - 1}", size - half)
    assert reporter.advanced == size
    assert set(blobs(cache)) == {files[BIG].sha256}


def test_ctrl_c_keeps_what_came(
    server: HubServer, files: Listing, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_transfer, "PIECE", 50_000)
    monkeypatch.setattr(hub_transfer, "POLL_SECONDS", 0.005)
    sent, interrupted = itertools.count(), threading.Event()

    def held(data: bytes) -> bytes:
        """Six pieces come before the interrupt, and those that were asked for after it."""
        assert next(sent) < 6 or interrupted.wait(HANG)
        return data

    class Impatient(Notes):
        def advance(self, amount: int = 1) -> None:
            super().advance(amount)
            if self.advanced > 200_000:
                interrupted.set()
                raise KeyboardInterrupt

    server.faults.body = held
    with pytest.raises(KeyboardInterrupt):
        Hub(reporter=Impatient()).fetch(files[BIG])
    (kept,) = blobs(cache).values()
    assert 0 < len(kept) < len(FILES[BIG])
    assert FILES[BIG].startswith(kept)
    server.faults.body = lambda data: data
    before = len(server.content_requests())  # of the first one, one may still be writing to a closed connection
    assert Hub().fetch(files[BIG]).read_bytes() == FILES[BIG]
    assert server.sent(since=before) == len(FILES[BIG]) - len(kept)


def test_killed_process_goes_on(server: HubServer, files: Listing, cache: Path) -> None:
    """SIGKILL in the middle: what the partial file holds is a prefix, and the next process asks for the rest."""
    killed = threading.Event()

    def held(data: bytes) -> bytes:
        """What comes behind the first pieces is sent when nobody wants it any more."""
        assert FILES[BIG].index(data) < 240_000 or killed.wait(HANG)
        return data

    server.faults.body = held
    script = (
        "from ltxpack.materialize.hub import client, transfer; transfer.PIECE = 60_000; transfer.CONNECTIONS = 2;"
        f"h = client.Hub(); h.fetch(h.files({REPO!r})[{BIG!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", script], env=server.environment(cache))
    until(lambda: sum(map(len, blobs(cache).values())) >= 120_000)
    process.kill()
    process.wait()
    killed.set()
    (kept,) = blobs(cache).values()
    assert 120_000 <= len(kept) < len(FILES[BIG])
    assert FILES[BIG].startswith(kept)
    server.faults.body = lambda data: data
    assert Hub().fetch(files[BIG]).read_bytes() == FILES[BIG]
    # The server may come to a piece that the killed process asked for only now; those have 60,000 bytes.
    sent = {request.range: request.sent for request in server.content_requests()}
    assert sent[f"bytes={len(kept)}-{len(FILES[BIG]) - 1}"] == len(FILES[BIG]) - len(kept)


def test_expired_link_is_asked_for_anew(server: HubServer, files: Listing) -> None:
    server.faults.drops = [200_000]

    def expire(data: bytes) -> bytes:
        server.signature = 2
        return data

    server.faults.body = expire
    assert Hub().fetch(files[BIG]).read_bytes() == FILES[BIG]
    assert [r.status for r in server.content_requests()] == [200, 403, 206]


@pytest.mark.parametrize("after", [{}, {"Content-Length": "", "Connection": "close", "Content-Type": "text/html"}])
def test_page_of_the_network_in_between_costs_nothing(
    server: HubServer, files: Listing, cache: Path, after: dict[str, str]
) -> None:
    """A login page answers with status 200, first in place of the file's start, then in place of its rest."""
    whole, same, server.faults.after = FILES[BIG], server.faults.body, after

    def page(data: bytes) -> bytes:
        server.faults.statuses, server.faults.body = [200], same
        return data

    hub_ = Hub()
    remote = hub_._remote(files[BIG], hub_._locate(files[BIG])[0])
    server.faults.statuses, server.faults.drops, server.faults.body = [200], [300_000], page
    assert remote.read(0, len(whole)) == whole
    assert server.sent() == len(whole)

    def pages(data: bytes) -> bytes:
        server.faults.always = 200
        return data

    server.faults.drops, server.faults.body = [1000], pages
    told = told_by(lambda: hub_.fetch(files[BIG]), HubUnreachable)
    assert "found 1000 bytes, which are kept (an answer of another size" in told
    assert list(blobs(cache).values()) == [whole[:1000]]


def test_storage_that_refuses_or_fails_is_named(server: HubServer, files: Listing) -> None:
    """Firewalls let requests to the hub pass and bar its storage: no token would help."""
    storage = server.endpoint.replace("127.0.0.1", "localhost")
    server.faults.metadata = {"Location": f"{storage}/storage/{files[BIG].sha256}?signature=0"}
    for call in (Hub().fetch, Hub().header):
        told = told_by(lambda call=call: call(files[BIG]))
        assert f"bars {storage}" in told and f"HTTP 403 from {storage}" in told and "token" not in told
    server.faults.metadata, server.faults.drops = {}, [0] * 6
    assert f"({storage}: the connection broke)" in told_by(lambda: Hub().fetch(files[BIG]))


def test_licence_withdrawn_on_the_way(server: HubServer, cache: Path) -> None:
    """The link expires and no new one is given: the error is the hub's, and what came is kept."""
    files = Hub(MEMBER).files(GATED)
    server.faults.drops = [300_000]

    def withdraw(data: bytes) -> bytes:
        server.tokens.discard(MEMBER)
        server.signature = 2
        return data

    server.faults.body = withdraw
    assert "refuses the access token" in told_by(lambda: Hub(MEMBER).fetch(files[BIG]))
    assert list(blobs(cache, GATED).values()) == [FILES[BIG][:300_000]]


def test_file_changed_on_the_way_is_refused(server: HubServer, files: Listing) -> None:
    """A new link is for another file than was listed: an error at once, whatever failed before."""

    def change(data: bytes) -> bytes:
        server.faults.metadata = {"X-Linked-Size": "5"}
        server.signature += 1
        return data

    for call in (Hub().fetch, Hub().header):
        server.faults.drops, server.faults.body, server.faults.metadata = [4, 4], change, {}
        assert "another file than was listed" in told_by(lambda call=call: call(files[BIG]))


@pytest.mark.parametrize(
    ("name", "algorithm", "ranges"), [(BIG, "sha256", True), (BIG, "sha256", False), (SMALL, "sha1", True)]
)
def test_altered_content_is_refused(
    server: HubServer, files: Listing, cache: Path, name: str, algorithm: str, ranges: bool
) -> None:
    server.faults.ranges, server.faults.drops = ranges, [] if ranges else [300_000]
    server.faults.body = lambda data: data[:-1] + bytes([data[-1] ^ 1])
    told = told_by(lambda: Hub().fetch(files[name]))
    assert "not what the hub states" in told and algorithm in told
    assert not blobs(cache)
    server.faults.body = lambda data: data
    assert Hub().fetch(files[name]).read_bytes() == FILES[name]


def test_server_without_ranges_is_downloaded_in_one_go(server: HubServer, files: Listing, cache: Path) -> None:
    server.faults.ranges = False
    server.faults.drops = [300_000]
    assert Hub().fetch(files[BIG]).read_bytes() == FILES[BIG]
    assert set(blobs(cache)) == {files[BIG].sha256}


def test_one_answer_that_ignores_the_range_costs_nothing(server: HubServer, files: Listing) -> None:
    """As of a proxy's cache. What had come of the file was thrown away."""
    hub_ = Hub()
    remote = hub_._remote(files[BIG], hub_._locate(files[BIG])[0])

    def next_time(data: bytes) -> bytes:
        server.faults.ranges = not server.faults.ranges
        return data

    server.faults.drops, server.faults.body = [1000, 1000], next_time
    assert remote.read(500, len(FILES[BIG])) == FILES[BIG][500:]
    assert [request.status for request in server.content_requests()] == [206, 200, 206]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x"])
def test_cached_file_of_another_size_is_refused(files: Listing, damage: Callable[[bytes], bytes]) -> None:
    hub_ = Hub()
    blob = hub_.fetch(files[BIG]).resolve()
    blob.write_bytes(damage(FILES[BIG]))
    for call in (hub_.fetch, hub_.header):
        told = told_by(lambda call=call: call(files[BIG]))
        assert f"expected {len(FILES[BIG])} bytes" in told
        assert f"delete {blob}" in told
    blob.unlink()
    assert hub_.fetch(files[BIG]).read_bytes() == FILES[BIG]


def test_no_room_in_the_cache_is_told_before_the_download(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Hub().files(REPO)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: mock.Mock(free=1000))
    told = told_by(lambda: Hub().fetch(files[BIG]))
    assert "disk of the hub cache is full" in told
    assert "HF_HUB_CACHE" in told
    assert not server.sent()


def test_disk_that_fills_up_on_the_way_keeps_what_came(
    server: HubServer, files: Listing, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_transfer.os, "fsync", mock.Mock(side_effect=OSError(28, "No space left on device")))
    assert "disk of the hub cache is full" in told_by(lambda: Hub().fetch(files[BIG]))
    monkeypatch.setattr(hub_errors, "lacks_inodes", lambda _: True)
    assert "no inodes left" in told_by(lambda: Hub().fetch(files[BIG]))
    assert list(blobs(cache)) == [f"{files[BIG].sha256}.ltxpack.incomplete"]


def test_cache_that_cannot_be_written(server: HubServer, files: Listing, cache: Path) -> None:
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file where the folder should be")
    assert "hub cache cannot be used" in told_by(lambda: Hub().fetch(files[BIG]))


@pytest.mark.parametrize("links", [True, False])
def test_two_at_once_download_once(
    server: HubServer, files: Listing, cache: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", not links)
    told = threading.Event()

    def held(data: bytes) -> bytes:
        assert told.wait(HANG)
        return data

    class Waiting(Notes):
        def note(self, message: str) -> None:
            super().note(message)
            if "another process" in message:
                told.set()

    server.faults.body = held
    reporters = [Waiting(), Waiting()]
    with ThreadPoolExecutor(2) as threads:
        one, two = threads.map(lambda reporter: Hub(reporter=reporter).fetch(files[BIG]), reporters)
    assert one == two
    assert one.read_bytes() == FILES[BIG]
    assert server.sent() == len(FILES[BIG])
    held_in = [path for path in cache.rglob("*") if path.lstat().st_size == len(FILES[BIG])]
    assert held_in == [one.resolve()] and one.is_symlink() == links


# Headers


def test_header_moves_the_header_only(serve: Callable[..., HubServer], tmp_path: Path) -> None:
    """A sparse file of 50 GB: length and JSON are all that is sent."""
    size = 50 * 10**9
    whole = safetensors(0)
    header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    sparse = tmp_path / "sparse.safetensors"
    with sparse.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + size)
    server = serve({REPO: {BIG: sparse, "none.safetensors": whole}})
    hub_ = Hub()
    files = hub_.files(REPO)
    assert files[BIG].size == 8 + len(header) + size
    assert hub_.header(files[BIG]) == len(header).to_bytes(8, "little") + header
    assert server.sent() == 8 + 8 + len(header)
    assert hub_.header(files["none.safetensors"]) == whole


def test_second_fetch_and_the_header_of_a_cached_file_move_nothing(server: HubServer, files: Listing) -> None:
    remote = Hub().header(files[BIG])
    assert len(remote) == 8 + int.from_bytes(FILES[BIG][:8], "little")
    first = Hub().fetch(files[BIG])
    before = len(server.requests)
    assert Hub().fetch(files[BIG]) == first
    assert Hub().header(files[BIG]) == remote == FILES[BIG][: len(remote)]
    assert len(server.requests) == before


def test_header_without_ranges_stops_early(serve: Callable[..., HubServer]) -> None:
    content = safetensors(30_000_000)
    server = serve({REPO: {BIG: content}})
    server.faults.ranges = False
    hub_ = Hub()
    files = hub_.files(REPO)
    assert content.startswith(hub_.header(files[BIG]))
    assert server.sent() < len(content)


def test_header_survives_a_drop(server: HubServer, files: Listing) -> None:
    server.faults.drops = [3, 20]
    header = Hub().header(files[BIG])
    assert FILES[BIG].startswith(header)
    assert len(header) > 20


def test_header_of_what_is_not_safetensors(serve: Callable[..., HubServer]) -> None:
    lengths = [(17 << 20).to_bytes(8, "little"), (100).to_bytes(8, "little")]
    contents = [b"", b"1234567", *(length + b"{}" for length in lengths), b"PK\x03\x04" * 9]
    server = serve({REPO: {f"{number}.safetensors": content for number, content in enumerate(contents)}})
    hub_ = Hub()
    files = hub_.files(REPO)
    for name in files:
        assert name in told_by(lambda name=name: hub_.header(files[name]), FormatError)
    assert all(request.sent <= 8 for request in server.content_requests())


# Without a network


@pytest.fixture
def filled(server: HubServer) -> HubServer:
    """The cache holds two files of main and one of v1."""
    hub_ = Hub()
    files = hub_.files(REPO)
    hub_.fetch(files[BIG])
    hub_.fetch(files["sub/notes.txt"])
    hub_.fetch(hub_.files(REPO, "v1")[SMALL])
    server.requests.clear()
    return server


def test_offline_mode_works_from_the_cache(filled: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(monkeypatch)
    hub_ = Hub()
    files = hub_.files(REPO)
    assert commit_of(files) == filled.commit(REPO)
    assert stated(files) == {BIG: (len(FILES[BIG]), hashlib.sha256(FILES[BIG]).hexdigest()), "sub/notes.txt": (6, None)}
    assert hub_.fetch(files[BIG]).read_bytes() == FILES[BIG]
    assert FILES[BIG].startswith(hub_.header(files[BIG]))
    for revision in (commit_of(files), "main"):
        assert stated(hub_.files(REPO, revision)) == stated(files)
    assert set(hub_.files(REPO, "v1")) == {SMALL}
    assert not filled.requests


def test_offline_mode_says_what_is_missing(filled: HubServer, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    hub_ = Hub()
    gone = hub_.files(REPO)
    filled.requests.clear()
    go_offline(monkeypatch)
    for call in (
        lambda: hub_.files("nobody/nothing"),
        lambda: hub_.files(REPO, "v9"),
        lambda: hub_.files(REPO, "1" * 40),
        lambda: hub_.fetch(gone[SMALL]),
        lambda: hub_.header(gone[SMALL]),
    ):
        told = told_by(call)
        assert all(words in told for words in ("not in the hub cache", "HF_HUB_OFFLINE", str(cache)))
    assert not filled.requests


def test_offline_mode_names_a_cache_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    use_endpoint(monkeypatch, "http://hub.test", cache.parent / ("x" * 300))
    go_offline(monkeypatch)
    assert "hub cache cannot be used" in told_by(lambda: Hub().files(REPO, "1" * 40))


def test_library_finds_what_we_cached(filled: HubServer, cache: Path) -> None:
    """The cache we fill is huggingface_hub's: it finds the file under the branch's name, and no fault in the cache."""
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    assert try_to_load_from_cache(REPO, BIG, cache_dir=cache, revision="main") is not None
    scanned = scan_cache_dir(cache)
    assert not scanned.warnings
    (repo,) = scanned.repos
    assert {ref for revision in repo.revisions for ref in revision.refs} == {"main", "v1"}


@pytest.fixture
def closed_port() -> Iterator[str]:
    """An address that refuses connections, and is nobody else's meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_no_network_is_told_at_once(monkeypatch: pytest.MonkeyPatch, cache: Path, closed_port: str) -> None:
    use_endpoint(monkeypatch, closed_port, cache)
    waits: list[float] = []
    monkeypatch.setattr(hub.time, "sleep", waits.append)
    told = told_by(lambda: Hub().files(REPO), HubUnreachable)
    assert not waits, "it is not tried again"
    assert all(words in told for words in ("cannot be reached", "Connection refused", "HF_HUB_OFFLINE=1"))


@pytest.mark.parametrize("network", [True, False])
def test_without_a_hub_it_works_from_the_cache(
    network: bool, filled: HubServer, monkeypatch: pytest.MonkeyPatch, cache: Path, closed_port: str
) -> None:
    filled.faults.always = 502
    if not network:
        use_endpoint(monkeypatch, closed_port, cache)
    hub_ = Hub(reporter=(reporter := Notes()))
    files = hub_.files(REPO)
    assert files.keys() == {BIG, "sub/notes.txt"} and commit_of(files) in reporter.warnings[0]
    assert hub_.fetch(files[BIG]).read_bytes() == FILES[BIG]


def test_network_lost_after_the_listing(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, cache: Path, closed_port: str
) -> None:
    files = Hub().files(REPO)
    use_endpoint(monkeypatch, closed_port, cache)
    for call in (Hub().fetch, Hub().header):
        assert "cannot be reached" in told_by(lambda call=call: call(files[BIG]), HubUnreachable)


def test_shared_blob_store_does_not_lend_its_names(
    filled: HubServer, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """huggingface_hub can keep a blob as a link into a store named by another hash: that is not the sha256."""
    sha256 = hashlib.sha256(FILES[BIG]).hexdigest()
    blob = cache / "models--Lightricks--LTX-2.3" / "blobs" / sha256
    stored = cache / "blobs" / "ab" / ("ab" * 32)
    stored.parent.mkdir(parents=True)
    blob.rename(stored)
    blob.symlink_to(os.path.relpath(stored, blob.parent))
    go_offline(monkeypatch)
    files = Hub().files(REPO)
    assert files[BIG].sha256 == sha256
    assert Hub().fetch(files[BIG]).resolve() == stored


def test_damaged_refs_are_not_followed(filled: HubServer, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    go_offline(monkeypatch)
    for text in ("../../..", "", "\xff\xfe", "1" * 40):
        (cache / "models--Lightricks--LTX-2.3" / "refs" / "main").write_text(text, encoding="latin-1")
        told_by(lambda: Hub().files(REPO))


def test_environment_variables_reach_another_process(server: HubServer, cache: Path) -> None:
    """Endpoint, cache and token as a user sets them, and nothing about the hub imported before it is used."""
    script = (
        "import sys, ltxpack.materialize.hub.client as hub\n"
        "assert not {'huggingface_hub', 'httpx', 'torch'} & set(sys.modules)\n"
        "h = hub.Hub(); file = h.files('me/private')['config.json']; print(h.fetch(file).read_bytes() , file.commit)"
    )
    command, environment = [sys.executable, "-c", script], server.environment(cache, HF_TOKEN=MEMBER)
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == server.commit("me/private")
    assert not run.stderr
    assert blobs(cache, "me/private")


# References


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (REPO, (REPO, None, None)),
        (f"{REPO}@main", (REPO, "main", None)),
        (f"{REPO}/a.safetensors", (REPO, None, "a.safetensors")),
        (f"{REPO}/sub/a@b.safetensors", (REPO, None, "sub/a@b.safetensors")),
        (f"{REPO}@{'0' * 40}/sub/a.safetensors", (REPO, "0" * 40, "sub/a.safetensors")),
        (f"{REPO}@refs/pr/12", (REPO, "refs/pr/12", None)),
        (f"{REPO}@refs/pr/12/sub/a.safetensors", (REPO, "refs/pr/12", "sub/a.safetensors")),
        (f"{REPO}@feature%2Fx/a.safetensors", (REPO, "feature/x", "a.safetensors")),
    ],
)
def test_reference(text: str, expected: tuple[str, str | None, str | None]) -> None:
    assert parse_reference(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "gpt2", "a/", "/a/b", "a//b", "a/b/", "a/b@", "a/b@/c", "../a", "a/..", "a/b/../c", "a/b@../c", "a/b@x..y",
     "a/b@-x", "a/b@%2e%2e", "a/b@x%00y", "a/b@x y", "a--b/c", "a/b.git", "a/b c", "a/b\n", "a/b/c\x1b", "ä/b",
     "a/" + "b" * 97, "a/b@" + "c" * 300, f"a/b/{'c' * 300}",
     f"https://hub.test/{REPO}/tree/main"],
)  # fmt: skip
def test_reference_refused(text: str) -> None:
    told = told_by(lambda: parse_reference(text), UsageError)
    assert "://" not in text or f"write {REPO}\n" in f"{told}\n"


def test_listing_checks_its_arguments(server: HubServer) -> None:
    for place in (("gpt2", None), ("a/b/c", None), ("a/..", None), (REPO, "../x"), (REPO, "")):
        told_by(lambda place=place: Hub().files(*place), UsageError)
    assert not server.requests


@given(st.text(alphabet=st.sampled_from("ab.-_@/%2F\\ \x00~"), max_size=30))
def test_any_reference_is_refused_or_safe(text: str) -> None:
    try:
        repo, revision, file = parse_reference(text)
    except UsageError:
        return
    assert repo.count("/") == 1
    for part in (repo, revision, file):
        assert part is None or is_safe_name(part)


@given(st.text(max_size=40) | st.text(alphabet=st.sampled_from("./\\a\x00"), max_size=12))
def test_safe_names_stay_in_their_folder(name: str) -> None:
    if is_safe_name(name):
        root = Path("/somewhere/root")
        joined = Path(os.path.normpath(root / name))
        assert joined != root
        assert joined.is_relative_to(root)
        assert joined == root / name
