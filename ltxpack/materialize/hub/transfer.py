"""Moves the bytes of one hub file by HTTP range requests: a prefix into memory, or the whole into a partial file.

In a new process huggingface_hub starts a broken download again from the first byte. Here the partial file always holds
a prefix of the real one, so that a later run asks only for the rest. Several connections fill it in order, and the
content is hashed as it passes. Knows no repositories, caches or tokens: a callable gives the address.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from ltxpack.errors import SourceError
from ltxpack.materialize.hub.errors import OtherAnswerError, asked_wait, is_passing, status_of
from ltxpack.reporter import Reporter

if TYPE_CHECKING:
    import httpx

PIECE = 8 << 20
CONNECTIONS = 8
WINDOW = 10  # most pieces requested at a time: a download takes this many times PIECE of memory
PROGRESS = 256 << 10  # a try that brings this much does not count as a failure
POLL_SECONDS = 0.25
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
ADDRESS_EXPIRED = frozenset({401, 403})


class RangesIgnoredError(Exception):
    """The server ignores ranges and sends the whole file."""


class BrokenError(Exception):
    """A piece that ended early: ``data`` holds the bytes that came, ``reason`` the error."""

    def __init__(self, data: bytearray, reason: Exception) -> None:
        super().__init__(f"{len(data)} bytes came, then {type(reason).__name__}")
        self.data = data
        self.reason = reason


@dataclass(frozen=True)
class Address:
    """The present address of a file's bytes; hubs sign such addresses for about an hour."""

    url: str
    headers: Mapping[str, str]


class LongWait(NamedTuple):
    """The server has asked to wait for so many seconds."""

    seconds: float


class RemoteFile:
    """A file of ``size`` bytes at ``address``; after that expires, ``locate`` gives a new one.

    Several threads may read it. A read goes on after a broken connection where it stopped. ``news``: the numbers of
    bytes that came, details, and long waits. ``stop``: once set, the reads of all threads end soon.
    """

    def __init__(self, name: str, size: int, address: Address, locate: Callable[[], Address], timeout: float) -> None:
        self.name, self.size = name, size
        self.news: SimpleQueue[int | str | LongWait] = SimpleQueue()
        self.waiting = False  # whether a long wait was told and nothing has come since
        self.stop = threading.Event()
        self._address: Address | None = address
        self._locate, self._timeout = locate, timeout
        self._parted = False  # whether the server has sent a part
        self._locating = threading.Lock()

    def read(self, start: int, stop: int) -> bytearray:
        """Bytes [start, stop). Raises RangesIgnoredError, or BrokenError after the last try or ``stop``."""
        data = bytearray()
        failures = refusals = 0
        while len(data) < stop - start:
            before = len(data)
            try:
                self._stream_into(data, start, stop)
            except RangesIgnoredError:
                raise
            except Exception as error:
                if len(data) - before >= PROGRESS:
                    failures = refusals = 0
                passing, refused = is_passing(error), status_of(error) in ADDRESS_EXPIRED
                failures, refusals = failures + passing, refusals + refused
                # The server refuses an expired address: a new one helps at once or not at all.
                hopeless = not (passing or refused) or failures > len(WAITS) or refusals > 1
                if hopeless or self.stop.is_set():
                    raise BrokenError(data, error) from error
                self.news.put(f"{self.name}: {type(error).__name__} at byte {start + len(data)}, trying again")
                pause = max(WAITS[failures - 1] if failures else 0.0, asked_wait(error))
                if pause > WAITS[-1]:
                    self.news.put(LongWait(pause))
                self.stop.wait(pause)
        return data

    def _stream_into(self, data: bytearray, start: int, stop: int) -> None:
        """One request for the missing bytes of [start, stop), which it adds to ``data`` as they come."""
        import httpx
        from huggingface_hub import get_session
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        with self._locating:
            address = self._address = self._address or self._locate()
        first = start + len(data)
        headers = {**address.headers, "Accept-Encoding": "identity"}
        if first > 0 or stop < self.size:
            headers["Range"] = f"bytes={first}-{stop - 1}"
        with get_session().stream("GET", address.url, headers=headers, timeout=self._timeout) as response:
            if response.status_code in ADDRESS_EXPIRED and self._address is address:
                self._address = None
            hf_raise_for_status(response)
            _check_start(response, first, self.size, self._parted)
            self._parted |= response.status_code == 206
            # Without a chunk size: httpx would hold back an unfilled chunk, and lose it with the connection.
            for chunk in response.iter_bytes():
                wanted = chunk[: stop - start - len(data)]
                data += wanted
                self.news.put(len(wanted))
                if len(data) == stop - start:
                    return
                if self.stop.is_set():
                    break
        raise httpx.RemoteProtocolError("the connection ended early", request=response.request)


