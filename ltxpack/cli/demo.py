"""``ltxpack demo``: the whole path on a tiny random checkpoint, without GPU, network or account."""

from __future__ import annotations

from pathlib import Path

import click

from ltxpack.cli.terminal import PathType, TerminalReporter, verbose_option
from ltxpack.runtime.sampling.recipes import HQ, RECIPES


@click.command()
@click.argument("folder", type=PathType(), default=Path("ltxpack-demo"))
@click.option("--recipe", type=click.Choice(tuple(RECIPES)), default=HQ.name, show_default=True)
@verbose_option
def demo(folder: Path, recipe: str, verbose: bool) -> None:
    """Make a tiny checkpoint of the real architecture in FOLDER, materialise, bake and run it.

    The last line printed is the path of the video.
    """
    from ltxpack.demo import run_demo

    video = run_demo(folder, TerminalReporter(verbose), recipe)
    click.echo(f"the overlay: {folder / 'overlay'}")
    click.echo(f"the changes of a bake: {folder / 'overlay/bakes/distilled-0.5/coverage.html'}")
    click.echo(f"latents, frames and waveform: {video.with_suffix('.safetensors')}")
    click.echo("the video, 25 frames with sound:")
    click.echo(str(video))
