"""``ltxpack materialize``: a checkpoint becomes an overlay."""

from __future__ import annotations

from pathlib import Path

import click

from ltxpack.cli.terminal import (
    PathType,
    TerminalReporter,
    json_option,
    plan_option,
    print_json,
    print_plan,
    verbose_option,
)
from ltxpack.errors import quoted
from ltxpack.files.units import human_bytes, parse_size
from ltxpack.runtime.sampling.recipes import DISTILLED, HQ


@click.command()
@click.argument("source")
@click.argument("overlay", type=PathType())
@click.option("--checkpoint", metavar="REF", help="The all-in-one checkpoint.")
@click.option("--part", metavar="REF", multiple=True, help="A further file of a checkpoint in parts; repeatable.")
@click.option("--lora", metavar="REF", help="The distilled LoRA.")
@click.option("--upsampler", metavar="REF", help="The spatial x2 upsampler.")
@click.option("--text-encoder", metavar="REF", help="The Gemma 3 folder or repo.")
@click.option("--revision", help="Revision of SOURCE on the hub.")
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest shard to write.")
@click.option("--copy", is_flag=True, help="Copy files instead of linking them.")
@plan_option
@click.option("--force", is_flag=True, help="Replace an existing overlay.")
@json_option
@verbose_option
def materialize(
    source: str,
    overlay: Path,
    plan_only: bool,
    as_json: bool,
    verbose: bool,
    max_shard_size: str,
    **options: str | bool | tuple[str, ...] | None,
) -> None:
    """Repack SOURCE (hub repo id, folder or .safetensors file) into the folder OVERLAY.

    REF is a file, a folder, a file name within SOURCE, or REPO[@REV][/FILE] on the hub.
    """
    from ltxpack.materialize import Options, plan_overlay
    from ltxpack.materialize import materialize as make

    reporter = TerminalReporter(verbose)
    largest = parse_size(max_shard_size, "--max-shard-size")
    wanted = Options(source, overlay, max_shard_size=largest, **options)  # type: ignore[arg-type]
    if plan_only:
        print_plan(plan_overlay(wanted, reporter).to_json(), as_json)
        return
    report = make(wanted, reporter)
    facts = {"overlay": str(overlay), "written": report.written, "total_bytes": report.total_bytes}
    if as_json:
        print_json(facts)
    elif report.written:
        click.echo(f"{overlay}: {human_bytes(report.total_bytes)}")
        run = f"ltxpack run {quoted(overlay)} --prompt 'Waves on a beach'"
        if report.manifest.distilled:
            click.echo(f"next: {run} --recipe {DISTILLED.name}")
        elif report.manifest.loras:
            strengths = " ".join(f"--strength {strength:g}" for strength in HQ.strengths)
            click.echo(f"next: ltxpack bake-lora {quoted(overlay)} {strengths}")
        else:
            click.echo(f"next: {run} --stage1 base --stage2 base")
    else:
        click.echo(f"{overlay}: already there, made from the same inputs; nothing to do")
