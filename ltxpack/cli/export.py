"""``ltxpack export``: an overlay's weights as one file for other programs."""

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
from ltxpack.files.units import human_bytes

# By what the file holds: where a program looks for the file, and what takes it there (spec 09, section 2).
TAKEN_BY = {
    "all": (
        "ComfyUI: put it into models/checkpoints; CheckpointLoaderSimple takes transformer and video VAE, "
        "LTXVAudioVAELoader the sound, LTXAVTextEncoderLoader the text projection",
        "official code: it takes the place of the checkpoint",
    ),
    "transformer": (
        "ComfyUI: put it into models/diffusion_models; UNETLoader takes it",
        "official code: --transformer-path takes it",
    ),
}


@click.command()
@click.argument("overlay", type=click.Path(path_type=Path), required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The safetensors file to write.")
@click.option("--bake", help="A bake of the overlay instead of the base.")
@click.option(
    "--parts",
    type=click.Choice(tuple(TAKEN_BY)),
    default="all",
    show_default=True,
    help="The whole checkpoint, or the transformer with the connectors.",
)
@plan_option
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@json_option
@verbose_option
def export(
    overlay: Path | None,
    output: Path,
    bake: str | None,
    parts: str,
    plan_only: bool,
    force: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Write OVERLAY's weights as one bf16 safetensors file with the official names, for ComfyUI and the official code.

    Without OVERLAY: the current folder if it is an overlay, else ./out. Tensors are copied byte for byte; the
    scale_shift_table tensors, which official files hold in float32, are widened.
    """
    from ltxpack.export import ExportOptions, plan_export
    from ltxpack.export import export as write

    wanted = ExportOptions(usual_overlay(overlay), output, bake, parts, force)
    if plan_only:
        size = plan_export(wanted).size
        files = [{"path": str(output), "bytes": size, "action": "write"}]
        print_plan({"files": files, "missing": [], "total_bytes": size}, as_json)
        return
    report = write(wanted, TerminalReporter(verbose))
    if as_json:
        facts = {"path": str(report.path), "bytes": report.size, "blake3": report.blake3}
        print_json({**facts, "tensors": report.tensors, "widened": report.widened})
        return
    widened = f", {report.widened} tables widened to float32" if report.widened else ""
    click.echo(f"{report.path}: {human_bytes(report.size)}, {report.tensors} tensors{widened}")
    click.echo(
        "  changed from the published file; it is passed on under the same licence only, which is in its metadata"
    )
    for line in TAKEN_BY[parts]:
        click.echo(f"  {line}")
