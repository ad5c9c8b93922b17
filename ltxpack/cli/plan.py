"""``ltxpack plan``: which way of running fits a machine, what it takes, and what to type. No GPU, no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ltxpack.cli.terminal import json_option, print_json
from ltxpack.errors import printable
from ltxpack.files.units import human_bytes, parse_size

if TYPE_CHECKING:
    from ltxpack.runtime.weights.commands import Wanted
    from ltxpack.runtime.weights.machine import Machine
    from ltxpack.runtime.weights.plan import Plan
    from ltxpack.runtime.weights.report import Command
    from ltxpack.runtime.weights.sizes import Model


@click.command()
@click.argument("overlay", type=click.Path(path_type=Path), required=False)
@click.option("--vram", metavar="SIZE", help="Memory of the card; default: what is free on the card here.")
@click.option("--ram", metavar="SIZE", help="Memory of the host; default: what is free here.")
@click.option("--disk-rate", default="3GB", show_default=True, metavar="SIZE", help="Bytes a second the disk reads.")
@click.option("--residency", type=click.Choice(["auto", "resident", "swap", "stream"]), default="auto")
@click.option("--height", type=int, default=1088, show_default=True)
@click.option("--width", type=int, default=1920, show_default=True)
@click.option("--num-frames", type=int, default=121, show_default=True)
@click.option("--fps", type=float, default=24.0, show_default=True)
@click.option("--steps", type=click.IntRange(2), default=15, show_default=True)
@click.option("--images", type=click.IntRange(0), default=0, show_default=True, help="Number of images conditioned on.")
@click.option("--stage1", default="auto", show_default=True, help="base, or a bake's name.")
@click.option("--stage2", default="auto", show_default=True, help="base, or a bake's name.")
@click.option("--decode", type=click.Choice(["official", "fast"]), default="official", show_default=True)
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@json_option
def plan(overlay: Path | None, vram: str | None, ram: str | None, as_json: bool, **options: object) -> None:
    """Say how OVERLAY would run on this machine, or with --vram 24GB --ram 64GB on another.

    Mode, peak memory of card and host by phase, seconds of loading, and the commands to type. Without OVERLAY: for
    the published LTX-2.3, before anything of it is fetched. 1GB is 10⁹ bytes, 1GiB 2³⁰.
    """
    from ltxpack.runtime.weights.advice import plan_or_refuse
    from ltxpack.runtime.weights.commands import hq_work
    from ltxpack.runtime.weights.machine import this_machine
    from ltxpack.runtime.weights.report import to_json

    rate = parse_size(str(options["disk_rate"]), "--disk-rate")
    sizes = (("--vram", vram), ("--ram", ram))
    machine = this_machine(*(None if size is None else parse_size(size, flag) for flag, size in sizes))
    wanted = _wanted(options)
    stages, model, commands = _overlay(overlay, wanted) if overlay is not None else _published(wanted)
    work = hq_work(wanted.shape, stages, wanted.steps, wanted.images, wanted.decode)
    found = plan_or_refuse(model, work, machine, wanted.residency)
    if as_json:
        print_json(to_json(found, machine, rate, commands))
        return
    _say(overlay, wanted, machine, found, rate)
    for command in commands:
        click.echo(printable(f"  {'done' if command.done else 'next'}  {command.text}"))


def _wanted(options: dict[str, object]) -> Wanted:
    from ltxpack.runtime.sampling.shape import VideoShape
    from ltxpack.runtime.weights.commands import Wanted

    shape = VideoShape(*(options[name] for name in ("num_frames", "height", "width", "fps")))  # type: ignore[arg-type]
    shape.half()
    stages = str(options["stage1"]), str(options["stage2"])
    names = ("steps", "images", "decode", "dtype", "residency")
    return Wanted(shape, *(options[name] for name in names), stages)  # type: ignore[arg-type,call-arg]


def _published(wanted: Wanted) -> tuple[tuple[str, str], Model, list[Command]]:
    from ltxpack.ltx23.published import published_configs, published_tensors
    from ltxpack.runtime.weights.commands import published_commands, published_stages
    from ltxpack.runtime.weights.sizes import model_of

    configs, stages = published_configs(), published_stages(wanted.stages)
    model = model_of(published_tensors(configs), configs, stages, wanted.dtype)
    return stages, model, published_commands(stages, wanted)


def _overlay(root: Path, wanted: Wanted) -> tuple[tuple[str, str], Model, list[Command]]:
    from ltxpack.runtime.overlay import Overlay
    from ltxpack.runtime.select import AUTO, choose
    from ltxpack.runtime.weights.commands import OFFICIAL, overlay_commands
    from ltxpack.runtime.weights.sizes import overlay_model

    opened = Overlay.open(root)
    if not opened.manifest.bakes and wanted.stages == (AUTO, AUTO):
        stages = OFFICIAL
    else:
        choice = choose(opened.manifest, *wanted.stages, root)
        stages = choice.stage1, choice.stage2
    return stages, overlay_model(opened, stages, wanted.dtype), overlay_commands(opened, stages, wanted)


def _say(overlay: Path | None, wanted: Wanted, machine: Machine, found: Plan, rate: int) -> None:
    from ltxpack.runtime.weights.plan import AUTO
    from ltxpack.runtime.weights.report import decoding, lines, reading, seconds, table

    shape = wanted.shape
    what = "the published LTX-2.3" if overlay is None else str(overlay)
    stages = ", ".join(f"stage {n} {stage.transformer}" for n, stage in enumerate(found.work.stages, start=1))
    size = f"{shape.height}x{shape.width}, {shape.frames} frames, {wanted.dtype}"
    click.echo(printable(f"{what}: {stages}; {size}"))
    if machine.card is None:
        click.echo("no NVIDIA card found: planned for the CPU (--vram plans for a card)")
    for line in (*lines(found, machine), reading(found, AUTO, machine), decoding(found), *table(found)):
        click.echo(line)
    first, following = (
        f"{human_bytes(count)} ({seconds(count, rate):.0f} s at {human_bytes(rate)}/s)"
        for count in (found.first_read, found.next_read)
    )
    click.echo(f"read from disk: {first} for the first video, {following} for each further one with another prompt")
    click.echo("commands:")
