"""Click options made from the fields of :mod:`ltxpack.runtime.settings`, and what was given of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import Field
from typing import Any

import click
from click.core import ParameterSource

from ltxpack.cli.terminal import Command
from ltxpack.runtime.settings import flag_of, type_of

Fields = Sequence[Field[Any]]


def settings_options(*fields: Field[Any]) -> Callable[[Command], Command]:
    """A decorator that adds an option for each of ``fields``, in this order."""

    def add(command: Command) -> Command:
        for one in reversed(fields):
            command = _option(one)(command)
        return command

    return add


def given(fields: Fields) -> Any:
    """The settings among ``fields`` that the running command was given, by name."""
    context = click.get_current_context()
    typed = (one.name for one in fields if context.get_parameter_source(one.name) is not ParameterSource.DEFAULT)
    return {name: context.params[name] for name in typed}


def _option(one: Field[Any]) -> Any:
    meta, flag = one.metadata, flag_of(one)
    more: dict[str, Any] = {"default": one.default, "help": meta["help"], "metavar": meta.get("metavar")}
    more["show_default"] = meta.get("shown", one.default not in (None, ()))
    if isinstance(one.default, bool):
        return click.option(f"{flag}/--no-{flag.removeprefix('--')}", one.name, **more)
    if "choices" in meta:
        more["type"] = click.Choice(meta["choices"])
    elif "bounds" in meta:
        more["type"] = click.IntRange(*meta["bounds"])
    else:
        more["type"] = type_of(one)
    return click.option(flag, one.name, multiple=isinstance(one.default, tuple), **more)
