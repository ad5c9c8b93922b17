"""The commands that make overlays and say what they hold: materialize, bake-lora, verify, inspect, demo."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ltxpack.cli.terminal import TerminalReporter, json_option, plan_option, print_json, print_plan, verbose_option
from ltxpack.errors import LtxpackError, UsageError, printable, quoted
from ltxpack.files.units import human_bytes, parse_size
from ltxpack.manifest import is_overlay
from ltxpack.runtime.sampling.recipes import HQ, RECIPES


@click.command()
@click.argument("source")
@click.argument("overlay", type=click.Path(path_type=Path))
@click.option("--checkpoint", metavar="REF", help="The all-in-one checkpoint.")
@click.option("--lora", metavar="REF", help="The distilled LoRA.")
@click.option("--upsampler", metavar="REF", help="The spatial x2 upsampler.")
@click.option("--text-encoder", metavar="REF", help="The Gemma 3 folder or repo.")
@click.option("--revision", help="Revision of SOURCE on the hub.")
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest shard to write.")
@click.option("--copy", is_flag=True, help="Copy files that could be linked.")
@plan_option
@click.option("--force", is_flag=True, help="Replace an overlay that is there.")
@json_option
@verbose_option
def materialize(
    source: str,
    overlay: Path,
    plan_only: bool,
    as_json: bool,
    verbose: bool,
    max_shard_size: str,
    **options: str | bool | None,
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
        bake = f"ltxpack bake-lora {quoted(overlay)} --strength 0.25 --strength 0.5"
        run = f"ltxpack run {quoted(overlay)} --stage1 base --stage2 base --prompt 'Waves on a beach'"
        click.echo(f"next: {bake if report.manifest.loras else run}")
    else:
        click.echo(f"{overlay}: already there, made from the same inputs; nothing to do")


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Say what PATH holds: a checkpoint, a LoRA file or an overlay. Reads headers only."""
    from ltxpack.materialize.inspect import inspect_path

    facts = inspect_path(path)
    if as_json:
        print_json(facts)
        return
    for line in _indented(facts):
        click.echo(printable(line))


def _indented(value: Any, indent: str = "") -> list[str]:
    """A JSON value as indented ``key: value`` lines; a list of plain values is one line, ``-`` stands for none."""
    lines: list[str] = []
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        flat = isinstance(item, list) and not any(isinstance(inner, (dict, list)) for inner in item)
        if flat:
            lines.append(f"{indent}{key}: {', '.join(map(str, item))}")
        elif isinstance(item, (dict, list)) and item:
            lines += [f"{indent}{key}:", *_indented(item, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {'-' if item is None else item}")
    return lines


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
@click.option("--name", help="Name of the bake (with one strength).")
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
    plan_only: bool,
    as_json: bool,
    verbose: bool,
    **options: str | bool | None,
) -> None:
    """Bake LoRAs into OVERLAY/bakes/<name>/ from the clean base transformer.

    Without OVERLAY: the current folder if it is an overlay, else ./out. The distilled LoRA changes nearly every
    byte, so such a bake of the 22B model takes 38 GB; --plan says how much, to the byte but for the two reports.
    """
    from ltxpack.lora_bake import PAGE_NAME, REPORT_NAMES, BakeOptions, bake, parse_added, plan_bake

    folder = overlay or (Path() if is_overlay(Path()) else Path("out"))
    reporter = TerminalReporter(verbose)
    stack = tuple(parse_added(text) for text in added)
    wanted = BakeOptions(folder, strengths, added=stack, **options)  # type: ignore[arg-type]
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


@click.command()
@click.argument("overlay", type=click.Path(path_type=Path))
@click.option("--repair", is_flag=True, help="Make what is damaged again, from the source and the clean base.")
@click.option("--source", metavar="SOURCE", help="Where the inputs are; default: the hub repos they came from.")
@click.option(
    "--lora", "loras", type=click.Path(path_type=Path), multiple=True, help="A bake's LoRA that is not in the overlay."
)
@json_option
@verbose_option
def verify(
    overlay: Path, repair: bool, source: str | None, loras: tuple[Path, ...], as_json: bool, verbose: bool
) -> int:
    """Check every file of OVERLAY; list all faults. Exit status 1 if there is any left."""
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
        # Written like an error, but without a next command of its own.
        click.echo(line.render().rpartition("\n")[0])
    if faults:
        click.echo(f"{overlay}: {len(faults)} fault(s)")
        foreign = [fault for fault in faults if fault.problem == NOT_OURS]
        if foreign:
            click.echo("  next: move what is not in the manifest out of the overlay, or delete it")
        if not repair and len(foreign) < len(faults):
            click.echo(f"  next: ltxpack verify {quoted(overlay)} --repair")
        return 1
    click.echo(f"{overlay}: every file as written")
    return 0


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("ltxpack-demo"))
@click.option("--recipe", type=click.Choice(tuple(RECIPES)), default=HQ.name, show_default=True)
@verbose_option
def demo(folder: Path, recipe: str, verbose: bool) -> None:
    """Make a tiny checkpoint of the real architecture in FOLDER, materialise, bake and run it.

    The last line printed is the path of the video.
    """
    from ltxpack.demo import run_demo

    video = run_demo(folder, TerminalReporter(verbose), recipe)
    click.echo(f"the overlay: {folder / 'overlay'}")
    click.echo(f"what a bake changed: {folder / 'overlay/bakes/distilled-0.5/coverage.html'}")
    click.echo(f"latents, frames and waveform: {video.with_suffix('.safetensors')}")
    click.echo("the video, 25 frames with sound:")
    click.echo(str(video))
