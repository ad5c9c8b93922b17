"""Variables that would stop a library: named, repaired, or left out where the command does not need them."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer, use_endpoint
from support import Done, Notes, in_fresh_process, ltxpack, refused

from ltxpack.files.environment import NETWORK, network_fault, set_aside
from ltxpack.materialize.hub.client import Hub

REPO = "me/files"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variable of this machine, and no HTTP client made with those of another test."""
    import huggingface_hub

    for name in list(os.environ):
        if name.upper() in NETWORK:
            monkeypatch.delenv(name)
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer({REPO: {"config.json": b"{}"}}) as made:
        made.use(monkeypatch, tmp_path / "cache")
        yield made


def planned(tmp_path: Path) -> Done:
    return ltxpack("materialize", REPO, tmp_path / "out", "--plan")


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("HTTPS_PROXY", "proxy:abc", "Invalid port"),
        ("https_proxy", "http://me:secret@[::1", "Invalid port"),
        ("ALL_PROXY", "ftp://me:secret@proxy", "Unknown scheme"),
        ("SSL_CERT_FILE", "/nowhere", "No such file"),
        ("SSL_CERT_FILE", __file__, "no certificate"),
        ("SSL_CERT_FILE", "/", "Is a directory"),
    ],
)
def test_what_no_client_can_be_made_with_is_named(
    name: str, value: str, why: str, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("HTTP_PROXY", "http://sound:80")
    told = refused(planned(tmp_path), 1)
    assert f"{name} cannot be used" in told and why in told and "secret" not in told
    assert f"correct {name} or unset it" in told
    assert not server.requests and os.environ[name] == value


@pytest.mark.parametrize(
    ("endpoint", "better"),
    [
        ("hub.example.org", "HF_ENDPOINT=https://hub.example.org,"),
        ("ftp://hub.example.org", "HF_ENDPOINT=https://HOST"),
        ("https://hub:port", "HF_ENDPOINT=https://HOST"),
        ("https://[::1", "HF_ENDPOINT=https://HOST"),
        ("my hub", "HF_ENDPOINT=https://HOST"),
    ],
)
def test_an_endpoint_that_is_no_address(
    endpoint: str, better: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_endpoint(monkeypatch, endpoint, tmp_path / "cache")
    told = refused(planned(tmp_path), 1)
    assert "HF_ENDPOINT cannot be used: not an address" in told and better in told


def test_entries_of_no_proxy_that_httpx_does_not_take_are_left_out(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,[::1], fe80::/10 ,.example.org")
    notes = Notes()
    assert Hub(reporter=notes).files(REPO).keys() == {"config.json"}
    assert os.environ["NO_PROXY"] == "127.0.0.1,.example.org"
    (warning,) = notes.warnings
    assert warning.startswith("NO_PROXY: '[::1], fe80::/10'")


def test_offline_no_variable_of_the_network_is_looked_at(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    Hub().fetch(Hub().files(REPO)["config.json"])
    for name in ("HTTPS_PROXY", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, "nowhere:abc")
    notes = Notes()
    # The cache serves where the network cannot, and the variable is told.
    assert Hub(reporter=notes).files(REPO)
    assert "HTTPS_PROXY cannot be used" in notes.warnings[0]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Hub(reporter=(silent := Notes())).files(REPO)
    assert not silent.said


def test_a_socks_proxy_without_its_package_names_it(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpcore  # noqa: F401  (it looks for the package when it is imported)

    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "socksio", None)
    told = refused(planned(tmp_path), 1)
    assert "ALL_PROXY" in told and "pip install socksio" in told


@contextlib.contextmanager
def socks_proxy() -> Iterator[tuple[int, list[bytes]]]:
    """A SOCKS5 proxy that connects wherever it is asked to; its port, and the addresses that were asked for."""
    asked: list[bytes] = []

    def relay(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve(client: socket.socket) -> None:
        client.recv(262)
        client.sendall(b"\x05\x00")
        request = client.recv(262)
        host = request[4:8] if request[3] == 1 else request[5 : 5 + request[4]]
        asked.append(host)
        port = int.from_bytes(request[-2:], "big")
        target = socket.create_connection((socket.inet_ntoa(host) if request[3] == 1 else host.decode(), port))
        with client, target:
            client.sendall(b"\x05\x00\x00\x01" + bytes(6))
            threading.Thread(target=relay, args=(target, client), daemon=True).start()
            relay(client, target)

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1], asked


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "socks"])
def test_a_socks_proxy_is_used(scheme: str, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("socksio")
    with socks_proxy() as (port, asked):
        monkeypatch.setenv("ALL_PROXY", f"{scheme}://127.0.0.1:{port}")
        assert Hub().fetch(Hub().files(REPO)["config.json"]).read_bytes() == b"{}"
    assert asked


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("HF_HUB_ETAG_TIMEOUT", "abc", "whole number"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "10.5", "whole number"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "-1", "whole number"),
        ("HF_HUB_ETAG_TIMEOUT", "9" * 30, "whole number"),
        ("DIFFUSERS_TIMEOUT_REMOTE_CODE", "10s", "whole number"),
        ("TQDM_MININTERVAL", "often", "a number"),
        ("TQDM_NCOLS", "1.5", "whole number"),
        ("HF_ENDPOINT", "https://[::1", "an address"),
    ],
)
def test_what_stops_an_import_is_left_out_and_told(
    name: str, value: str, wanted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(name, value)
    told = ltxpack("verify", tmp_path).stderr
    assert told.count("warning: ") == 1 and name in told and wanted in told and value[:20] in told
    assert name not in os.environ


def test_sound_values_stay_and_empty_ones_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("HF_HUB_ETAG_TIMEOUT", " 20 "), ("TQDM_MININTERVAL", "0.5"), ("HF_ENDPOINT", "https://x")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "")
    assert set_aside() == []
    assert os.environ["HF_HUB_ETAG_TIMEOUT"] == " 20 " and "HF_HUB_DOWNLOAD_TIMEOUT" not in os.environ
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:8080")
    assert network_fault(pytest.fail) is None


def test_the_libraries_import_with_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT", "TQDM_MININTERVAL", "TQDM_NROWS"):
        monkeypatch.setenv(name, "abc")
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")
    code = """
    import sys
    from ltxpack.cli import cli
    try:
        cli.main(["verify", sys.argv[1]], standalone_mode=False)
    except Exception as error:
        import tqdm
        from huggingface_hub import constants
        answer = [type(error).__name__, constants.HF_HUB_ETAG_TIMEOUT]
    """
    assert in_fresh_process(code, tmp_path)[0] == ["OverlayError", 10]
