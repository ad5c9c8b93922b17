"""Ray for the tests: on this machine, for one module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ltxpack.runtime.parallel.cluster import connected
from ltxpack.runtime.parallel.devices import RAY_HERE

ENVIRONMENT = {
    "RAY_AUTH_TOKEN": "0" * 64,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray asks a cloud's own address which cloud this is, whether or not it is to report that.
    "http_proxy": "http://127.0.0.1:9",
    "no_proxy": "127.0.0.1,localhost",
}


@contextmanager
def local_ray(cpus: int) -> Iterator[Any]:
    """Ray with so many CPUs, as ``--ray`` starts it; what this process connects to takes it. It asks nobody outside."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with connected(RAY_HERE, cpus) as found:
            yield found
