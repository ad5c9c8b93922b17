"""Reads a prompts file, and checks all its videos before any runs.

Reads lines (in the forms of :mod:`prompts_form`) and pictures, knows no model. An absent field has the value of its
flag; paths are relative to the folder of the file.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import jsonschema

from ltxpack.errors import BadLinesError, LtxpackError, UsageError
from ltxpack.files.tensorfile import open_source
from ltxpack.files.typed import at_home
from ltxpack.manifest import load_schema
from ltxpack.runtime.media.mp4 import check_output
from ltxpack.runtime.media.pictures import read_image
from ltxpack.runtime.prompts_form import Entry, entries, unknown_field
from ltxpack.runtime.record import is_free
from ltxpack.runtime.request import ImageSpec, Request
from ltxpack.runtime.sampling.shape import frame_rate
from ltxpack.runtime.settings import Settings, SettingsGiven, type_of

MAX_BYTES = 64 * 1024 * 1024
MAX_FAULT_LENGTH = 300
# Leaves room for the longer name of a temporary file.
MAX_NAME_BYTES = 230


@dataclass(frozen=True)
class PromptsLine:
    """A line of a prompts file, ``number`` from 1: the video and its path; ``name`` is ``line 1``."""

    number: int
    name: str
    request: Request
    output: Path

    def from_anywhere(self) -> PromptsLine:
        """The line with absolute paths, for a process in any folder."""
        images = tuple(replace(image, path=image.path.absolute()) for image in self.request.images)
        request = replace(self.request, settings=replace(self.request.settings, images=images))
        return replace(self, request=request, output=self.output.absolute())


def read_lines(path: Path, given: SettingsGiven, output: Path | None = None) -> list[PromptsLine]:
    """The videos of the prompts file ``path``; ``given`` and ``output`` are the defaults of its lines.

    Without ``output``, line 7 of ``FILE.jsonl`` goes to ``FILE-0007.mp4`` beside it. Raises BadLinesError with every
    line at fault; UsageError for a file without lines; SourceError for one that cannot be read.
    """
    reader = _LineReader(path, given, output)
    found, faults = [], []
    listed = entries(path, _content(path))
    for entry in listed:
        try:
            found.append(reader.read(entry))
        except LtxpackError as error:
            faults.append(f"{entry.name}: {in_a_line(error)}")
    if faults:
        word = listed[0].word
        problem = f"{len(faults)} of {len(listed)} {word}s cannot be used; nothing was run"
        again = f"correct these {word}s and run the same command again"
        raise BadLinesError(problem, file=path, items=faults, next=again)
    return found


def in_a_line(error: LtxpackError) -> str:
    """The text of ``error`` in one line, without its ``next``."""
    return ", ".join(line.strip() for line in error.render().splitlines()[:-1])


def _content(path: Path) -> bytes:
    with open_source(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UsageError("is too large", file=path, expected=f"at most {MAX_BYTES} bytes")
    return data


@dataclass
class _LineReader:
    """Reads lines one after another; remembers the outputs that are taken and the pictures that can be read."""

    path: Path
    given: SettingsGiven
    output: Path | None
    taken: dict[Path, str] = field(default_factory=dict)
    pictures: set[Path] = field(default_factory=set)

    def read(self, entry: Entry) -> PromptsLine:
        said = _said(entry)
        request = Request.of(said["prompt"], **self._settings(said))
        for image in request.images:
            if image.path not in self.pictures:
                read_image(image.path)
                self.pictures.add(image.path)
        frame_rate(request.shape.fps)
        return PromptsLine(entry.number, entry.name, request, self._output(said.get("output"), entry))

    def _settings(self, line: Mapping[str, Any]) -> SettingsGiven:
        """The settings of a line: its own, then those given for all lines."""
        found: dict[str, Any] = {**self.given}
        for one in fields(Settings):
            if one.name in line:
                # JSON has one kind of number: 64.0 is an integer to the schema.
                found[one.name] = int(line[one.name]) if type_of(one) is int else line[one.name]
        if "images" in line:
            frames = Settings.of(found).num_frames
            found["images"] = [self._image(image, frames) for image in line["images"]]
        return cast(SettingsGiven, found)

    def _image(self, said: Mapping[str, Any], num_frames: int) -> ImageSpec:
        frame = said.get("frame", 0)
        path = self.path.parent / at_home(said["path"])
        return ImageSpec(path, num_frames - 1 if frame == "last" else int(frame), float(said.get("strength", 1.0)))

    def _output(self, named: str | None, entry: Entry) -> Path:
        if named is not None:
            output = self.path.parent / at_home(named)
        else:
            output = self.output or self.path.with_name(f"{self.path.stem}-{entry.number:04}.mp4")
        if not output.name.isprintable() or len(os.fsencode(output.name)) > MAX_NAME_BYTES:
            raise UsageError("not a file name", found=ascii(output.name[:MAX_NAME_BYTES]))
        check_output(output)
        place = Path(os.path.realpath(output.parent)) / output.name
        first = self.taken.setdefault(place, entry.name)
        if first != entry.name:
            why = f"; -o is for a single {entry.word}" if named is None and self.output else ""
            raise UsageError(f"has the same output as {first}{why}", file=output)
        is_free(output)
        return output


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(load_schema("prompts")))


def _said(entry: Entry) -> dict[str, Any]:
    """The fields of ``entry``. Raises UsageError with every fault of them."""
    if entry.problem:
        raise UsageError(entry.problem)
    faults = [
        ": ".join([*(str(part) for part in error.absolute_path), fault])
        for error in sorted(
            _validator().iter_errors(entry.value), key=lambda error: list(map(str, error.absolute_path))
        )
        for fault in _in_words(error)
    ]
    if faults:
        raise UsageError("; ".join(faults))
    said: dict[str, Any] = entry.value
    return said


def _in_words(error: jsonschema.ValidationError) -> list[str]:
    """The validator's error in words, with a sentence for each unknown field."""
    if error.validator != "additionalProperties":
        return [error.message[:MAX_FAULT_LENGTH]]
    known, instance = cast(Any, error.schema)["properties"], cast(dict[str, Any], error.instance)
    of_image = bool(error.absolute_path)
    return [unknown_field(name, known, of_image=of_image) for name in instance if name not in known]
