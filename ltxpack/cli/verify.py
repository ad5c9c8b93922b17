"""``ltxpack verify``: an overlay against its manifest, and its repair."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from ltxpack.cli.terminal import PathType, TerminalReporter, json_option, print_json, verbose_option
from ltxpack.errors import LtxpackError, UsageError, quoted


@click.command()
@click.argument("overlay", type=PathType())
@click.option("--repair", is_flag=True, help="Write damaged files again, from the source and the clean base.")
@click.option("--source", metavar="SOURCE", help="Where the inputs are; default: the hub repos in the manifest.")
@click.option(
    "--lora", "loras", metavar="FILE", multiple=True, help="A bake's LoRA that is not in the overlay, as for bake-lora."
)
@json_option
@verbose_option
def verify(
    overlay: Path, repair: bool, source: str | None, loras: tuple[str, ...], as_json: bool, verbose: bool
) -> int:
    """Compare every file of OVERLAY with the manifest and list all faults. Exit status 1 if a fault is left."""
    if (source or loras) and not repair:
        raise UsageError("--source and --lora go with --repair", next=f"ltxpack verify {quoted(overlay)} --repair")
    from ltxpack.repack.verify import NOT_OURS
    from ltxpack.repack.verify import verify as check

    reporter = TerminalReporter(verbose)
    if repair:
        from ltxpack.lora_bake.bake import restore

        faults = restore(overlay, reporter, source=source, loras=loras)
    else:
        faults = check(overlay, reporter)
    if as_json:
        print_json({"overlay": str(overlay), "ok": not faults, "faults": [asdict(fault) for fault in faults]})
        return int(bool(faults))
    for fault in faults:
        line = LtxpackError(fault.problem, file=fault.path, expected=fault.expected, found=fault.found)
        # Looks like an error, but without a next command of its own.
        click.echo(line.render().rpartition("\n")[0])
    if faults:
        click.echo(f"{overlay}: {len(faults)} fault(s)")
        foreign = [fault for fault in faults if fault.problem == NOT_OURS]
        if foreign:
            click.echo("  next: move files that are not in the manifest out of the overlay, or delete them")
        if not repair and len(foreign) < len(faults):
            click.echo(f"  next: ltxpack verify {quoted(overlay)} --repair")
        return 1
    click.echo(f"{overlay}: every file as written")
    return 0
