"""``ltxpack serve``: a server that makes videos for its clients, with the /v1/videos interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ltxpack.cli.run import SESSION, given, settings_options
from ltxpack.cli.terminal import PathType, TerminalReporter, verbose_option
from ltxpack.errors import UsageError
from ltxpack.files.units import parse_duration, parse_size
from ltxpack.imports import uncollected
from ltxpack.runtime.parallel.devices import RAY_HERE
from ltxpack.runtime.settings import SessionSettings
from ltxpack.serve.limits import FIXED, LEAST_KEPT, ServeLimits

SETTINGS = [one for one in SESSION if one.name not in FIXED]
# The packages of ``ltxpack[serve]``.
MODULES = ("fastapi", "uvicorn", "python_multipart")


@click.command()
@click.argument("overlay", type=PathType())
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all of them.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="Port; 0: any free one.")
@click.option("--devices", metavar="0,1,…", help="Several cards; each has a worker, which makes whole videos.")
@click.option("--api-key", metavar="KEY", envvar="LTXPACK_API_KEY", show_envvar=True, help="Every client must send it.")
@click.option(
    "--allow-host", "allow_hosts", multiple=True, metavar="NAME",
    help="Without a key: clients may also reach the server by this name; *: by any. Repeatable.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=PathType(file_okay=False), default=Path("videos"), show_default=True,
    help="Folder of videos and jobs.",
)  # fmt: skip
@click.option(
    "--queue", default=ServeLimits.queue, show_default=True, type=click.IntRange(1), help="Most waiting jobs."
)
@click.option("--model", "models", multiple=True, metavar="NAME=RECIPE:STAGE1,STAGE2", help="Add a model. Repeatable.")
@click.option(
    "--keep-videos", metavar="TIME", show_default="until they are deleted",
    help="Remove a job and its video this long after the job ended: 24h, 7d.",
)  # fmt: skip
@click.option(
    "--keep-bytes", metavar="SIZE", show_default="no bound",
    help="Remove the oldest finished videos if all together have more bytes: 50GB.",
)  # fmt: skip
@click.option(
    "--ray", is_flag=False, flag_value=RAY_HERE, metavar="[ADDRESS]",
    help="Actors of a Ray cluster make the videos. Without ADDRESS, --ray goes last and starts Ray here.",
)  # fmt: skip
@click.option(
    "--workers", type=click.IntRange(1), show_default="the GPUs of the cluster",
    help="With --ray: number of actors; some may wait for GPUs that join later.",
)  # fmt: skip
@settings_options(*SETTINGS)
@verbose_option
def serve(
    overlay: Path, queue: int, keep_videos: str | None, keep_bytes: str | None, verbose: bool, **options: Any
) -> None:
    """Serve videos from OVERLAY over HTTP, with the /v1/videos interface that OpenAI's client uses."""
    try:
        with uncollected():
            from ltxpack.serve.server import ServeOptions
            from ltxpack.serve.server import serve as answer
    except ModuleNotFoundError as error:
        if error.name not in MODULES:
            raise
        raise UsageError(f"the package {error.name} is not installed", next="pip install 'ltxpack[serve]'") from None
    if options["api_key"] == "":
        raise UsageError("--api-key is empty", next="leave --api-key out, or choose a key")
    seconds = None if keep_videos is None else parse_duration(keep_videos, "--keep-videos", least=LEAST_KEPT)
    size = None if keep_bytes is None else parse_size(keep_bytes, "--keep-bytes", next="choose --keep-bytes 50GB")
    limits = ServeLimits(queue=queue, keep_seconds=seconds, keep_bytes=size)
    session = SessionSettings(**given(SETTINGS))
    for one in SETTINGS:
        del options[one.name]
    answer(ServeOptions(overlay, session=session, limits=limits, **options), TerminalReporter(verbose), click.echo)
