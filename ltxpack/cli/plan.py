"""``ltxpack plan``: the mode that fits a machine, its memory and time, and the commands to type. No GPU, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ltxpack.cli.run import given, settings_options
from ltxpack.cli.terminal import PathType, json_option, print_json
from ltxpack.errors import UsageError, printable
from ltxpack.files.units import human_bytes, parse_size
from ltxpack.runtime.settings import AUTO, SessionSettings, Settings, planned_by

if TYPE_CHECKING:
    from ltxpack.runtime.overlay import Overlay
    from ltxpack.runtime.parallel.devices import PlannedDevices
    from ltxpack.runtime.weights.machine import Machine
    from ltxpack.runtime.weights.plan import Plan, Work
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
    from ltxpack.runtime.commands import commands, planned_stages
    from ltxpack.runtime.overlay import Overlay
    from ltxpack.runtime.parallel.devices import PlannedDevices
    from ltxpack.runtime.request import Request
    from ltxpack.runtime.weights.report import plan_or_refuse, to_json
    from ltxpack.runtime.weights.sizes import model_sizes

    rate, link = parse_size(disk_rate, "--disk-rate"), parse_size(link_rate, "--link-rate")
    named = None if devices is None else PlannedDevices.parse(devices)
    machine = _machine(vram, ram, named)
    session = SessionSettings(**given(SESSION), devices=None if named is None else named.flag)
    request, opened = Request.of("", **given(VIDEO)), None if overlay is None else Overlay.open(overlay)
    stages = planned_stages(opened, request.recipe, session)
    model, work = model_sizes(opened, stages, session.dtype), replace(request.work(stages), images=images)
    typed = commands(stages, request, session, opened, images)
    found = plan_or_refuse(model, work, machine, session.residency)
    more, told = _of_devices(named, opened, model, work, machine, session.residency, link)
    if as_json:
        print_json(to_json(found, machine, rate, typed) | more)
        return
    _say(overlay, session.dtype, machine, found, rate)
    for line in (*told, "commands:", *(f"  {'done' if one.done else 'next'}  {one.text}" for one in typed)):
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


def _of_devices(
    named: PlannedDevices | None, overlay: Overlay | None, model: ModelSizes, work: Work, machine: Machine,
    residency: str, link: int,
) -> tuple[dict[str, Any], Iterable[str]]:  # fmt: skip
    """What the ``named`` devices would do, for JSON and in words; nothing without them."""
    if named is None:
        return {}, ()
    from ltxpack.runtime.model.config import DiTConfig
    from ltxpack.runtime.parallel import planned
    from ltxpack.runtime.weights.sizes import TRANSFORMER, read_configs

    config = DiTConfig.from_dict(read_configs(overlay)[TRANSFORMER])
    schemes = planned.plan_schemes(model, config, work, machine, named.count, residency)
    return {"devices": planned.to_json(schemes, link)}, planned.lines(schemes, link)


def _say(overlay: Path | None, dtype: str, machine: Machine, found: Plan, rate: int) -> None:
    from ltxpack.runtime.weights.report import decoding, lines, reading, table

    shape = found.work.shape
    what = "the published LTX-2.3" if overlay is None else str(overlay)
    stages = ", ".join(f"stage {n} {stage.transformer}" for n, stage in enumerate(found.work.stages, start=1))
    size = f"{shape.height}x{shape.width}, {shape.frames} frames, {dtype}"
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