def download(remote: RemoteFile, partial: Path, hasher: hashlib._Hash, expected: str, reporter: Reporter) -> None:
    """Completes ``partial`` and checks its content; asks for no byte that is there already.

    After a failure or an interruption all bytes that came in order stay. Raises SourceError if the hash differs from
    ``expected`` (and removes ``partial``), BrokenError, RangesIgnoredError, OSError.
    """
    reporter.begin(remote.name, remote.size, "B")
    try:
        with partial.open("a+b") as file:
            if os.fstat(file.fileno()).st_size > remote.size:
                file.truncate(0)
            file.seek(0)
            while chunk := file.read(PIECE):
                hasher.update(chunk)
                reporter.advance(len(chunk))

            def write(piece: bytearray) -> None:
                file.write(piece)
                hasher.update(piece)

            _fill(remote, file.tell(), write, reporter)
            file.flush()
            os.fsync(file.fileno())
    finally:
        reporter.end()
    refuse_other_content(partial, remote.name, hasher, expected)


def refuse_other_content(path: Path, name: str, hasher: hashlib._Hash, expected: str) -> None:
    """Removes ``path`` and raises SourceError if ``hasher``, which has its bytes, does not hold ``expected``."""
    if hasher.hexdigest() != expected:
        path.unlink()
        raise SourceError(
            "what was downloaded is not what the hub states", file=name, expected=f"{hasher.name} {expected}",
            found=hasher.hexdigest(), next="run the same command again; it downloads the file afresh",
        )  # fmt: skip


def _fill(remote: RemoteFile, start: int, write: Callable[[bytearray], None], reporter: Reporter) -> None:
    """Reads from ``start`` to the end over several connections and writes the pieces in order.

    If reading ends early, it still writes the bytes that came in order; after a failed write it writes no more.
    """
    pending: deque[Future[bytearray]] = deque()
    writing = False
    pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="hub")
    try:
        for offset in range(start, remote.size, PIECE):
            pending.append(pool.submit(remote.read, offset, min(offset + PIECE, remote.size)))
            last = offset + PIECE >= remote.size
            while pending and (last or len(pending) == WINDOW):
                while not pending[0].done():
                    wait([pending[0]], timeout=POLL_SECONDS)
                    _report(remote, reporter)
                piece = pending[0].result()
                writing = True
                pending.popleft()
                write(piece)
                writing = False
    except BaseException:
        remote.stop.set()
        pool.shutdown(cancel_futures=True)
        if not writing:
            for piece in _in_order(pending):
                write(piece)
        raise
    finally:
        pool.shutdown()
        _report(remote, reporter)


def _report(remote: RemoteFile, reporter: Reporter) -> None:
    """Reports the news. Only the thread that fills the file calls the reporter."""
    while not remote.news.empty():
        news = remote.news.get()
        if isinstance(news, str):
            reporter.detail(news)
        elif isinstance(news, int):
            remote.waiting = False
            reporter.advance(news)
        elif not remote.waiting:
            remote.waiting = True
            reporter.note(f"{remote.name}: the server asks to wait, trying again in {news.seconds:.0f} s")


def _in_order(pending: deque[Future[bytearray]]) -> Iterator[bytearray]:
    """The pieces that came, up to and including the first one that is not whole."""
    for future in pending:
        if future.cancelled():
            return
        error = future.exception()
        if error is not None:
            yield error.data if isinstance(error, BrokenError) else bytearray()
            return
        yield future.result()


def _check_start(response: httpx.Response, first: int, size: int, parted: bool) -> None:
    """Check the start of an answer: a whole file will do for a prefix; a part must be the requested one.

    ``parted``: the server sends parts, so that an answer without one is a passing failure.
    """
    part, headers = response.status_code == 206, response.headers
    content_range = headers.get("Content-Range", "")
    stated = content_range.rpartition("/")[2] if part else headers.get("Content-Length", "")
    if stated.isdigit() and stated != str(size) and "Content-Encoding" not in headers:
        raise OtherAnswerError(f"{stated} bytes instead of {size}")
    page = not stated and headers.get("Content-Type", "").startswith("text/html")
    if not part and (page or (parted and first > 0)):
        raise OtherAnswerError("a page" if page else "a whole file")
    if not content_range.startswith(f"bytes {first}-") if part else first > 0:
        raise RangesIgnoredError
