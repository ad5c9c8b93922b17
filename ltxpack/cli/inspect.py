"""``ltxpack inspect``: the contents of a file or an overlay, and the programs that take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ltxpack.cli.terminal import PathType, json_option, print_json
from ltxpack.errors import MAX_LISTED, printable


@click.command()
@click.argument("path", type=PathType())
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Say what PATH holds, in which form, which programs take it and what is wrong with it.

    PATH is a checkpoint or a part of one, quantised or not, an export, a LoRA, an overlay or a folder. ltxpack reads
    only the header of a file, and the input scales of a quantised one.
    """
    from ltxpack.materialize.inspect import inspect_path

    facts = inspect_path(path)
    if as_json:
        print_json(facts)
        return
    for line in _indented(facts):
        # A second line of metadata must not look like one of ours.
        further = " " * (len(line) - len(line.lstrip()) + 4)
        click.echo(printable(line.replace("\n", f"\n{further}")))


def _indented(value: Any, indent: str = "") -> list[str]:
    """A JSON value as indented ``key: value`` lines; a list of plain values is one line, ``-`` stands for none."""
    lines: list[str] = []
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        flat = isinstance(item, list) and not any(isinstance(inner, (dict, list)) for inner in item)
        if flat:
            # Numbers are short, names are not.
            shown = MAX_LISTED if any(isinstance(inner, str) for inner in item) else len(item)
            more = [f"and {len(item) - shown} more"] if len(item) > shown else []
            lines.append(f"{indent}{key}: {', '.join([*map(str, item[:shown]), *more])}")
        elif isinstance(item, (dict, list)) and item:
            lines += [f"{indent}{key}:", *_indented(item, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {'-' if item is None else item}")
    return lines
