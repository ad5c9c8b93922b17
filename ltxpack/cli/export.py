"""``ltxpack export``: an overlay's weights as one file for other programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ltxpack.cli import terminal
from ltxpack.cli.lora_words import LoraCommand, StrengthType, lora_options
from ltxpack.errors import UsageError
from ltxpack.files.units import human_bytes
from ltxpack.ltx23.forms import PARTS
from ltxpack.manifest import BF16, FORMATS, FP8
from ltxpack.strength import Strength

if TYPE_CHECKING:
    from ltxpack.export import ExportOptions

# Parts in the file -> the folder for ComfyUI, and the nodes that take the file there (spec 09, section 2).
COMFY = {
    "all": (
        "ComfyUI: put it into models/checkpoints; CheckpointLoaderSimple takes transformer and video VAE, "
        "LTXVAudioVAELoader the sound, LTXAVTextEncoderLoader the text projection"
    ),
    "transformer": "ComfyUI: put it into models/diffusion_models; UNETLoader takes it",
}
# Parts in the file -> how the official code takes it, with the flag for its form.
OFFICIAL = {"all": "it takes the place of the checkpoint", "transformer": "--transformer-path takes it"}
OFFICIAL_FLAGS = {BF16: "", FP8: ", with --quantization fp8-scaled-mm"}


@click.command(cls=LoraCommand)
@click.argument("overlay", type=terminal.PathType(), required=False)
@click.option("-o", "--output", type=terminal.PathType(), required=True, help="The safetensors file to write.")
@click.option("--bake", help="A bake of the overlay instead of the base.")
@click.option(
    "--strength", type=StrengthType(), help="Merge the main LoRA on the way, at this strength, without writing a bake."
)
@lora_options
@click.option(
    "--format", "form", type=click.Choice(FORMATS), help="How to store linears.  [default: as in the bake, else bf16]"
)
@click.option(
    "--parts", type=click.Choice(PARTS), default=PARTS[0], show_default=True,
    help="The whole checkpoint, or the transformer with the connectors.",
)  # fmt: skip
@click.option("--source", help="File, folder or repo with the checkpoint, if the overlay lacks its metadata.")
@terminal.plan_option
@click.option("--force", is_flag=True, help="Replace an existing file, and merge LoRAs that need bake-lora --force.")
@terminal.json_option
@terminal.verbose_option
def export(overlay: Path | None, plan_only: bool, as_json: bool, verbose: bool, **options: Any) -> None:
    """Write OVERLAY's weights as one safetensors file with the official names, for ComfyUI and the official code.

    Without OVERLAY: the current folder if it is an overlay, else ./out. --bake copies a bake byte for byte; --strength
    or --format makes one on the way. scale_shift_table tensors are widened to float32, their dtype in official files.
    """
    from ltxpack.export import export as write
    from ltxpack.export import plan_export

    reporter = terminal.TerminalReporter(verbose)
    wanted = _wanted(terminal.usual_overlay(overlay), options)
    if plan_only:
        size = plan_export(wanted, reporter, headers_only=True).size
        files = [{"path": str(wanted.output), "bytes": size, "action": "write"}]
        terminal.print_plan({"files": files, "missing": [], "total_bytes": size}, as_json)
        return
    plan = write(wanted, reporter)
    if as_json:
        facts = {"path": str(wanted.output), "bytes": plan.size, "format": plan.form}
        terminal.print_json({**facts, "tensors": plan.tensors, "quantised": plan.quantised, "widened": plan.widened})
        return
    widened = f", {plan.widened} tables widened to float32" if plan.widened else ""
    click.echo(f"{wanted.output}: {human_bytes(plan.size)}, {plan.tensors} tensors{widened}")
    if plan.quantised:
        uncalibrated = plan.form == FP8 and plan.bake is not None and plan.bake.calibration is None
        told = "; not calibrated: input scales are 1" if uncalibrated else ""
        click.echo(f"  {plan.quantised:,} linears in {plan.form}{told}")
    click.echo("  differs from the published file; pass it on only under the same licence, which is in its metadata")
    unread = plan.form not in OFFICIAL_FLAGS
    official = f"it cannot read {plan.form}" if unread else OFFICIAL[wanted.parts] + OFFICIAL_FLAGS[plan.form]
    click.echo(f"  {COMFY[wanted.parts]}")
    click.echo(f"  official code: {official}")


def _wanted(overlay: Path, options: dict[str, Any]) -> ExportOptions:
    """The options of an export. Raises UsageError for flags that do not go together."""
    from ltxpack.export import ExportOptions
    from ltxpack.lora_bake import BakeOptions

    strength = options.pop("strength")
    shared = [field for field in dataclasses.fields(BakeOptions) if field.name in options and field.name != "force"]
    making = {field.name: options.pop(field.name) for field in shared}
    given = [field.name for field in shared if making[field.name] != field.default]
    asked = ["strength", *given] if strength is not None else given
    wanted = ExportOptions(overlay, **options)
    if wanted.bake is not None and asked:
        flags = [{"added": "--add"}.get(name, f"--{name.replace('_', '-')}") for name in asked]
        advice = "leave --bake out, or those flags"
        raise UsageError("--bake is copied as it is", found=", ".join(flags), next=advice)
    if wanted.bake is not None or (not asked and wanted.form in (None, BF16)):
        return wanted
    if strength is None and (making["lora"] or making["added"]):
        raise UsageError("--lora and --add need a --strength", next="add --strength, 0 for the added ones alone")
    if strength is None and wanted.form in (None, BF16) and {"rule", "device", "allow_unmatched"}.issuperset(given):
        idle = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError("the base is copied as it is", found=idle, next="leave those flags out, or add --strength")
    make = BakeOptions(overlay, (strength or Strength(0.0),), formats=(wanted.form or BF16,), **making)
    return dataclasses.replace(wanted, make=make, form=None)
