"""``ltxpack plan``: which way of running fits a machine, what it takes, and what to type. No GPU, no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ltxpack.cli.run import given, settings_options
from ltxpack.cli.terminal import json_option, print_json
from ltxpack.errors import printable
from ltxpack.files.units import human_bytes, parse_size
from ltxpack.runtime.settings import AUTO, SessionSettings, Settings, planned_by

if TYPE_CHECKING:
    from ltxpack.runtime.commands import PlannedRun
    from ltxpack.runtime.weights.machine import Machine
    from ltxpack.runtime.weights.plan import Plan
    from ltxpack.runtime.weights.report import Command
    from ltxpack.runtime.weights.sizes import ModelSizes

VIDEO, SESSION = planned_by(Settings), planned_by(SessionSettings)


@click.command()
@click.argument("overlay", type=click.Path(path_type=Path), required=False)
@click.option("--vram", metavar="SIZE", help="Memory of the card; default: what is free on the card here.")
@click.option("--ram", metavar="SIZE", help="Memory of the host; default: what is free here.")
@click.option("--disk-rate", default="3GB", show_default=True, metavar="SIZE", help="Bytes a second the disk reads.")
@settings_options(*VIDEO, *SESSION)
@click.option("--images", type=click.IntRange(0), default=0, show_default=True, help="Number of images conditioned on.")
@json_option
def plan(
    overlay: Path | None, vram: str | None, ram: str | None, disk_rate: str, images: int, as_json: bool, **_: object
) -> None:
    """Say how OVERLAY would run on this machine, or with --vram 24GB --ram 64GB on another.

    Mode, peak memory of card and host by phase, seconds of loading, and the commands to type. Without OVERLAY: for
    the published LTX-2.3, before anything of it is fetched. 1GB is 10⁹ bytes, 1GiB 2³⁰.
    """
    from ltxpack.runtime.commands import PlannedRun
    from ltxpack.runtime.request import Request
    from ltxpack.runtime.weights.machine import this_machine
    from ltxpack.runtime.weights.report import plan_or_refuse, to_json

    rate = parse_size(disk_rate, "--disk-rate")
    sizes = (("--vram", vram), ("--ram", ram))
    machine = this_machine(*(None if size is None else parse_size(size, flag) for flag, size in sizes))
    planned = PlannedRun(Request.of("", **given(VIDEO)), SessionSettings(**given(SESSION)), images)
    stages, model, commands = _looked_up(overlay, planned)
    work = replace(planned.request.work(stages), images=images)
    found = plan_or_refuse(model, work, machine, planned.session.residency)
    if as_json:
        print_json(to_json(found, machine, rate, commands))
        return
    _say(overlay, planned, machine, found, rate)
    for command in commands:
        click.echo(printable(f"  {'done' if command.done else 'next'}  {command.text}"))


def _looked_up(root: Path | None, planned: PlannedRun) -> tuple[tuple[str, ...], ModelSizes, list[Command]]:
    """The transformers of the stages, the sizes of the model, and what to type; of the published model without one."""
    from ltxpack.ltx23.published import published_configs, published_tensors
    from ltxpack.runtime.commands import codes_named, commands, published_stages
    from ltxpack.runtime.overlay import Overlay, choose, official_transformers
    from ltxpack.runtime.weights.sizes import model_of, overlay_model

    recipe, asked, form = planned.request.recipe, planned.session.transformers, planned.session.format
    if root is None:
        stages, configs = published_stages(recipe, asked, form), published_configs()
        codes = {name: codes_named(name) for name in stages}
        model = model_of(published_tensors(configs), configs, codes, planned.session.dtype)
        return stages, model, commands(stages, planned)
    opened = Overlay.open(root)
    if not opened.manifest.bakes and set(asked) == {AUTO} and not opened.manifest.distilled:
        stages = official_transformers(recipe, form=form)
    else:
        stages = choose(opened.manifest, recipe, asked, root, form).stages
    codes = {name: codes_named(name) for name in stages}
    return stages, overlay_model(opened, codes, planned.session.dtype), commands(stages, planned, opened)


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
    click.echo("commands:")
