"""``ltxpack inspect``: what a checkpoint, LoRA or overlay holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ltxpack.cli.terminal import json_option, print_json
from ltxpack.errors import printable


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Say what PATH holds: a checkpoint, a LoRA file or an overlay. Reads headers only."""
    from ltxpack.materialize.inspect import inspect_path

    facts = inspect_path(path)
    if as_json:
        print_json(facts)
        return
    for line in _lines(facts):
        click.echo(printable(line))


def _lines(value: Any, indent: str = "") -> list[str]:
    """A JSON value as indented ``key: value`` lines."""
    lines: list[str] = []
    for key, item in value.items() if isinstance(value, dict) else ((str(i), v) for i, v in enumerate(value)):
        if isinstance(item, (dict, list)) and item and not _flat(item):
            lines += [f"{indent}{key}:", *_lines(item, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {_plain(item)}")
    return lines


def _plain(value: Any) -> str:
    """A value without inner ones as text; ``-`` where there is none."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)


def _flat(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(item, (dict, list)) for item in value)
