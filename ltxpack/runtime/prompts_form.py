"""The forms of a prompts file: a JSON object a line, one JSON document, or plain text.

Knows the names of users and other tools for our fields, and the forms that it refuses. Opens no file.
"""

from __future__ import annotations

import codecs
import dataclasses
import difflib
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltxpack.errors import FormatError, UsageError, clipped
from ltxpack.files.bounded_json import JsonFault, refuse_crowded
from ltxpack.files.tensorfile import parse_json
from ltxpack.runtime.settings import SessionSettings, Settings, flag_of

LINE, ITEM = "line", "item"
# Endings of plain text, where each line is a prompt. Any other name means JSON.
PLAIN_SUFFIXES = ("", ".txt")
TABLE_SUFFIXES = (".csv", ".tsv")
# A word in brackets begins many a prompt, and no JSON that is of use here.
JSON_START = re.compile(r"\{|\[(?!\s*[^\W\d])")
WANTED = 'lines like {"prompt": "…", "output": "a.mp4"}'
WRITE = "write a JSON object per line"
# The mark of UTF-32 begins like that of UTF-16, so it comes first.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
# Other tools' name of a field, in lower case with underscores -> ours.
OTHER_NAMES = {
    **dict.fromkeys(("text", "caption", "positive", "positive_prompt", "description", "prompt_text"), "prompt"),
    **dict.fromkeys(("negative", "neg_prompt", "n_prompt", "uc", "negative_text"), "negative_prompt"),
    **dict.fromkeys(("random_seed", "noise_seed", "manual_seed"), "seed"),
    **dict.fromkeys(("frames", "n_frames", "frame_count", "video_length", "length", "frame_num"), "num_frames"),
    **dict.fromkeys(("duration", "seconds"), "num_frames (seconds times fps, as a multiple of 8 plus 1)"),
    **dict.fromkeys(("frame_rate", "framerate", "rate"), "fps"),
    **dict.fromkeys(("num_inference_steps", "inference_steps", "sampling_steps", "sample_steps", "num_steps"), "steps"),
    **dict.fromkeys(("w", "image_width", "video_width"), "width"),
    **dict.fromkeys(("h", "image_height", "video_height"), "height"),
    **dict.fromkeys(("size", "resolution", "aspect_ratio", "video_size"), "height and width"),
    **dict.fromkeys(("image", "image_path", "input_image", "init_image", "start_image", "first_frame", "first_image"),
                    'images: [{"path": "a.png"}]'),
    **dict.fromkeys(("last_frame", "end_image", "last_image", "end_frame"),
                    'images: [{"path": "a.png", "frame": "last"}]'),
    **dict.fromkeys(("out", "output_path", "output_file", "filename", "file_name", "save_path", "name"), "output"),
    **dict.fromkeys(("pipeline", "mode"), "recipe"),
    **dict.fromkeys(("prompts", "videos", "items", "requests"), 'the list alone, [{"prompt": "a"}, {"prompt": "b"}]'),
}  # fmt: skip
OTHER_NAMES_OF_IMAGES = {
    **dict.fromkeys(("image", "file", "filename", "image_path", "url", "src"), "path"),
    **dict.fromkeys(("frame_idx", "frame_index", "index", "start", "start_frame", "frame_num"), "frame"),
    **dict.fromkeys(("weight", "conditioning_strength", "scale", "image_strength"), "strength"),
}  # fmt: skip
_COMMA = "; a comma stands before a closing bracket"
GUIDANCE = ("cfg", "cfg_scale", "guidance", "guidance_scale")


@dataclass(frozen=True)
class Entry:
    """A video in the file: ``value`` is the JSON value, or ``problem`` says why there is none."""

    word: str
    number: int
    value: Any = None
    problem: str = ""

    @property
    def name(self) -> str:
        """``line 3``; in one JSON document ``item 3``."""
        return f"{self.word} {self.number}"


