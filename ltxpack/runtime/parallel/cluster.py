"""A Ray cluster: how a command joins one, what all its machines must see alike, and how many workers it has room for.

Needs no torch. What the actors are, those who start them say: ``run --prompts`` and ``serve``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ltxpack
from ltxpack.errors import DeviceError, OverlayError, UsageError, one_line
from ltxpack.files.reader import hash_file
from ltxpack.manifest import MANIFEST_NAME
from ltxpack.runtime.parallel.devices import RAY_HERE, named_devices
from ltxpack.runtime.settings import AUTO

# Seconds: until it is told that no actor could start yet, and what a cluster gets to answer.
PATIENCE, ANSWER_SECONDS = 60.0, 10.0
NOT_STARTED = "no actor has started yet: the cluster may have no GPU or CPU free for one"
# Ray's variables, unless they are set: nothing is sent to its makers. A cluster of this machine alone listens on no
# other address, ends no actor because memory is nearly used up, which the planner means it to be, and gives actors the
# processor like any other process.
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0"}
OF_HERE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_niceness": "0",
}


@dataclass(frozen=True)
class SharedDisk:
    """What every machine must see as this one does: the overlay ``root``, whose manifest has this hash, and ``marks``,
    files in the folders of the videos; and the ``version`` of ltxpack there.
    """

    root: Path
    manifest: str
    marks: tuple[Path, ...]
    version: str

    def check(self) -> None:
        """Raises LtxpackError where something is another here."""
        if ltxpack.__version__ != self.version:
            raise UsageError("another ltxpack is installed there", expected=self.version, found=ltxpack.__version__)
        if hash_file(self.root / MANIFEST_NAME) != self.manifest:
            raise OverlayError("another overlay is at this path there", file=self.root)
        for mark in self.marks:
            if not mark.exists():
                raise UsageError("another folder is at this path there: videos would be lost", file=mark.parent)

    @classmethod
    def of(cls, root: Path, marks: tuple[Path, ...] = ()) -> SharedDisk:
        """As this machine sees it."""
        return cls(root, hash_file(root / MANIFEST_NAME), marks, ltxpack.__version__)


def cpu_workers(device: str, devices: str | None) -> int:
    """How many workers on CPUs ``--devices`` asks for; 0: one on each GPU. Raises UsageError for what Ray decides."""
    if device != AUTO:
        raise UsageError("--device does not go with --ray, which has an actor on each GPU", next="leave --device out")
    named = () if devices is None else named_devices(devices)
    if set(named) - {"cpu"}:
        problem, wanted = "--devices with --ray counts workers on CPUs alone", "cpu:N, or nothing for one on each GPU"
        raise UsageError(problem, expected=wanted, found=devices, next="leave --devices out")
    return len(named)


def needs(on_cpus: bool | int) -> dict[str, Any]:
    """What an actor needs of its machine: a GPU, or a CPU where :func:`cpu_workers` says so."""
    return {"num_cpus": 1} if on_cpus else {"num_cpus": 0, "num_gpus": 1}


def gpus(ray: Any) -> int:
    """How many GPUs the cluster has. Raises DeviceError where it has none."""
    count = int(ray.cluster_resources().get("GPU", 0))
    if count == 0:
        advice = "the same command with --devices cpu:2 (two workers on CPUs, for tests)"
        raise DeviceError("the Ray cluster has no GPU", next=advice)
    return count


def sharers_here(actors: int) -> int:
    """In an actor: how many of so many ``actors`` share this machine at most."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    resources: Mapping[str, float] = next((each["Resources"] for each in ray.nodes() if each["NodeID"] == node), {})
    return min(actors, int(resources.get("GPU", 0)) or actors)


def where() -> str:
    """In an actor: its machine and process, in words."""
    import ray

    return f"{ray.util.get_node_ip_address()}, process {os.getpid()}"


@contextlib.contextmanager
def connected(address: str, workers: int) -> Iterator[Any]:
    """Ray, connected in the block; a program that has Ray running already keeps it as it is."""
    for name, value in (ENVIRONMENT | (OF_HERE if address == RAY_HERE else {})).items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise UsageError("--ray needs Ray, which is not installed", next="pip install 'ltxpack[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    if address not in (RAY_HERE, AUTO):
        _check_answers(address)
    logging.getLogger("ray").setLevel(logging.ERROR)
    more: dict[str, Any] = {"include_dashboard": False} if address == RAY_HERE else {}
    if address == RAY_HERE and workers:
        more["num_cpus"] = workers
    try:
        ray.init(address, log_to_driver=False, configure_logging=False, **more)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise _unreachable(address, error) from None
    # Ray would print what it knows of actors that ended on standard output, where results go; there is no switch.
    ray._private.worker._worker_logs_enabled = False
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raises UsageError for what is no address, DeviceError where nobody answers: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        advice = "the same command on a machine of the cluster, with --ray auto"
        raise UsageError("--ray takes no such address", expected="HOST:PORT, auto, or none", found=address, next=advice)
    try:
        socket.create_connection((host.strip("[]"), int(port[:6])), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, error) from None


def _unreachable(address: str, error: Exception) -> DeviceError:
    problem = f"the Ray cluster cannot be reached: {one_line(str(error))}"
    return DeviceError(problem, found=address, next="ray status (on a machine of the cluster)")


def why_ended(error: Exception) -> str:
    """Why an actor ended, as Ray knows it, in a line."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line.startswith("The actor is dead because") or "Error: " in line]
    return (told or lines or [type(error).__name__])[-1].partition(" Some common causes")[0]
