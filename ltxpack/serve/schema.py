"""What a request may say, as a JSON schema made from the settings of a video; and forms read by it.

The server checks requests with it and publishes it in its OpenAPI description.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from typing import Any

import jsonschema

from ltxpack.errors import clipped
from ltxpack.files import bounded_json
from ltxpack.files.bounded_json import JsonFault
from ltxpack.runtime.prompts_form import OTHER_NAMES
from ltxpack.runtime.settings import SessionSettings, Settings, type_of
from ltxpack.serve.limits import MAX_CONTAINERS, MAX_VALUES, ServeLimits
from ltxpack.serve.refusal import Refusal

TYPES: Mapping[type | None, str] = {int: "integer", float: "number", str: "string", bool: "boolean"}
# The model's name says the recipe, and pictures come as bytes instead of as paths.
NOT_ASKED = ("recipe", "images")
REFERENCE, IMAGES = "input_reference", "images"
LONGEST_TEXT, LONGEST_LIST, LONGEST_NUMBER = 200, 64, 20
BRACKETED = re.compile(r"([a-z_0-9]+)\[([a-z_]*)\]")
WHOLE = re.compile(r"[+-]?[0-9]+")
_PICTURE = {"type": "string", "description": "A data: URL with base64."}
_NAMED = {"type": "object", "additionalProperties": False, "required": ["image_url"]}


def request_schema(models: Sequence[str], limits: ServeLimits, blocks: int) -> dict[str, Any]:
    """The schema of a request to make a video with one of ``models``, whose transformers have so many ``blocks``."""
    frame = {"anyOf": [{"type": "integer", "minimum": 0}, {"const": "last"}], "description": "0 if absent."}
    strength = {"type": "number", "minimum": 0, "maximum": 1, "description": "1 if absent."}
    image = {**_NAMED, "properties": {"image_url": _PICTURE, "frame": frame, "strength": strength}}
    reference = {"anyOf": [_PICTURE, {**_NAMED, "properties": {"image_url": _PICTURE}}]}
    properties: dict[str, Any] = {
        "prompt": {
            "type": "string",
            "minLength": 1,
            "maxLength": limits.prompt,
            "description": "What to show and say.",
        },
        "model": {"type": "string", "description": f"Recipe and bakes. Default: {models[0]}.", "examples": [*models]},
        "size": {"type": "string", "pattern": "^[0-9]{1,5}x[0-9]{1,5}$", "description": "WIDTHxHEIGHT in pixels."},
        "seconds": {
            "anyOf": [{"type": "number"}, {"type": "string", "pattern": "^[0-9]{1,6}(\\.[0-9]{1,9})?$"}],
            "description": "In place of num_frames: the nearest number of frames that a video can have.",
        },
        REFERENCE: {**reference, "description": "The first frame: an uploaded picture, or a data: URL."},
        IMAGES: {"type": "array", "maxItems": limits.pictures, "items": image, "description": "Pictures to follow."},
    }
    properties |= {one.name: _setting(one) for one in fields(Settings) if one.name not in NOT_ASKED}
    properties["negative_prompt"]["maxLength"] = limits.prompt
    for name, most in (("steps", limits.steps), ("num_frames", limits.frames)):
        properties[name]["maximum"] = most
    for name in ("video_stg_blocks", "audio_stg_blocks"):
        properties[name]["items"]["maximum"] = blocks - 1
    return {"type": "object", "additionalProperties": False, "required": ["prompt"], "properties": properties}


def _setting(one: Field[Any]) -> dict[str, Any]:
    """A setting as it may be said: with the limits it has in a prompts file, or on the command line."""
    meta, kind = one.metadata, type_of(one)
    number: dict[str, Any] = {"type": TYPES[int if kind is tuple else kind]}
    number |= {"minimum": meta["least"]} if "least" in meta else {}
    number |= {"minimum": meta["bounds"][0], "maximum": meta["bounds"][1]} if "bounds" in meta else {}
    number |= {"enum": [*meta["choices"]]} if "choices" in meta else {}
    number |= {"maxLength": LONGEST_TEXT} if kind is str else {}
    found = {"type": "array", "maxItems": LONGEST_LIST, "items": number} if kind is tuple else number
    return found | ({"description": meta["help"]} if meta["help"] else {}) | dict(meta.get("line", {}))


class RequestReader:
    """Reads bodies and forms by ``schema``. Raises Refusal for what it does not allow, with the field at fault."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.properties: Mapping[str, Mapping[str, Any]] = schema["properties"]
        self._validator = jsonschema.Draft202012Validator(schema)

    def from_json(self, body: bytes) -> dict[str, Any]:
        """The fields of a JSON body; those that are null are absent."""
        try:
            said = bounded_json.parse(body, bounded_json.Limits(MAX_VALUES, MAX_CONTAINERS))
        except JsonFault as fault:
            raise Refusal(400, f"the body {fault}") from None
        if not isinstance(said, dict):
            raise Refusal(400, "the body is not a JSON object")
        return self._checked({name: value for name, value in said.items() if value is not None})

    def from_form(self, texts: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """The fields of a form, as text; ``name[]`` is a value of a list, ``name[key]`` of an object."""
        said: dict[str, Any] = {}
        for key, text in texts:
            bracketed = BRACKETED.fullmatch(key)
            name, inner = (bracketed[1], bracketed[2]) if bracketed else (key, None)
            value = self._value(name, text)
            if inner == "" and isinstance(said.setdefault(name, []), list):
                said[name] += value if isinstance(value, list) else [value]
            elif inner and isinstance(said.setdefault(name, {}), dict) and inner not in said[name]:
                said[name][inner] = text
            elif name in said:
                raise Refusal(400, f"{clipped(name, 60)} is said twice", param=clipped(name, 60))
            else:
                said[name] = value
        return self._checked(said)

    def _value(self, name: str, text: str) -> Any:
        """``text`` as its field has it; itself where it is nothing of the kind, for the schema to refuse."""
        kind = self.properties.get(name, {}).get("type")
        try:
            if kind == "integer" and len(text) <= LONGEST_NUMBER and WHOLE.fullmatch(text):
                return int(text)
            if kind == "number" and math.isfinite(float(text)):
                return float(text)
            if kind == "boolean" and text in ("true", "false"):
                return text == "true"
            if kind == "array" and text.startswith("["):
                return bounded_json.parse(text.encode(), bounded_json.Limits(MAX_VALUES, MAX_CONTAINERS))
            if kind == "array":
                return [int(part) for part in text.split(",") if part.strip()] if len(text) <= LONGEST_TEXT else text
        except ValueError:
            pass
        return text

    def _checked(self, said: dict[str, Any]) -> dict[str, Any]:
        for name in said:
            if name not in self.properties:
                raise Refusal(400, _unknown(name, self.properties), param=clipped(name, 60), code="unknown_parameter")
        for error in self._validator.iter_errors(said):
            path = [str(part) for part in error.absolute_path]
            if error.validator == "required" and not path:
                path = [str(name) for name in error.schema["required"] if name not in said][:1]
            where = ".".join(path)
            raise Refusal(400, f"{where}: {clipped(error.message, 300)}", param=where or None, code="invalid_value")
        # JSON has one kind of number: 64.0 is an integer to the schema.
        whole = {name for name, one in self.properties.items() if one.get("type") == "integer"}
        return {name: int(value) if name in whole else value for name, value in said.items()}


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    shown = repr(clipped(name, 60))
    if name == "recipe" or name in {one.name for one in fields(SessionSettings)}:
        return f"{shown} is no field of a request: the model's name picks recipe and bakes, the server all else"
    meant = OTHER_NAMES.get(name.lower(), "").partition(":")[0]
    if meant not in known:
        meant = next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.75)), "")
    return f"there is no field {shown}; " + (f"did you mean {meant}?" if meant else f"there are {', '.join(known)}")
