"""Starts one command and tells what it cost. Run as ``python -I -S _launch.py RESULT LOG COMMAND…``.

A process of its own because the peak memory the kernel reports for a child begins at what its parent held when it was
started: this one imports nothing large, so about 10 MB is the least it can report.
"""

import json
import os
import sys
import time


def main() -> None:
    """Run COMMAND with its output in LOG; status, wall and CPU seconds and peak bytes of its tree go to RESULT."""
    result, log, *command = sys.argv[1:]
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    silent = os.open(os.devnull, os.O_RDONLY)
    moves = [(os.POSIX_SPAWN_DUP2, silent, 0), (os.POSIX_SPAWN_DUP2, fd, 1), (os.POSIX_SPAWN_DUP2, fd, 2)]
    began = time.monotonic()
    child = os.posix_spawnp(command[0], command, os.environ, file_actions=moves)
    _, status, usage = os.wait4(child, 0)
    wall = time.monotonic() - began
    cost = {
        "status": os.waitstatus_to_exitcode(status),
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss * 1024,
    }
    with open(result, "w", encoding="utf-8") as file:
        json.dump(cost, file)


if __name__ == "__main__":
    main()
