"""What the server counts, in the text format that Prometheus reads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping

PREFIX = "ltxpack_"
# Name -> type and meaning.
METRICS = {
    "jobs": ("gauge", "Jobs in the database by status."),
    "queue_limit": ("gauge", "Jobs that may wait."),
    "jobs_accepted_total": ("counter", "Jobs accepted since the server began."),
    "jobs_refused_total": ("counter", "Requests refused because the queue was full."),
    "jobs_ended_total": ("counter", "Jobs that ended since the server began, by how they did."),
    "jobs_expired_total": ("counter", "Jobs removed by --keep-videos (time) and --keep-bytes (space)."),
    "expiry_faults_total": ("counter", "Looks for expired jobs that failed."),
    "kept_bytes": ("gauge", "Bytes of the finished videos."),
    "video_seconds_total": ("counter", "Seconds of making videos, by model."),
    "videos_total": ("counter", "Videos made since the server began, by model."),
    "workers": ("gauge", "Workers by device and state."),
    "worker_deaths_total": ("counter", "Processes of workers that ended by themselves."),
    "http_requests_total": ("counter", "Answers by method, route and status."),
}
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counters, for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, Labels]] = Counter()

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter, whose name lacks its ``_total``."""
        key = f"{name}_total", tuple(sorted(labels.items()))
        with self._lock:
            self._counts[key] += amount  # type: ignore[assignment]

    def took(self, model: str, seconds: float) -> None:
        """A video was made."""
        self.count("videos", model=model)
        self.count("video_seconds", seconds, model=model)

    def text(self, gauges: Mapping[str, Mapping[Labels, float]]) -> str:
        """All of them, with the ``gauges`` as they are now."""
        with self._lock:
            counts = sorted(self._counts.items())
        lines = []
        for name, (kind, meaning) in METRICS.items():
            values = gauges.get(name, {}).items() if kind == "gauge" else _of(counts, name)
            lines += [f"# HELP {PREFIX}{name} {meaning}", f"# TYPE {PREFIX}{name} {kind}"]
            lines += [f"{PREFIX}{name}{_shown(labels)} {value}" for labels, value in values]
        return "\n".join(lines) + "\n"


def _of(counts: Iterable[tuple[tuple[str, Labels], float]], name: str) -> Iterable[tuple[Labels, float]]:
    return [(labels, value) for (other, labels), value in counts if other == name]


def _shown(labels: Labels) -> str:
    """``{model="ltx-2.3-hq"}``."""
    pairs = [f'{name}="{_escaped(value)}"' for name, value in labels]
    return f"{{{','.join(pairs)}}}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
