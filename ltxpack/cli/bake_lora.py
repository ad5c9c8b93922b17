"""``ltxpack bake-lora``: LoRAs become a complete transformer folder of its own."""

from __future__ import annotations

from pathlib import Path

import click

from ltxpack.cli.terminal import (
    TerminalReporter,
    json_option,
    plan_option,
    print_json,
    print_plan,
    usual_overlay,
    verbose_option,
)
from ltxpack.errors import quoted
from ltxpack.files.units import human_bytes
from ltxpack.manifest import BF16, FORMATS


@click.command("bake-lora")
@click.argument("overlay", type=click.Path(path_type=Path), required=False)
@click.option("--strength", "strengths", type=float, multiple=True, required=True, help="One bake each; repeatable.")
@click.option("--lora", metavar="FILE", help="Main LoRA instead of the overlay's distilled one.")
@click.option("--add", "added", multiple=True, metavar="FILE=S", help="Stack a LoRA, applied before the main one.")
@click.option(
    "--rule",
    type=click.Choice(["fp32", "official"]),
    default="fp32",
    show_default=True,
    help="fp32 rounds once; official repeats the official bf16 arithmetic bit for bit.",
)
@click.option(
    "--format",
    "formats",
    type=click.Choice(FORMATS),
    multiple=True,
    default=(BF16,),
    show_default=True,
    help="How linears are stored; one bake each, of one read of the base; repeatable.",
)
@click.option("--keep-blocks", metavar="N,N|none", help="Blocks that stay in bf16. [default: 0,1,46,47 of 48]")
@click.option(
    "--activations",
    type=click.Path(path_type=Path),
    help="For fp8: take input scales from this file, which ltxpack run --save-activations wrote.",
)
@click.option("--name", help="Name of the bake (with one strength and format).")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--allow-unmatched", is_flag=True, help="Bake although some keys of a LoRA match nothing.")
@plan_option
@click.option("--force", is_flag=True, help="Make the bake anew, whatever is there.")
@json_option
@verbose_option
def bake_lora(
    overlay: Path | None,
    strengths: tuple[float, ...],
    added: tuple[str, ...],
    keep_blocks: str | None,
    plan_only: bool,
    as_json: bool,
    verbose: bool,
    **options: object,
) -> None:
    """Bake LoRAs into OVERLAY/bakes/<name>/ from the clean base transformer.

    Without OVERLAY: the current folder if it is an overlay, else ./out. The distilled LoRA changes nearly every
    byte, so such a bake of the 22B model takes 38 GB; --plan says how much, to the byte but for the two reports.
    """
    from ltxpack.lora_bake import PAGE_NAME, REPORT_NAMES, BakeOptions, bake, parse_added, parse_blocks, plan_bake

    folder = usual_overlay(overlay)
    reporter = TerminalReporter(verbose)
    stack = tuple(parse_added(text) for text in added)
    kept = None if keep_blocks is None else parse_blocks(keep_blocks)
    wanted = BakeOptions(folder, strengths, added=stack, keep_blocks=kept, **options)  # type: ignore[arg-type]
    if plan_only:
        print_plan(plan_bake(wanted, reporter), as_json, bounds=REPORT_NAMES)
        return
    reports = bake(wanted, reporter)
    if as_json:
        print_json([report.to_json() for report in reports])
        return
    for report in reports:
        for line in report.lines(verbose):
            click.echo(line)
        if report.made:
            size = sum(file.stat().st_size for file in (folder / report.path).iterdir() if not file.is_symlink())
            click.echo(f"  {human_bytes(size)}; what changed: {folder / report.path / PAGE_NAME}")
    if any(report.made for report in reports):
        click.echo(f"next: ltxpack run {quoted(folder)} --prompt 'A paper boat drifts down a rainy street.'")
