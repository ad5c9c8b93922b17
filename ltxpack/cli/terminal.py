"""Results, notes and progress on a terminal: results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ltxpack.errors import printable
from ltxpack.files.typed import refuse_empty
from ltxpack.files.units import human_bytes
from ltxpack.manifest import is_overlay
from ltxpack.reporter import Reporter

if TYPE_CHECKING:
    from tqdm import tqdm

Command = TypeVar("Command", bound=Callable[..., Any])


class PathType(click.Path):
    """The name of a file or folder, which may not be empty."""

    def __init__(self, *, exists: bool = False, file_okay: bool = True, dir_okay: bool = True) -> None:
        super().__init__(exists=exists, file_okay=file_okay, dir_okay=dir_okay, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        refuse_empty(value)
        return super().convert(value, param, ctx)


class TerminalReporter(Reporter):
    """Notes on stderr, one progress bar at a time with rate and time left."""

    def __init__(self, verbose: bool = False) -> None:
        self._verbose = verbose
        self._bar: tqdm[Any] | None = None

    def note(self, message: str) -> None:
        self._say(message)

    def detail(self, message: str) -> None:
        if self._verbose:
            self._say(message)

    def warn(self, message: str) -> None:
        self._say(f"warning: {message}")

    def begin(self, label: str, total: int, unit: str) -> None:
        """Start a bar; outside a terminal print one line instead."""
        from tqdm import tqdm

        self.end()
        if not sys.stderr.isatty():
            self._say(label)
            return
        scaled = unit == "B"
        self._bar = tqdm(
            total=total, desc=label, unit=unit, unit_scale=scaled, unit_divisor=1000, dynamic_ncols=True, leave=False
        )

    def advance(self, amount: int = 1) -> None:
        if self._bar is not None:
            self._bar.update(amount)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say(self, message: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        click.echo(printable(message), err=True)


def say_error(message: str) -> None:
    click.echo(f"error: {printable(message)}", err=True)


def print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=1, ensure_ascii=True))


def print_plan(plan: dict[str, Any], as_json: bool, *, bounds: tuple[str, ...] = ()) -> None:
    """Print a plan as JSON, or one line a file. The size of a file whose name ends in ``bounds`` is an upper bound."""
    if as_json:
        print_json(plan)
        return
    width = max((len(file["action"]) for file in plan["files"]), default=0)
    bounded = [file for file in plan["files"] if bounds and file["path"].endswith(bounds)]
    for file in plan["files"]:
        most = "at most " if file in bounded else ""
        click.echo(printable(f"{file['action']:<{width}}  {most + human_bytes(file['bytes']):>9}  {file['path']}"))
    for missing in plan["missing"]:
        click.echo(printable(f"missing: {missing}"))
    linked = plan["total_bytes"] - plan.get("written_bytes", plan["total_bytes"])
    links = f", {human_bytes(linked)} of them links to existing files" if linked else ""
    most = "at most " if bounded else ""
    click.echo(f"{len(plan['files'])} files, {most}{human_bytes(plan['total_bytes'])}{links}")


verbose_option = click.option("-v", "--verbose", is_flag=True, help="Print more details of the work.")
plan_option = click.option("--plan", "plan_only", is_flag=True, help="Only say what the command would write.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def usual_overlay(given: Path | None) -> Path:
    """``given``; without it the current folder if it is an overlay, else ``out``."""
    return given or (Path() if is_overlay(Path()) else Path("out"))