def entries(path: Path, data: bytes) -> list[Entry]:
    """The entries of the prompts file ``path``, in order. Raises UsageError for a file of another form."""
    data = _utf8(path, data).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    lines = [(number, line.strip()) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    if not lines:
        raise UsageError("holds no line", file=path, expected=WANTED, next=WRITE)
    first = lines[0][1].decode("utf-8", "replace")
    found = [_json_line(number, line) for number, line in lines]
    if not JSON_START.match(first) and not any(isinstance(entry.value, dict) for entry in found):
        if found[0].problem or path.suffix.lower() in PLAIN_SUFFIXES:
            _refuse_other_forms(path, first, len(lines))
            return [_plain(number, line) for number, line in lines]
    elif found[0].problem or (len(found) == 1 and isinstance(found[0].value, list)):
        # One document of many lines, or lines with a fault in the first.
        try:
            return _items(path, data)
        except JsonFault as fault:
            if first[:1] == "[" or first == "{":
                again = "correct it, then run the same command again"
                raise UsageError("is not sound JSON", file=path, expected=WANTED, found=fault, next=again) from None
    return found


def unknown_field(name: str, known: Collection[str], *, of_image: bool = False) -> str:
    """The sentence for an unknown field, with the field that the user may mean."""
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_").replace(" ", "_")
    meant = plain if plain in known else (OTHER_NAMES_OF_IMAGES if of_image else OTHER_NAMES).get(plain)
    if meant is None and not of_image:
        flags = {one.name: flag_of(one) for table in (Settings, SessionSettings) for one in dataclasses.fields(table)}
        flag = "--video-cfg and --audio-cfg" if plain in GUIDANCE else flags.get(plain)
        if flag is not None:
            return f"there is no field {clipped(name, 60)!r}; give {flag} on the command line, for all videos"
    if meant is None:
        meant = next(iter(difflib.get_close_matches(plain, known, n=1, cutoff=0.75)), None)
    hint = f"did you mean {meant}?" if meant else f"there are {', '.join(known)}"
    return f"there is no field {clipped(name, 60)!r}; {hint}"


def _utf8(path: Path, data: bytes) -> bytes:
    """``data`` as UTF-8 without a byte order mark. Raises UsageError for bytes that are no text."""
    for mark, encoding in MARKS:
        if data.startswith(mark):
            try:
                data = data.removeprefix(mark) if encoding == "utf-8" else data.decode(encoding).encode()
            except UnicodeDecodeError as error:
                raise UsageError(f"is not sound {encoding.upper()} text", file=path, found=error.reason) from None
            break
    if b"\0" in data:
        # Every other byte of English text in UTF-16 is a zero.
        wide = data[:2].count(b"\0") == 1 and data[:64].count(b"\0") * 3 > len(data[:64])
        found = "UTF-16 without a byte order mark" if wide else "binary data (a spreadsheet, an archive?)"
        raise UsageError("is not a prompts file", file=path, expected=WANTED, found=found, next="save it as UTF-8 text")
    return data


def _json_line(number: int, line: bytes) -> Entry:
    # A comma behind it is left over from a list.
    try:
        return Entry(LINE, number, parse_json(line.removesuffix(b","), ""))
    except FormatError as error:
        return Entry(LINE, number, problem=f"{error.problem}{_json_hint(line.decode('utf-8', 'replace'))}")


def _json_hint(text: str) -> str:
    """The fault of ``text``, which is no JSON, if it is a common one."""
    if re.match(r"[{\[]\s*'", text):
        return "; JSON has double quotes"
    if re.match(r"[{\[]\s*[“”„«]", text):
        return "; JSON has straight quotes"
    return _COMMA if re.search(r",\s*[}\]]", text) else ""


def _items(path: Path, data: bytes) -> list[Entry]:
    """The videos of consecutive JSON documents, each an object or a list. Raises JsonFault, UsageError."""
    values: list[Any] = []
    for document in _documents(data):
        values.extend(document if isinstance(document, list) else [document])
    if not any(isinstance(value, dict | str) for value in values):
        found = f"{len(values)} other values" if values else None
        raise UsageError("holds no item", file=path, expected=WANTED, found=found, next=WRITE)
    return [Entry(ITEM, n, {"prompt": v} if isinstance(v, str) else v) for n, v in enumerate(values, start=1)]


def _documents(data: bytes) -> Iterator[Any]:
    """The consecutive JSON documents in ``data``. Raises JsonFault."""
    refuse_crowded(data)
    decoder, at, start = json.JSONDecoder(), 0, re.compile(r"\S")
    try:
        text = data.decode("utf-8")
        while rest := start.search(text, at):
            _, at = decoder.raw_decode(text, rest.start())
            yield parse_json(text[rest.start() : at], "")
    except FormatError as error:
        raise JsonFault(error.problem) from None
    except json.JSONDecodeError as error:
        before = text[: error.pos].rstrip()
        hint = _COMMA if before.endswith(",") else _json_hint(text[max(0, len(before) - 1) : error.pos + 2])
        raise JsonFault(f"line {error.lineno}: {error.msg}{hint}") from None
    except RecursionError:
        raise JsonFault("is nested too deeply") from None
    except ValueError as error:  # not UTF-8, or a number of thousands of digits
        raise JsonFault(clipped(str(error), 120)) from None


def _plain(number: int, line: bytes) -> Entry:
    """A line of plain text as a prompt; a comment or an option of another tool is a fault."""
    try:
        text = line.decode("utf-8")
    except UnicodeError:
        return Entry(LINE, number, problem="is not UTF-8 text")
    if text.startswith(("#", "//")):
        return Entry(LINE, number, problem="is it a comment or a prompt? Remove it, or write JSON: " + WANTED)
    option = re.search(r"(?:^|\s)(--?[A-Za-z][\w-]*)(?:[ =]|$)", text)
    if option and (option[1].startswith("--") or text.startswith(option[1])):
        return Entry(LINE, number, problem=f"an option in a prompt ({option[1]}): a prompts file has JSON for these")
    return Entry(LINE, number, {"prompt": text})


def _refuse_other_forms(path: Path, first: str, lines: int) -> None:
    """Raises UsageError for a file that begins with the line ``first`` and is neither JSON nor plain text."""
    cells = [cell.strip().strip("\"'").lower() for cell in re.split(r"[,;\t|]", first)]
    names = {"prompt", "seed", "output", "steps", "width", "height", "fps", *OTHER_NAMES}
    fields = f"{WRITE}, with the columns as its fields"
    header = (set(cells) <= names and len(cells) > 1) or (cells == ["prompt"] and lines > 1)
    if header or path.suffix.lower() in TABLE_SUFFIXES:
        what, better = "a table (CSV)", fields
    elif first.startswith("<"):
        what, better = "a web page or XML", WRITE
    elif first == "---" or re.match(rf"(?:- *)?(?:prompts?|{'|'.join(sorted(names))})\s*[:=]", first, re.IGNORECASE):
        what, better = "YAML, or names before values", WRITE
    elif path.suffix.lower() not in PLAIN_SUFFIXES:
        what = "plain text"
        better = f"name it {path.stem}.txt to make a video of each line, or {WRITE}"
    else:
        return
    found = f"{what}: {clipped(first, 60)}"
    raise UsageError("is not a prompts file", file=path, expected=WANTED, found=found, next=better)
