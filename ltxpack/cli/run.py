"""``ltxpack run``: a prompt becomes a video with sound."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ltxpack.cli.terminal import Command, PathType, TerminalReporter, verbose_option
from ltxpack.errors import FailedLinesError, printable
from ltxpack.files.units import human_bytes
from ltxpack.imports import uncollected
from ltxpack.runtime.codecs.tiles import FAST
from ltxpack.runtime.parallel.devices import RAY_HERE, TORCHRUN, Launched, launched
from ltxpack.runtime.sampling.recipes import stage_label
from ltxpack.runtime.settings import SessionSettings, Settings, flag_of, type_of

if TYPE_CHECKING:
    from ltxpack.runtime.batch import Batch
    from ltxpack.runtime.run import RunOptions

VIDEO, SESSION = fields(Settings), fields(SessionSettings)


def settings_options(*settings: Field[Any]) -> Callable[[Command], Command]:
    """A decorator that adds an option for each of ``settings``, in this order."""

    def add(command: Command) -> Command:
        for one in reversed(settings):
            command = _option(one)(command)
        return command

    return add


def given(settings: Sequence[Field[Any]]) -> Any:
    """The values of the ``settings`` that the user typed for the running command, by name."""
    context = click.get_current_context()
    typed = (one.name for one in settings if context.get_parameter_source(one.name) is not ParameterSource.DEFAULT)
    return {name: context.params[name] for name in typed}


def _option(one: Field[Any]) -> Any:
    meta, flag = one.metadata, flag_of(one)
    more: dict[str, Any] = {"default": one.default, "help": meta["help"], "metavar": meta.get("metavar")}
    more["show_default"] = meta.get("shown", one.default not in (None, ()))
    if isinstance(one.default, bool):
        return click.option(f"{flag}/--no-{flag.removeprefix('--')}", one.name, **more)
    if "choices" in meta:
        more["type"] = click.Choice(meta["choices"])
    elif type_of(one) is tuple:
        more["type"] = _Numbers()
    elif "bounds" in meta:
        more["type"] = click.IntRange(*meta["bounds"])
    else:
        more["type"] = type_of(one)
    return click.option(flag, one.name, multiple=one.name == "images", **more)


class _Numbers(click.ParamType[Any]):
    """``1,2`` as (1, 2)."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(number) for number in value.split(",") if number.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers", param, ctx)


@click.command()
@click.argument("overlay", type=PathType())
@click.option("--prompt", help="What the video shows, and how it sounds.")
@click.option(
    "--prompts", type=PathType(exists=True, dir_okay=False), metavar="FILE",
    help="Make many videos: a JSON object per line; the other options are the defaults of the lines.",
)  # fmt: skip
@click.option("-o", "--output", type=PathType(), show_default="video.mp4", help="The video to write.")
@settings_options(*VIDEO, *SESSION)
@click.option(
    "--ray", is_flag=False, flag_value=RAY_HERE, metavar="[ADDRESS]",
    help="With --prompts: actors of a Ray cluster make the videos. Without ADDRESS, --ray goes last and starts Ray.",
)  # fmt: skip
@click.option("--save-tensors", type=PathType(), help="Write latents, frames and waveform here.")
@verbose_option
def run(
    overlay: Path,
    prompt: str | None,
    prompts: Path | None,
    output: Path | None,
    ray: str | None,
    save_tensors: Path | None,
    verbose: bool,
    **_: object,
) -> None:
    """Make a video with sound from OVERLAY, or many with --prompts."""
    if (prompt is None) == (prompts is None):
        raise click.UsageError("give --prompt TEXT for one video, or --prompts FILE for many")
    if prompts is not None and save_tensors is not None:
        raise click.UsageError("--save-tensors goes with --prompt; --prompts makes many videos")
    if prompt is not None:
        if ray is not None:
            raise click.UsageError("--ray goes with --prompts; one video is made on one machine")
        from ltxpack.runtime.request import Request

        # Wrong settings fail here, before the import of torch.
        Request.of(prompt, **given(VIDEO))
    with uncollected():
        from ltxpack.runtime.run import RunOptions

    session, launch = SessionSettings(**given(SESSION)), launched()
    if launch is not None:
        session = _of_torchrun(session, ray)
        if launch.rank:
            _follow(overlay, session, launch)
            return
    options = RunOptions(overlay, prompt or "", output or RunOptions.output, save_tensors, given(VIDEO), session, ray)
    if prompts is not None:
        _many(options, prompts, output, verbose)
    else:
        _one(options, verbose)


