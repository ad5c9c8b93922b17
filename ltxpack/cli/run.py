"""``ltxpack run``: a prompt becomes a video with sound."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ltxpack.cli.terminal import TerminalReporter, verbose_option
from ltxpack.errors import FailedLinesError, printable
from ltxpack.files.units import human_bytes

if TYPE_CHECKING:
    from ltxpack.runtime.batch import BatchSummary, Outcome
    from ltxpack.runtime.run import Peaks, RunOptions


@click.command()
@click.argument("overlay", type=click.Path(path_type=Path))
@click.option("--prompt", help="What to show and to be heard.")
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Make many videos: a JSON object per line; the other options say what a line leaves out.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), show_default="video.mp4")
@click.option("--negative-prompt", help="What to avoid; default: the official one.")
@click.option("--seed", type=int, default=10, show_default=True)
@click.option("--height", type=int, default=1088, show_default=True)
@click.option("--width", type=int, default=1920, show_default=True)
@click.option("--num-frames", type=int, default=121, show_default=True)
@click.option("--fps", type=float, default=24.0, show_default=True)
@click.option("--steps", type=int, default=15, show_default=True, help="Steps of stage 1.")
@click.option("--image", "images", multiple=True, metavar="PATH[@FRAME][:STRENGTH]", help="Condition on an image.")
@click.option(
    "--image-crf", type=click.IntRange(0, 51), help="x264 CRF images pass through; default: the checkpoint's."
)
@click.option("--stage1", default="auto", show_default=True, help="base, or a bake's name.")
@click.option("--stage2", default="auto", show_default=True, help="base, or a bake's name.")
@click.option("--video-cfg", type=float, default=3.0, show_default=True)
@click.option("--audio-cfg", type=float, default=7.0, show_default=True)
@click.option("--video-rescale", type=float, default=0.45, show_default=True)
@click.option("--audio-rescale", type=float, default=1.0, show_default=True)
@click.option("--modality", type=float, default=3.0, show_default=True, help="Modality guidance, video and audio.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, cuda:N or cpu.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option(
    "--residency", type=click.Choice(["auto", "resident", "swap", "stream"]), default="auto", show_default=True
)
@click.option(
    "--reads",
    type=click.Choice(["auto", "cached", "direct"]),
    default="auto",
    show_default=True,
    help="Weights through the page cache or past it; auto: past it, but for what is there.",
)
@click.option(
    "--decode",
    type=click.Choice(["official", "fast"]),
    default="official",
    show_default=True,
    help="fast: larger tiles where memory allows; pixels near seams differ.",
)
@click.option(
    "--attention",
    metavar="KERNEL",
    show_default="auto",
    help="auto (the fastest, measured), flash3, cudnn, flash, efficient, sdpa or math; before LTXPACK_ATTENTION.",
)
@click.option("--compile/--no-compile", "compile_blocks", default=False, show_default=True)
@click.option("--cache/--no-cache", default=True, show_default=True, help="Keep encoded prompts on disk.")
@click.option("--save-tensors", type=click.Path(path_type=Path), help="Write latents, frames and waveform here.")
@verbose_option
def run(
    overlay: Path, prompt: str | None, prompts: Path | None, output: Path | None, verbose: bool, **options: object
) -> None:
    """Make a video with sound from OVERLAY, or many with --prompts."""
    if (prompt is None) == (prompts is None):
        raise click.UsageError("give --prompt TEXT for one video, or --prompts FILE for many")
    if prompts is not None and options["save_tensors"] is not None:
        raise click.UsageError("--save-tensors goes with --prompt; --prompts makes many videos")
    from ltxpack.runtime.run import RunOptions

    chosen = RunOptions(overlay=overlay, **options)  # type: ignore[arg-type]
    if prompts is not None:
        _many(chosen, prompts, output, verbose)
    else:
        _one(replace(chosen, prompt=prompt or "", output=output or chosen.output), verbose)


def _one(options: RunOptions, verbose: bool) -> None:
    from ltxpack.runtime.run import run_to_file

    summary = run_to_file(options, TerminalReporter(verbose))
    click.echo(f"stage 1: {summary.stage1}, stage 2: {summary.stage2}")
    click.echo(summary.decoding)
    for phase, seconds in summary.seconds.items():
        click.echo(f"  {phase:<12} {seconds:8.2f} s")
    _print_peaks(summary.peaks)
    click.echo(str(summary.output))


def _many(options: RunOptions, prompts: Path, output: Path | None, verbose: bool) -> None:
    from ltxpack.runtime.batch import DONE, FAILED, SKIPPED, run_batch

    summary = run_batch(options, prompts, output, TerminalReporter(verbose))
    click.echo(f"stage 1: {summary.stage1}, stage 2: {summary.stage2}")
    _print_table(summary)
    for decoding in summary.decodings:
        click.echo(decoding)
    click.echo(f"prompts encoded ahead: {summary.ahead:.2f} s")
    _print_peaks(summary.peaks)
    click.echo(", ".join(f"{len(summary.of(status))} {status}" for status in (DONE, SKIPPED, FAILED)))
    failed = summary.of(FAILED)
    if failed:
        raise FailedLinesError(
            f"{len(failed)} of {len(summary.outcomes)} videos were not made",
            file=prompts,
            items=[f"line {outcome.job.number}: {outcome.problem}" for outcome in failed],
            next="mend what is said above and run the same command again; what is done is not made again",
        )


def _print_table(summary: BatchSummary) -> None:
    """One line a video: what became of it, seconds per phase, where it is."""
    phases = list(dict.fromkeys(phase for outcome in summary.outcomes for phase in outcome.seconds))
    click.echo("  ".join([" line", "status ", *(f"{phase:>8}" for phase in phases), "   total", "output"]))
    for outcome in summary.outcomes:
        seconds = [_seconds(outcome, phase) for phase in phases]
        total = f"{sum(outcome.seconds.values()):8.2f}" if outcome.seconds else f"{'-':>8}"
        cells = [f"{outcome.job.number:5}", f"{outcome.status:<7}", *seconds, total, printable(str(outcome.job.output))]
        click.echo("  ".join(cells))


def _seconds(outcome: Outcome, phase: str) -> str:
    return f"{outcome.seconds[phase]:8.2f}" if phase in outcome.seconds else f"{'-':>8}"


def _print_peaks(peaks: Peaks) -> None:
    device = "" if peaks.device is None else f", {human_bytes(peaks.device)} device"
    click.echo(f"peak memory: {human_bytes(peaks.host)} host{device}")
