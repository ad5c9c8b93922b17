"""``ltxpack bake-lora``: LoRAs and the base become a complete transformer folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ltxpack.cli import terminal
from ltxpack.cli.lora_words import LoraCommand, StrengthType, lora_options
from ltxpack.errors import OverlayError, quoted
from ltxpack.files.units import human_bytes, human_seconds
from ltxpack.manifest import BAKES, BF16, FORMATS, TEXT_ENCODERS, read_manifest

if TYPE_CHECKING:
    from ltxpack.lora_bake import BakeReport


@click.command("bake-lora", cls=LoraCommand)
@click.argument("overlay", type=terminal.PathType(), required=False)
@click.option(
    "--strength", "strengths", type=StrengthType(), multiple=True, required=True,
    help="One bake each; repeatable. S@0-11,30:T is T in blocks 0 to 11 and 30, and S elsewhere.",
)  # fmt: skip
@lora_options
@click.option(
    "--format", "formats", type=click.Choice(FORMATS), multiple=True, default=(BF16,), show_default=True,
    help="How to store linears; one bake each, all from one read of the base; repeatable.",
)  # fmt: skip
@click.option("--name", help="Name of the bake; only with one strength and one format.")
@click.option("--text", is_flag=True, help="Bake the changes of text encoder and connectors too.")
@terminal.plan_option
@click.option("--force", is_flag=True, help="Make the bake again, even if there is one.")
@terminal.json_option
@terminal.verbose_option
def bake_lora(overlay: Path | None, plan_only: bool, as_json: bool, verbose: bool, **options: Any) -> None:
    """Bake LoRAs into OVERLAY/bakes/<name>/ from the clean base transformer.

    Without OVERLAY: the current folder if it is an overlay, else ./out. The distilled LoRA changes nearly every
    byte, so such a bake of the 22B model takes 38 GB; --plan says how much, exactly except for the two reports.
    """
    from ltxpack.lora_bake import REPORT_NAMES, BakeOptions, bake, plan_bake

    folder = terminal.usual_overlay(overlay)
    reporter = terminal.TerminalReporter(verbose)
    wanted = BakeOptions(folder, **options)
    if plan_only:
        plan = plan_bake(wanted, reporter)
        terminal.print_plan(plan, as_json, bounds=REPORT_NAMES)
        if "arithmetic" in plan and not as_json:
            told = plan["arithmetic"]
            click.echo(
                f"products of the LoRAs: {told['flop'] / 1e12:.3g} TFLOP, about {human_seconds(told['seconds'])} here "
                f"(rule {told['rule']}, kernel {told['kernel']}, {told['device']})"
            )
        return
    reports = bake(wanted, reporter)
    if as_json:
        terminal.print_json([report.to_json() for report in reports])
        return
    for report in reports:
        _print_report(report, folder, verbose)
    if any(report.made for report in reports):
        click.echo(f"next: {_next_command(reports, folder)}")


def _next_command(reports: Sequence[BakeReport], overlay: Path) -> str:
    """``run`` with the bakes that it takes by itself if any of these is among them, else with these by name; if it
    can use none, what ``run`` would advise. A bake whose LoRAs are all at 0 is the base.
    """
    from ltxpack.runtime.overlay import Overlay, choose, official_transformers
    from ltxpack.runtime.sampling.recipes import DISTILLED, HQ
    from ltxpack.runtime.settings import AUTO

    opened = Overlay(overlay, read_manifest(overlay))
    recipe = DISTILLED if opened.manifest.distilled else HQ
    names, texts = (
        [report.name for report in reports if report.path.startswith(f"{place}/")] for place in (BAKES, TEXT_ENCODERS)
    )
    made = [name for name in names if not all(lora.idle for lora in opened.manifest.bakes[name].loras)]
    of_first = [name for name in made if name.startswith(official_transformers(HQ)[0])]
    later = [name for name in made if name not in of_first]
    by_name = ((of_first or [AUTO])[-1], (later or [AUTO])[-1]) if recipe is HQ else ((made or [AUTO])[-1],) * 2
    advice = ""
    for asked in dict.fromkeys(((AUTO, AUTO), by_name)):
        try:
            taken = choose(opened, recipe, asked).stages
        except OverlayError as error:
            advice = error.next
        else:
            if asked == by_name or not set(made).isdisjoint(taken):
                flags = "" if recipe is HQ else f" --recipe {recipe.name}"
                flags += "".join(f" --stage{i} {name}" for i, name in enumerate(asked, 1) if name != AUTO)
                flags += f" --text-encoder {texts[-1]}" if texts else ""
                return f"ltxpack run {quoted(overlay)}{flags} --prompt 'A paper boat drifts down a rainy street.'"
    return advice


def _print_report(report: BakeReport, overlay: Path, verbose: bool) -> None:
    from ltxpack.lora_bake import PAGE_NAME

    folder = overlay / report.path
    for line in report.lines(verbose):
        click.echo(line)
    if report.made:
        files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
        size = sum(file.stat().st_size for file in files)
        click.echo(f"  {human_bytes(size)}; what changed: {folder / PAGE_NAME}")
    if report.path.startswith(f"{TEXT_ENCODERS}/"):
        click.echo(f"  ltxpack run uses it with --text-encoder {report.name}")