def _of_torchrun(session: SessionSettings, ray: str | None) -> SessionSettings:
    if session.devices is not None or ray is not None:
        named = "--ray" if session.devices is None else "--devices"
        raise click.UsageError(f"torchrun has started the ranks: leave {named} out, or start ltxpack without it")
    return replace(session, devices=TORCHRUN)


def _follow(overlay: Path, session: SessionSettings, launch: Launched) -> None:
    """Follow rank 0, which has the terminal; when rank 0 ends, torchrun ends this process."""
    from ltxpack.runtime.parallel.worker import follow_torchrun

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it may wait in a library for ever
    follow_torchrun(overlay, session, launch)


def _one(options: RunOptions, verbose: bool) -> None:
    from ltxpack.runtime.run import run_to_file

    summary = run_to_file(options, TerminalReporter(verbose))
    click.echo(_stages(summary.transformers))
    if verbose or options.given.get("decode") == FAST:
        click.echo(summary.decoding)
    if verbose:
        for phase, seconds in summary.seconds.items():
            click.echo(f"  {phase:<12} {seconds:8.2f} s")
    click.echo(summary.peaks)
    if summary.activations:
        click.echo(summary.activations)
    size = human_bytes(summary.output.stat().st_size)
    click.echo(f"{summary.shape}, {size}, made in {sum(summary.seconds.values()):.1f} s")
    click.echo(str(summary.output))


def _many(options: RunOptions, prompts: Path, output: Path | None, verbose: bool) -> None:
    from ltxpack.runtime.batch import run_batch
    from ltxpack.runtime.lines import DONE, FAILED, SKIPPED

    batch = run_batch(options, prompts, output, TerminalReporter(verbose))
    for transformers in batch.choices:
        click.echo(_stages(transformers))
    _print_table(batch)
    for decoding in dict.fromkeys(outcome.decoding for outcome in batch.of(DONE)):
        click.echo(decoding)
    click.echo(f"prompts encoded ahead: {batch.ahead:.2f} s")
    for told in batch.summary:
        click.echo(told)
    click.echo(", ".join(f"{len(batch.of(status))} {status}" for status in (DONE, SKIPPED, FAILED)))
    failed = batch.of(FAILED)
    if failed:
        problem = f"{len(failed)} of {len(batch.outcomes)} videos were not made"
        lines = [f"{outcome.line.name}: {outcome.problem}" for outcome in failed]
        again = "fix the lines above, then run the same command again; it skips the videos that are done"
        raise FailedLinesError(problem, file=prompts, items=lines, next=again)


def _stages(transformers: Sequence[str]) -> str:
    """``stage 1: base, stage 2: distilled-0.5``."""
    return ", ".join(f"{stage_label(number)}: {name}" for number, name in enumerate(transformers))


def _print_table(batch: Batch) -> None:
    """One line a video: its outcome, the seconds of each phase, its path."""
    phases = list(dict.fromkeys(phase for outcome in batch.outcomes for phase in outcome.seconds))
    click.echo("  ".join([" line", "status ", *(f"{phase:>8}" for phase in phases), "   total", "output"]))
    for outcome in batch.outcomes:
        total = sum(outcome.seconds.values()) if outcome.seconds else None
        counts = [*(outcome.seconds.get(phase) for phase in phases), total]
        numbers = "  ".join(f"{'-':>8}" if count is None else f"{count:8.2f}" for count in counts)
        where = printable(str(outcome.line.output))
        click.echo(f"{outcome.line.number:5}  {outcome.status:<7}  {numbers}  {where}")
