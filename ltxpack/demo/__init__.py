"""The demo: takes a tiny checkpoint of the real architecture with random weights through the whole path.

It downloads nothing: demo/checkpoint.py makes the inputs, and ``materialize``, ``bake-lora`` and ``run`` treat them
like those of the 22B model.
"""

from __future__ import annotations

from pathlib import Path

from ltxpack.demo.checkpoint import ENCODER, NAME, write_source
from ltxpack.errors import OverlayError
from ltxpack.files.foreign import entries
from ltxpack.imports import uncollected
from ltxpack.lora_bake import BakeOptions, bake
from ltxpack.materialize import Options, materialize
from ltxpack.reporter import Reporter
from ltxpack.runtime.sampling.recipes import HQ, RECIPES

PROMPT = "A paper boat drifts down a rainy street while a street organ plays."


def run_demo(folder: Path, reporter: Reporter, recipe: str = HQ.name) -> Path:
    """Make source files, overlay, two bakes and one video; keeps finished ones. Returns the video's path.

    Raises OverlayError if ``folder`` holds something that is not a demo.
    """
    source, overlay = folder / "source", folder / "overlay"
    ours = source.is_dir() and all(path.name.startswith((NAME, ENCODER)) for path in entries(source))
    if folder.exists() and any(entries(folder)) and not ours:
        raise OverlayError(
            "is not empty and not a demo", file=folder, expected="a new folder", next="ltxpack demo OTHER_FOLDER"
        )
    reporter.note(f"1/4 tiny checkpoint of the real architecture: {source}")
    write_source(source)
    reporter.note(f"2/4 materialize: {overlay}")
    materialize(Options(str(source), overlay), reporter)
    reporter.note(f"3/4 bake-lora: strengths {' and '.join(map(str, HQ.strengths))}")
    bake(BakeOptions(overlay, HQ.strengths), reporter)
    reporter.note("4/4 run")
    # The runtime imports torch, which the steps before do not need.
    with uncollected():
        from ltxpack.runtime.run import RunOptions, run_to_file
    from ltxpack.runtime.settings import SessionSettings, SettingsGiven

    given: SettingsGiven = {"recipe": recipe, "height": 192, "width": 320, "num_frames": 25}
    if "steps" not in RECIPES[recipe].unused:
        given["steps"] = 4
    if "video_stg_blocks" in RECIPES[recipe].defaults:
        given["video_stg_blocks"] = given["audio_stg_blocks"] = (1,)  # it has two

    session = SessionSettings(device="cpu", dtype="float32", cache=False)
    options = RunOptions(overlay, PROMPT, folder / "video.mp4", folder / "video.safetensors", given, session)
    return run_to_file(options, reporter).output
