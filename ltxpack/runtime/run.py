"""One run from options to a file: first all cheap checks, then the video, then a rename."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ltxpack.errors import UnwrittenError, UsageError
from ltxpack.files.publish import check_writable, require_space
from ltxpack.files.tensorfile import tensor_nbytes
from ltxpack.files.units import human_bytes
from ltxpack.imports import import_libraries
from ltxpack.manifest import MANIFEST_NAME, is_overlay, read_manifest
from ltxpack.reporter import Reporter
from ltxpack.runtime import calibration, recipe_run
from ltxpack.runtime.media.mp4 import VideoWriter, check_output
from ltxpack.runtime.media.pictures import read_image
from ltxpack.runtime.recipe_run import Halfway
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling.shape import frame_rate
from ltxpack.runtime.session import Session
from ltxpack.runtime.settings import SessionSettings, SettingsGiven
from ltxpack.runtime.text.gemma import tell_cut
from ltxpack.runtime.weights.load import INDEX_SUFFIX

R = TypeVar("R")


@dataclass(frozen=True)
class RunOptions:
    """The arguments of ``ltxpack run``: ``given`` are settings of the video; others have the recipe's defaults.

    ``ray``: the address of a cluster that makes many videos, if any.
    """

    overlay: Path
    prompt: str = ""
    output: Path = Path("video.mp4")
    save_tensors: Path | None = None
    given: SettingsGiven = field(default_factory=SettingsGiven)
    session: SessionSettings = field(default_factory=SessionSettings)
    ray: str | None = None


@dataclass(frozen=True)
class Summary:
    """The facts of a run: the video's size in words, the transformer of each stage, the tiles in words, seconds per
    phase in order, :func:`peak_memory`, and :attr:`ActivationsRecorder.summary` if there is one.
    """

    output: Path
    shape: str
    transformers: tuple[str, ...]
    decoding: str
    seconds: dict[str, float]
    peaks: str
    activations: str = ""


def run_to_file(options: RunOptions, reporter: Reporter) -> Summary:
    """Make the video of ``options``; each file appears by rename when it is whole.

    Raises UsageError, OverlayError, DeviceError, FormatError.
    """
    request = Request.of(options.prompt, **options.given)
    check_output(options.output)
    frame_rate(request.shape.fps)
    for path in dict.fromkeys(image.path for image in request.images):
        read_image(path)
    if options.save_tensors is not None:
        check_writable(options.save_tensors, "--save-tensors", "video.safetensors")
        frames = tensor_nbytes("F32", (request.shape.frames, request.shape.height, request.shape.width, 3))
        require_space(options.save_tensors.absolute().parent, frames, 1)
    check_outputs(options, [("-o", options.output)], reporter)
    with Session(options.overlay, options.session, reporter) as session:
        session.process_ends = True
        choice = session.transformers(request.recipe)
        reporter.note(choice.note)
        tell_cut(session.overlay, request.named_prompts, reporter)
        import_libraries()
        write_video(session, request, options.output, save_tensors=options.save_tensors, once=True)
        seconds, decoding, peaks = dict(session.timings.seconds), session.decoding, peak_memory(session.device)
        activations = session.activations.summary if session.activations is not None else ""
    shape = request.shape
    rate = f"{shape.frames} frames at {shape.fps:g} fps, {shape.frames / shape.fps:.1f} s with sound"
    words = f"{shape.width}x{shape.height}, {rate}"
    return Summary(options.output, words, choice.stages, decoding, seconds, peaks, activations)


def peak_memory(device: torch.device) -> str:
    """The peak memory of this process, on the host and on a card, in words."""
    host = human_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    card = f", {human_bytes(torch.cuda.max_memory_allocated(device))} device" if device.type == "cuda" else ""
    return f"peak memory: {host} host{card}"


def check_outputs(options: RunOptions, videos: Sequence[tuple[str, Path]], reporter: Reporter) -> None:
    """Look at all files that the run writes: ``videos``, each with words for it, and the other outputs.

    Raises UsageError if two outputs are one file, or if one would spoil the weights of an overlay. Warns of others
    inside an overlay, which ``ltxpack verify`` reports as faults.
    """
    others = {"--save-tensors": options.save_tensors, calibration.FLAG: options.session.save_activations}
    seen: dict[Path, str] = {}
    for flag, path in (*videos, *others.items()):
        if path is not None:
            first = seen.setdefault(Path(path).resolve(), flag)
            if first != flag:
                raise UsageError(f"{flag} and {first} are one file", file=path, next="choose two names")
    told: set[Path] = set()
    for path, flag in seen.items():
        overlay = next((place for place in path.parents if is_overlay(place)), None)
        if overlay is None:
            continue
        if flag in others and _is_among_weights(path, overlay):
            problem = f"lies among the files of the overlay {overlay}, which could not be loaded any more"
            raise UsageError(problem, file=path, next=f"choose {flag} in another folder")
        if path.parent not in told:
            told.add(path.parent)
            why = "verify reports every file that is not the overlay's"
            reporter.warn(f"{path.parent}: lies in the overlay {overlay}; {why}")


def _is_among_weights(path: Path, overlay: Path) -> bool:
    """Whether ``path`` is a file of ``overlay``, or would be another weight file in a folder of its weights."""
    known = {overlay / record.path for record in read_manifest(overlay).records()} | {overlay / MANIFEST_NAME}
    folders = {file.parent for file in known if file.suffix == ".safetensors"}
    return path in known or (path.name.endswith((".safetensors", INDEX_SUFFIX)) and path.parent in folders)


def write_video(
    session: Session,
    request: Request,
    output: Path,
    *,
    save_tensors: Path | None = None,
    following: Request | None = None,
    once: bool = False,
    halfway: Halfway | None = None,
) -> str:
    """Make the video of ``request`` and write it while it is decoded; returns the blake3 of the file.

    ``session.timings`` gets its seconds. ``following``, ``once``, ``halfway`` as in :func:`recipe_run.generate`. Raises
    LtxpackError and leaves ``output`` unchanged, or UnwrittenError, which lists the files that stay.
    """
    latents, waveform, rate = recipe_run.generate(session, request, following=following, once=once, halfway=halfway)
    kept, shape = list[Tensor](), request.shape

    def keep(frames: Tensor) -> None:
        if save_tensors is not None:
            kept.append(frames.cpu())

    def write() -> str:
        with VideoWriter(output, shape.width, shape.height, shape.fps, rate) as writer:

            def take(frames: Tensor) -> None:
                writer.write(frames)
                keep(frames)

            recipe_run.decode_video(session, latents.video, take)
            writer.write_audio(waveform)
        return writer.blake3

    outputs, recorder = _Outputs(), session.activations
    digest = outputs.attempt(output, lambda: session.within_memory(write))
    if save_tensors is not None:
        if digest is None:  # the writer has not taken all frames
            kept.clear()
            session.within_memory(lambda: recipe_run.decode_video(session, latents.video, keep))
        whole = recipe_run.finish(session, request, latents, kept, waveform, rate)
        outputs.attempt(save_tensors, lambda: whole.save_tensors(save_tensors))
    outputs.attempt(None if recorder is None else recorder.path, session.end_video)
    outputs.check()
    assert digest is not None
    return digest


@dataclass
class _Outputs:
    """The files of one video: if one cannot be written, the others still are. ``fault``: that of the first."""

    written: list[Path] = field(default_factory=list)
    fault: UnwrittenError | None = None

    def attempt(self, path: Path | None, write: Callable[[], R]) -> R | None:
        """The result of ``write``, which writes ``path``; None if ``path`` cannot be written."""
        try:
            result = write()
        except UnwrittenError as error:
            # A copy: the error's own traceback would keep tensors alive.
            self.fault = self.fault or error.keeping()
            return None
        if path is not None:
            self.written.append(path)
        return result

    def check(self) -> None:
        """Raises UnwrittenError if a file could not be written."""
        if self.fault is not None:
            raise self.fault.keeping(*self.written)
