"""``ltxpack serve``: videos over HTTP, by the interface that clients of video engines speak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ltxpack.cli.run import SESSION, given, settings_options
from ltxpack.cli.terminal import TerminalReporter, verbose_option
from ltxpack.errors import UsageError
from ltxpack.files.units import parse_duration, parse_size
from ltxpack.runtime.parallel.devices import RAY_HERE
from ltxpack.runtime.settings import SessionSettings
from ltxpack.serve.limits import FIXED, LEAST_KEPT, ServeLimits

SETTINGS = [one for one in SESSION if one.name not in FIXED]
# Options that are fields of the server's options as they are typed.
NAMED = ("output", "host", "port", "devices", "models", "allow_hosts", "ray", "workers")
MODULES = ("fastapi", "uvicorn", "python_multipart")


@click.command()
@click.argument("overlay", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on; 0.0.0.0: all of them.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any that is free.")
@click.option("--devices", metavar="0,1,…", help="Several cards: a worker each, which makes whole videos.")
@click.option("--api-key", metavar="KEY", envvar="LTXPACK_API_KEY", show_envvar=True, help="Ask every client for it.")
@click.option(
    "--allow-host", "allow_hosts", multiple=True, metavar="NAME",
    help="Without a key: a further name that clients reach the server by; *: any. Repeatable.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(file_okay=False, path_type=Path), default=Path("videos"), show_default=True,
    help="The folder of the videos and the jobs.",
)  # fmt: skip
@click.option(
    "--queue", default=ServeLimits.queue, show_default=True, type=click.IntRange(1), help="Jobs that may wait."
)
@click.option("--model", "models", multiple=True, metavar="NAME=RECIPE:STAGE1,STAGE2", help="A further model by name.")
@click.option(
    "--keep-videos", metavar="TIME", show_default="until they are deleted",
    help="Remove jobs and their videos so long after their end: 24h, 7d.",
)  # fmt: skip
@click.option(
    "--keep-bytes", metavar="SIZE", show_default="no bound",
    help="Remove the oldest finished videos beyond so many bytes: 50GB.",
)  # fmt: skip
@click.option(
    "--ray", is_flag=False, flag_value=RAY_HERE, metavar="[ADDRESS]",
    help="Actors of a Ray cluster make the videos. Without ADDRESS, which goes last, Ray starts here.",
)  # fmt: skip
@click.option(
    "--workers", type=click.IntRange(1), show_default="the GPUs of the cluster",
    help="With --ray: so many actors, which wait for GPUs that join later.",
)  # fmt: skip
@settings_options(*SETTINGS)
@verbose_option
def serve(
    overlay: Path,
    api_key: str | None,
    queue: int,
    keep_videos: str | None,
    keep_bytes: str | None,
    verbose: bool,
    **typed: Any,
) -> None:
    """Serve videos from OVERLAY as /v1/videos, which OpenAI's client speaks too."""
    try:
        from ltxpack.serve.server import ServeOptions
        from ltxpack.serve.server import serve as answer
    except ModuleNotFoundError as error:
        if error.name not in MODULES:
            raise
        extra = "pip install 'ltxpack[serve]'"
        raise UsageError(f"the package {error.name} is not installed", next=extra) from None
    if api_key == "":
        raise UsageError("--api-key is empty", next="leave --api-key out, or choose one")
    seconds = None if keep_videos is None else parse_duration(keep_videos, "--keep-videos", least=LEAST_KEPT)
    size = None if keep_bytes is None else parse_size(keep_bytes, "--keep-bytes", next="choose --keep-bytes 50GB")
    limits, session = (
        ServeLimits(queue=queue, keep_seconds=seconds, keep_bytes=size),
        SessionSettings(**given(SETTINGS)),
    )
    named = {name: typed[name] for name in NAMED}
    options = ServeOptions(overlay, api_key=api_key, session=session, limits=limits, **named)
    answer(options, TerminalReporter(verbose), click.echo)
