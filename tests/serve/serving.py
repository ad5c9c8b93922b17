"""A server in a process of its own, a fork, for tests: the command itself, or one whose workers are stubs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from support import HANG, until
from warm_processes import WarmProcess

from ltxpack.serve.app import Service, make_app

STUBBED = """
import sys
from pathlib import Path
from ltxpack.cli.terminal import TerminalReporter
from ltxpack.serve.limits import ServeLimits
from ltxpack.serve.server import ServeOptions, serve
overlay, output, devices, queue = sys.argv[1:]
options = ServeOptions(Path(overlay), Path(output), port=0, devices=devices, limits=ServeLimits(queue=int(queue)))
serve(options, TerminalReporter(), lambda address: print(address, flush=True), "stub_worker")
"""


class Server:
    """``with Server(command) as server``: ``address`` is that of the interface, ``client`` speaks to it."""

    # Starts the process; subprocess.Popen: for real.
    start: Any = WarmProcess

    def __init__(self, command: Sequence[str | Path], **environment: str) -> None:
        self._command, self._environment = [*map(str, command)], environment

    def __enter__(self) -> Server:
        environment, pipe = {**os.environ, **self._environment}, subprocess.PIPE
        self.process = self.start(self._command, env=environment, stdout=pipe, stderr=pipe)
        assert self.process.stdout is not None
        self.address = os.fsdecode(self.process.stdout.readline()).strip()
        assert self.address, self.process.communicate()[1]
        key = self._environment.get("LTXPACK_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(base_url=self.address, headers=headers, timeout=HANG)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        self.log = os.fsdecode(self.process.communicate(timeout=HANG)[1])

    def post(self, prompt: str, **fields: Any) -> dict[str, Any]:
        """Ask for the smallest video; the job."""
        said = {"prompt": prompt, "size": "64x64", "num_frames": 9, **fields}
        answer = self.client.post("/videos", json=said)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def job(self, job_id: str) -> dict[str, Any]:
        return dict(self.client.get(f"/videos/{job_id}").json())

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs, the oldest first, by pages."""
        found: list[dict[str, Any]] = []
        while True:
            after = {"after": found[-1]["id"]} if found else {}
            page = self.client.get("/videos", params={"order": "asc", "limit": 70, **after}).json()
            found += page["data"]
            if not page["has_more"]:
                return found

    def all_completed(self) -> list[dict[str, Any]]:
        """All jobs once they are completed, the oldest first."""

        def look() -> list[dict[str, Any]] | None:
            jobs = self.jobs()
            return jobs if all(job["status"] == "completed" for job in jobs) else None

        return list(until(look))

    def ended(self, job_id: str) -> dict[str, Any]:
        """The job once it has ended."""
        return until(lambda: job if (job := self.job(job_id))["status"] in ("completed", "failed") else None)

    def metrics(self) -> str:
        return self.client.get(self.address.replace("/v1", "/metrics")).text


class Asking:
    """Speaks to the application of ``service`` in this process."""

    def __init__(self, service: Service) -> None:
        transport = httpx.ASGITransport(app=make_app(service), raise_app_exceptions=False)
        self._loop = asyncio.new_event_loop()
        self._client = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        return self._loop.run_until_complete(self._client.request(method, path, **more))

    def close(self) -> None:
        self._loop.run_until_complete(self._client.aclose())
        self._loop.close()


def stubbed(overlay: Path, output: Path, devices: str = "cpu", queue: int = 300, **environment: str) -> Server:
    """A server with workers of :mod:`stub_worker`."""
    command = [sys.executable, "-c", STUBBED, overlay, output, devices, str(queue)]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return Server(command, STUB_LOG=str(output.with_suffix(".log")), PYTHONPATH=path, **environment)
