"""Removes what a server keeps no longer, while it runs."""

from __future__ import annotations

import asyncio
import sqlite3

from starlette.concurrency import run_in_threadpool

from ltxpack.serve.jobs import Jobs
from ltxpack.serve.metrics import Metrics

# Seconds between looks.
LOOK = 5.0


async def expire_for_ever(jobs: Jobs, metrics: Metrics) -> None:
    """Look again and again what has expired, until this is cancelled; nothing does where nothing bounds it."""
    while jobs.keep_seconds is not None or jobs.keep_bytes is not None:
        try:
            removed = await run_in_threadpool(jobs.expire)
        except (sqlite3.Error, OSError):  # as in a request: the next look may do better
            metrics.count("expiry_faults")
        else:
            for reason, count in removed.items():
                metrics.count("jobs_expired", count, reason=reason)
        await asyncio.sleep(LOOK)
