"""The command line: arguments -> one call -> printed result. Only this room prints.

No heavy package is imported here: each command imports what it needs when it runs.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import signal
import sys
from collections import deque
from collections.abc import Sequence
from typing import NoReturn

import click

from ltxpack import __version__
from ltxpack.cli.terminal import TerminalReporter, hold_streams, lost_result, say_error
from ltxpack.errors import LtxpackError
from ltxpack.files.environment import set_aside
from ltxpack.imports import claim_process

INTERRUPTED = 130


# Each command is in the module of its name.
COMMANDS = ("bake-lora", "demo", "export", "inspect", "materialize", "plan", "run", "serve", "verify")


class LazyGroup(click.Group):
    """Imports a command when it is named: importing all takes as long as the rest of a start."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(importlib.import_module(f"ltxpack.cli.{name}"), name)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ltxpack")
def cli() -> None:
    """Repack LTX-2.3 checkpoints, bake LoRAs into transformer shards, run the two-stage HQ pipeline.

    \b
    ltxpack materialize Lightricks/LTX-2.3 out/
    ltxpack bake-lora --strength 1.0
    ltxpack run out/ --prompt "..."
    """
    for told in set_aside():
        TerminalReporter().warn(told)


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong use, 130 interrupted."""
    claim_process()
    _take_signals()
    # Python looks through all objects once more before it ends; with torch among them that takes half a second.
    atexit.register(gc.freeze)
    stdout = hold_streams()
    status = _status()
    if not status and (lost := lost_result(stdout)):
        say_error(
            f"the result could not be printed: {lost.strerror}; all files are there and whole\n"
            "  next: make room there, or send the output elsewhere"
        )
        status = 1
    sys.exit(status)


def _status() -> int:
    try:
        return cli.main(standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except LtxpackError as error:
        say_error(error.render())
        return error.exit_status
    except (KeyboardInterrupt, click.Abort):
        with contextlib.suppress(ValueError):  # not the main thread of a program
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends it at once, without tracebacks
        say_error(f"interrupted; the same command {_what_again(sys.argv[1:])}")
        return INTERRUPTED
    except OSError as error:
        named, advice = error.filename or "a file", "make room there or choose another place"
        if isinstance(error, PermissionError):
            advice = "correct the permissions there"
        elif "temporary directory" in str(error):  # of Python's tempfile, as in a container that is read-only
            named, advice = "temporary files", "make room in one of these, or set TMPDIR to a folder of yours"
        say_error(f"{named}: {error.strerror or error}\n  next: {advice}, then run the same command again")
    except MemoryError:
        say_error("the machine has too little free memory\n  next: close other programs and run the command again")
    return 1


def _take_signals() -> None:
    """Have SIGTERM and SIGHUP end this process as tidily as Ctrl-C does, unless they are ignored, as under nohup."""
    ended: list[int] = []

    def tidy_up(number: int, _: object) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        ended.append(number)
        raise KeyboardInterrupt

    # The signal itself comes last of all: whoever sent it looks for an end by it.
    atexit.register(lambda: deque(map(signal.raise_signal, ended)))
    # Libraries that handle an end, as of a server, handle SIGTERM alone.
    handlers = {signal.SIGTERM: tidy_up, signal.SIGHUP: lambda *_: signal.raise_signal(signal.SIGTERM)}
    for number, handler in handlers.items():
        if signal.getsignal(number) is signal.SIG_DFL:
            with contextlib.suppress(ValueError):  # not the main thread of a program
                signal.signal(number, handler)


def _what_again(arguments: Sequence[str]) -> str:
    """What an interrupted command does when the user runs it again."""
    flagged = any(argument.partition("=")[0] in ("--prompts", "--repair") for argument in arguments)
    resumes = flagged or arguments[:1] in (["materialize"], ["bake-lora"], ["export"], ["demo"], ["serve"])
    return "goes on from where it stopped" if resumes else "starts again from the beginning"
