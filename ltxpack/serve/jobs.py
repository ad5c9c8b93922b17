"""The jobs of a server, in a database beside their videos: what was accepted is made, whatever is killed meanwhile.

One process has the folder at a time. The database is on the disk before a client is told that its job was accepted; a
job that was in progress when the server ended is queued again at its old place when the next one opens the folder.
Jobs that ended can be bounded in time, and their videos in bytes.
"""

from __future__ import annotations

import fcntl
import json
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from ltxpack.errors import FormatError, SourceError, UsageError
from ltxpack.files.publish import remove_temporaries
from ltxpack.runtime.request import ImageSpec, Request
from ltxpack.serve.limits import LEAST_KEPT

QUEUED, IN_PROGRESS, COMPLETED, FAILED = STATUSES = ("queued", "in_progress", "completed", "failed")
ENDED = (COMPLETED, FAILED)
DATABASE, LOCK, PICTURES = "jobs.sqlite", "jobs.lock", "pictures"
JOB_ID = re.compile(r"video_[0-9a-f]{32}")
# Every name that this module and the writers of videos give to a file of a job.
OURS = re.compile(r"\.?video_[0-9a-f]{32}[-.].*")
FORMAT = 1
OTHER = "choose another folder with -o"
TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, status TEXT NOT NULL, task TEXT NOT NULL,
    created_at REAL NOT NULL, started_at REAL, completed_at REAL, error TEXT, warnings TEXT NOT NULL DEFAULT '[]'
);
CREATE INDEX IF NOT EXISTS by_status ON jobs (status, number);
"""
COLUMNS = "number, id, status, task, created_at, completed_at, error, warnings"
MOST_CRASHES = 3
TIME, SPACE = "time", "space"
# How many finished jobs the mean of their seconds is taken over.
RECENT = 20
# A picture: the name of its file, the frame it conditions, and how strongly.
Image = tuple[str, int, float]


@dataclass(frozen=True)
class VideoTask:
    """``settings`` with the recipe, ``stages`` the transformers; ``size`` and ``seconds`` as the client is told."""

    model: str
    prompt: str
    settings: Mapping[str, Any]
    stages: Sequence[str]
    images: Sequence[Image]
    size: str
    seconds: str


def request_of(prompt: str, settings: Mapping[str, Any], images: Sequence[Image], pictures: Path) -> Request:
    """The request of a task, whose pictures are in the folder ``pictures``. Raises UsageError."""
    specs = [ImageSpec(pictures / name, frame, strength) for name, frame, strength in images]
    given: dict[str, Any] = {**settings, "images": specs}
    return Request.of(prompt, **given)


@dataclass(frozen=True)
class Job:
    """A job as it is now; times in seconds since 1970, ``progress`` in percent."""

    number: int
    id: str
    status: str
    task: VideoTask
    created_at: float
    completed_at: float | None
    error: Mapping[str, str] | None
    warnings: Sequence[str]
    expires_at: float | None
    progress: int = 0

    @property
    def public(self) -> dict[str, Any]:
        """The job as clients read it."""
        task = self.task
        return {
            "id": self.id,
            "object": "video",
            "model": task.model,
            "status": self.status,
            "progress": self.progress,
            "created_at": int(self.created_at),
            "completed_at": None if self.completed_at is None else int(self.completed_at),
            "expires_at": None if self.expires_at is None else int(self.expires_at),
            "prompt": task.prompt,
            "size": task.size,
            "seconds": task.seconds,
            "error": self.error,
            "warnings": [*self.warnings],
        }


class QueueFullError(Exception):
    """As many jobs wait as may."""


@dataclass
class Jobs:
    """The jobs in ``folder``, for several threads. Raises UsageError where another server has it.

    ``keep_seconds`` and ``keep_bytes`` as in :class:`.ServeLimits`.
    """

    folder: Path
    most_queued: int
    keep_seconds: float | None = None
    keep_bytes: int | None = None
    clock: Callable[[], float] = time.time
    _lock: threading.Condition = field(default_factory=threading.Condition)
    _progress: dict[str, int] = field(default_factory=dict)
    _crashes: Counter[str] = field(default_factory=Counter)
    _fetched: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.pictures.mkdir(parents=True, exist_ok=True)
        self._claim = _locked(self.folder / LOCK)
        path = self.folder / DATABASE
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            (found,) = self._db.execute("PRAGMA user_version").fetchone()
            if found not in (0, FORMAT):
                raise FormatError("is of another version", file=path, expected=FORMAT, found=found, next=OTHER)
            self._db.executescript(TABLE + f"PRAGMA user_version={FORMAT};")
            self._db.execute("UPDATE jobs SET status = ?, started_at = NULL WHERE status = ?", (QUEUED, IN_PROGRESS))
            known = {job_id for (job_id,) in self._db.execute("SELECT id FROM jobs")}
        except (sqlite3.Error, FormatError) as error:
            self._claim.close()
            if isinstance(error, FormatError):
                raise
            advice = f"make room there if its disk is full, or {OTHER}"
            raise FormatError("the jobs cannot be read or written", file=path, found=error, next=advice) from None
        self._sweep(known)

    @property
    def pictures(self) -> Path:
        """The folder of the pictures that were uploaded."""
        return self.folder / PICTURES

    def video(self, job_id: str) -> Path:
        """Where the video of a job is, once it is completed."""
        return self.folder / f"{job_id}.mp4"

    def add(self, job_id: str, task: VideoTask) -> Job:
        """Accept a job. Raises QueueFullError."""
        with self._lock:
            if self.is_full():
                raise QueueFullError
            row = (job_id, QUEUED, json.dumps(vars(task)), self.clock())
            self._db.execute("INSERT INTO jobs (id, status, task, created_at) VALUES (?, ?, ?, ?)", row)
            self._lock.notify()
            made = self.get(job_id)  # before a worker has it
        assert made is not None
        return made

    def is_full(self) -> bool:
        """Whether as many jobs wait as may."""
        return self.counts()[QUEUED] >= self.most_queued

    def get(self, job_id: str) -> Job | None:
        """The job, or None if there is none."""
        if not JOB_ID.fullmatch(job_id):
            return None
        with self._lock:
            row = self._db.execute(f"SELECT {COLUMNS} FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return None if row is None else self._job(row)

    def listed(self, after: Job | None, limit: int, descending: bool) -> list[Job]:
        """At most ``limit`` jobs behind ``after``, the newest first or last."""
        way, order = ("<", "DESC") if descending else (">", "ASC")
        where, values = ("", []) if after is None else (f"WHERE number {way} ?", [after.number])
        query = f"SELECT {COLUMNS} FROM jobs {where} ORDER BY number {order} LIMIT ?"
        with self._lock:
            rows = self._db.execute(query, [*values, limit]).fetchall()
        return [self._job(row) for row in rows]

    def counts(self) -> dict[str, int]:
        """How many jobs there are of each status."""
        with self._lock:
            rows = self._db.execute("SELECT status, COUNT(*) FROM jobs GROUP BY status").fetchall()
        return {**dict.fromkeys(STATUSES, 0), **dict(rows)}

    def mean_seconds(self) -> float | None:
        """What the last completed videos took on the average; None before there is one."""
        query = (
            "SELECT AVG(took) FROM (SELECT completed_at - started_at AS took FROM jobs WHERE status = ?"
            " ORDER BY completed_at DESC LIMIT ?)"
        )
        with self._lock:
            (mean,) = self._db.execute(query, (COMPLETED, RECENT)).fetchone()
        return None if mean is None else float(mean)

    def claim(self, seconds: float) -> Job | None:
        """The oldest job that waits, now in progress; None if none comes within ``seconds``."""
        with self._lock:
            job = self._oldest()
            if job is None and self._lock.wait(seconds):
                job = self._oldest()
            if job is None:
                return None
            begin = "UPDATE jobs SET status = ?, started_at = ? WHERE number = ?"
            self._db.execute(begin, (IN_PROGRESS, self.clock(), job.number))
        return replace(job, status=IN_PROGRESS)

    def _oldest(self) -> Job | None:
        query = f"SELECT {COLUMNS} FROM jobs WHERE status = ? ORDER BY number LIMIT 1"
        row = self._db.execute(query, (QUEUED,)).fetchone()
        return None if row is None else self._job(row)

    def give_back(self, job_id: str) -> str | None:
        """The worker of a job has died: the job goes back to its place in the queue, or has failed if too many died.

        Returns its status; None if it was deleted.
        """
        remove_temporaries(self.video(job_id))
        with self._lock:
            if self.get(job_id) is None:
                self.discard(job_id)
                return None
            self._progress.pop(job_id, None)
            if self._crashes[job_id] + 1 >= MOST_CRASHES:
                self.fail(job_id, "server_error", f"{MOST_CRASHES} workers have died while they made this video")
                return FAILED
            again = "UPDATE jobs SET status = ?, started_at = NULL WHERE id = ? AND status = ?"
            self._db.execute(again, (QUEUED, job_id, IN_PROGRESS))
            self._crashes[job_id] += 1
            self._lock.notify()
            return QUEUED

    def set_progress(self, job_id: str, percent: int) -> None:
        """Note how far a job is; it is not kept when the server ends, as the work is not."""
        with self._lock:
            self._progress[job_id] = percent

    def warn(self, job_id: str, text: str) -> None:
        """Something that is probably not what the client wants; once, though several workers may find it."""
        known = "SELECT 1 FROM json_each(jobs.warnings) WHERE value = ?"
        add = f"UPDATE jobs SET warnings = json_insert(warnings, '$[#]', ?) WHERE id = ? AND NOT EXISTS ({known})"
        with self._lock:
            self._db.execute(add, (text, job_id, text))

    def complete(self, job_id: str) -> bool:
        """The video of a job is whole. False if the job was deleted: then the video is removed."""
        return self._end(job_id, COMPLETED, None)

    def fail(self, job_id: str, code: str, message: str) -> bool:
        """A job cannot be made. False if it was deleted."""
        return self._end(job_id, FAILED, json.dumps({"code": code, "message": message}))

    def delete(self, job_id: str) -> None:
        """Forget a job and its files; those of a job in progress go when its worker has stopped."""
        with self._lock:
            job = self.get(job_id)
            self._db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
            self._progress.pop(job_id, None)
        if job is not None and job.status != IN_PROGRESS:
            self.discard(job_id)

    @contextmanager
    def fetching(self, job_id: str) -> Iterator[Path | None]:
        """The video of a job, which does not expire in the block; None if it is not there any more."""
        with self._lock:
            self._fetched[job_id] += 1
        try:
            path = self.video(job_id)
            yield path if path.is_file() else None
        finally:
            with self._lock:
                self._fetched[job_id] -= 1
                self._fetched += Counter()  # drops those at 0

    def expire(self) -> Counter[str]:
        """Remove jobs that ended too long ago, and the oldest videos beyond the bytes; how many for which of both."""
        now, removed = self.clock(), Counter[str]()
        with self._lock:
            query = "SELECT id, status, completed_at FROM jobs WHERE completed_at IS NOT NULL ORDER BY completed_at"
            ended = self._db.execute(query).fetchall()
        sizes = {job_id: self._size(job_id) for job_id, status, _ in ended if status == COMPLETED}
        left = sum(sizes.values())
        for job_id, _, ended_at in ended:
            old = self.keep_seconds is not None and ended_at + self.keep_seconds <= now
            beyond = self.keep_bytes is not None and left > self.keep_bytes and sizes.get(job_id, 0) > 0
            if (old or beyond) and ended_at + LEAST_KEPT <= now and self._expired(job_id):
                removed[TIME if old else SPACE] += 1
                left -= sizes.get(job_id, 0)
        return removed

    def kept_bytes(self) -> int:
        """What the finished videos take."""
        with self._lock:
            rows = self._db.execute("SELECT id FROM jobs WHERE status = ?", (COMPLETED,)).fetchall()
        return sum(self._size(job_id) for (job_id,) in rows)

    def _expired(self, job_id: str) -> bool:
        """Remove a job that ended; False while its video is being fetched."""
        with self._lock:
            if job_id in self._fetched:
                return False
            self.delete(job_id)
        return True

    def _size(self, job_id: str) -> int:
        try:
            return self.video(job_id).stat().st_size
        except OSError:
            return 0

    def discard(self, job_id: str, *, video: bool = True) -> None:
        """Remove the files of a job; its pictures alone unless ``video``."""
        for path in [*([self.video(job_id)] if video else []), *self.pictures.glob(f"{job_id}-*")]:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another server have the folder."""
        with self._lock:
            self._db.close()
        self._claim.close()

    def _end(self, job_id: str, status: str, error: str | None) -> bool:
        with self._lock:
            end = "UPDATE jobs SET status = ?, completed_at = ?, error = ? WHERE id = ? AND status = ?"
            found = self._db.execute(end, (status, self.clock(), error, job_id, IN_PROGRESS)).rowcount > 0
            self._progress.pop(job_id, None)
        self.discard(job_id, video=not found or status == FAILED)
        return found

    def _job(self, row: Sequence[Any]) -> Job:
        number, job_id, status, task, created, completed, error, warnings = row
        progress = 100 if status == COMPLETED else self._progress.get(job_id, 0)
        told = None if error is None else json.loads(error)
        kept, warned = VideoTask(**json.loads(task)), json.loads(warnings)
        expires = None if completed is None or self.keep_seconds is None else completed + self.keep_seconds
        return Job(number, job_id, status, kept, created, completed, told, warned, expires, progress)

    def _sweep(self, known: set[str]) -> None:
        """Remove files of jobs that there are not, and what killed workers left of videos that are made again."""
        for path in [*self.folder.iterdir(), *self.pictures.iterdir()]:
            whole = path.name[: len("video_") + 32]
            if OURS.fullmatch(path.name) and whole not in known:
                path.unlink(missing_ok=True)


def _locked(path: Path) -> IO[bytes]:
    try:
        file = path.open("ab")
    except OSError as error:
        raise SourceError(error.strerror or str(error), file=path, next=OTHER) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UsageError("another server has this folder", file=path.parent, next=OTHER) from None
    except OSError:  # a filesystem without locks
        pass
    return file
