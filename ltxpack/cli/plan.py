"""``ltxpack plan``: the mode that fits a machine, its memory and time, and the commands to type. No GPU, no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from ltxpack.cli.run import given, settings_options
from ltxpack.cli.terminal import PathType, json_option, print_json
from ltxpack.errors import UsageError, printable
from ltxpack.files.units import human_bytes, parse_size
from ltxpack.runtime.settings import AUTO, SessionSettings, Settings, planned_by

if TYPE_CHECKING:
    from ltxpack.runtime.commands import PlannedRun
    from ltxpack.runtime.model.config import DiTConfig
    from ltxpack.runtime.parallel.devices import PlannedDevices
    from ltxpack.runtime.weights.machine import Machine
    from ltxpack.runtime.weights.plan import Plan
    from ltxpack.runtime.weights.report import Command
    from ltxpack.runtime.weights.sizes import ModelSizes

DEFAULT = ParameterSource.DEFAULT
VIDEO, SESSION = planned_by(Settings), planned_by(SessionSettings)
PAGE_HELP = "Write a page for a browser that shows the plans of many machines and videos."
DEVICES_HELP = "Plan for several cards: their number, or which of this machine's, as CUDA counts them."


@click.command()
@click.argument("overlay", type=PathType(), required=False)
@click.option("--vram", metavar="SIZE", help="Memory of each card; default: the free memory of the card here.")
@click.option("--ram", metavar="SIZE", help="Memory of the host; default: the free memory here.")
@click.option("--disk-rate", default="3GB", show_default=True, metavar="SIZE", help="Bytes a second the disk reads.")
@click.option("--devices", metavar="N|0,1,…", help=DEVICES_HELP)
@click.option("--link-rate", default="25GB", show_default=True, metavar="SIZE", help="Bytes a second between cards.")
@settings_options(*VIDEO, *SESSION)
@click.option(
    "--images", type=click.IntRange(0), default=0, show_default=True, help="Number of images to condition on."
)
@click.option("--page", type=PathType(), metavar="FILE", help=PAGE_HELP)
@json_option
def plan(
    overlay: Path | None,
    vram: str | None,
    ram: str | None,
    disk_rate: str,
    link_rate: str,
    devices: str | None,
    images: int,
    page: Path | None,
    as_json: bool,
    **_: object,
) -> None:
    """Say how OVERLAY would run on this machine, or with --vram 24GB --ram 64GB on another.

    Prints the mode, peak memory of card and host by phase, seconds of loading, and the commands to type; with
    --devices 2, also what two such cards would do. Without OVERLAY: plans for the published LTX-2.3, and downloads
    nothing. 1GB is 10⁹ bytes, 1GiB 2³⁰.
    """
    if page is not None:
        return _write_page(overlay, page)
    from ltxpack.runtime.commands import PlannedRun
    from ltxpack.runtime.parallel import planned as several
    from ltxpack.runtime.parallel.devices import PlannedDevices
    from ltxpack.runtime.request import Request
    from ltxpack.runtime.weights.report import plan_or_refuse, to_json

    rate, link = parse_size(disk_rate, "--disk-rate"), parse_size(link_rate, "--link-rate")
    named = None if devices is None else PlannedDevices.parse(devices)
    machine = _machine(vram, ram, named)
    session = SessionSettings(**given(SESSION), devices=None if named is None else named.flag)
    planned = PlannedRun(Request.of("", **given(VIDEO)), session, images)
    stages, model, config, commands = _looked_up(overlay, planned)
    work = replace(planned.request.work(stages), images=images)
    found = plan_or_refuse(model, work, machine, session.residency)
    schemes = None
    if named is not None:
        schemes = several.plan_schemes(model, config, work, machine, named.count, session.residency)
    if as_json:
        more = {} if schemes is None else {"devices": several.to_json(schemes, link)}
        print_json(to_json(found, machine, rate, commands) | more)
        return
    _say(overlay, planned, machine, found, rate)
    told = () if schemes is None else several.lines(schemes, link)
    for line in (*told, "commands:", *(f"  {'done' if one.done else 'next'}  {one.text}" for one in commands)):
        click.echo(printable(line))


def _write_page(overlay: Path | None, page: Path) -> None:
    from ltxpack.deployment import render
    from ltxpack.files.publish import atomic_write, check_writable, output_errors
    from ltxpack.runtime.overlay import Overlay

    context = click.get_current_context()
    typed = [one for one in context.command.params if context.get_parameter_source(str(one.name)) is not DEFAULT]
    others = [one.opts[0] for one in typed if one.name not in ("overlay", "page")]
    if others:
        problem = "--page plans many machines and videos, and takes OVERLAY alone"
        raise UsageError(problem, found=", ".join(others), next="ltxpack plan --page plan.html")
    check_writable(page, "--page", "plan.html")
    data = render(None if overlay is None else Overlay.open(overlay))
    with output_errors(page):
        atomic_write(page, data)
    click.echo(printable(f"{page}: {human_bytes(len(data))}; open it in a browser"))


def _machine(vram: str | None, ram: str | None, named: PlannedDevices | None) -> Machine:
    """This machine, or one with the given memory; the ``named`` card with least free memory."""
    from ltxpack.runtime.weights.machine import this_machine

    cards = (0,) if named is None else named.cards
    if vram is not None and not cards:
        raise click.UsageError("--vram goes with cards; --devices cpu:N has none")
    sizes = (("--vram", vram), ("--ram", ram))
    return this_machine(*(None if size is None else parse_size(size, flag) for flag, size in sizes), cards=cards)


def _looked_up(root: Path | None, planned: PlannedRun) -> tuple[tuple[str, ...], ModelSizes, DiTConfig, list[Command]]:
    """The transformers of the stages, the model's sizes, the transformer's config, and the commands to type.

    Without ``root`` they are those of the published model.
    """
    from ltxpack.runtime.commands import commands, published_stages
    from ltxpack.runtime.model.config import DiTConfig
    from ltxpack.runtime.overlay import Overlay, choose, official_transformers
    from ltxpack.runtime.weights.sizes import TRANSFORMER, model_sizes, read_configs

    recipe, asked, form = planned.request.recipe, planned.session.transformers, planned.session.format
    opened = None if root is None else Overlay.open(root)
    if opened is None:
        stages = published_stages(recipe, asked, form)
    elif not opened.manifest.bakes and set(asked) == {AUTO} and not opened.manifest.distilled:
        stages = official_transformers(recipe, form=form)
    else:
        stages = choose(opened, recipe, asked, form).stages
    model = model_sizes(opened, stages, planned.session.dtype)
    return stages, model, DiTConfig.from_dict(read_configs(opened)[TRANSFORMER]), commands(stages, planned, opened)


def _say(overlay: Path | None, planned: PlannedRun, machine: Machine, found: Plan, rate: int) -> None:
    from ltxpack.runtime.weights.report import decoding, lines, reading, table

    shape = planned.request.shape
    what = "the published LTX-2.3" if overlay is None else str(overlay)
    stages = ", ".join(f"stage {n} {stage.transformer}" for n, stage in enumerate(found.work.stages, start=1))
    size = f"{shape.height}x{shape.width}, {shape.frames} frames, {planned.session.dtype}"
    click.echo(printable(f"{what}: {stages}; {size}"))
    if machine.card is None:
        click.echo("no NVIDIA card found: planned for the CPU (--vram plans for a card)")
    for line in (*lines(found, machine), reading(found, AUTO, machine), decoding(found), *table(found)):
        click.echo(line)
    first, following = (
        f"{human_bytes(count)} ({count / rate:.0f} s at {human_bytes(rate)}/s)"
        for count in (found.first_read, found.next_read)
    )
    click.echo(f"read from disk: {first} for the first video, {following} for each further one with another prompt")
