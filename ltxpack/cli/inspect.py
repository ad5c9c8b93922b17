"""``ltxpack inspect``: what a file or an overlay holds, from headers alone."""

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
    for line in _indented(facts):
        click.echo(printable(line))


def _indented(value: Any, indent: str = "") -> list[str]:
    """A JSON value as indented ``key: value`` lines; a list of plain values is one line, ``-`` stands for none."""
    lines: list[str] = []
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        flat = isinstance(item, list) and not any(isinstance(inner, (dict, list)) for inner in item)
        if flat:
            lines.append(f"{indent}{key}: {', '.join(map(str, item))}")
        elif isinstance(item, (dict, list)) and item:
            lines += [f"{indent}{key}:", *_indented(item, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {'-' if item is None else item}")
    return lines
