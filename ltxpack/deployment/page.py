"""Puts plan.html, plan.css and plan.js into one file. Its policy lets the browser neither load nor send anything."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterator
from pathlib import Path

from ltxpack.deployment.choices import Choice, choices
from ltxpack.deployment.document import document
from ltxpack.deployment.grid import Subject
from ltxpack.page import style
from ltxpack.runtime.overlay import Overlay

FOLDER = Path(__file__).parent
# Choices that are drop-down lists; the others show all options.
LISTED = ("card",)


def render(overlay: Overlay | None = None) -> bytes:
    """The page for ``overlay``, or for the published LTX-2.3. Raises LtxpackError for headers that cannot be read."""
    subject = Subject(overlay)
    looks, script = style(FOLDER / "plan.css"), (FOLDER / "plan.js").read_text(encoding="utf-8")
    data = json.dumps(document(subject), ensure_ascii=False, separators=(",", ":"))
    # No text may end its element. Each video begins a line, so that no line is too long for tools that read lines.
    data = data.replace("<", "\\u003c").replace(',{"phases"', ',\n{"phases"')
    page = (FOLDER / "plan.html").read_text(encoding="utf-8")
    return page.format(
        policy=f"default-src 'none'; style-src {_hash(looks)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'",
        subject=html.escape(subject.name),
        choices="\n".join(line for choice in choices() for line in _choice(choice)),
        style=looks,
        script=script,
        data=data,
    ).encode(errors="backslashreplace")  # the name of a folder may not be UTF-8


def _hash(text: str) -> str:
    """The source of the page's policy that allows an element with this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _choice(choice: Choice) -> Iterator[str]:
    """A drop-down list or a group of buttons, with a place for the reasons why some options cannot be chosen."""
    name, why = choice.name, f"{choice.name}-why"
    if name in LISTED:
        yield f"<div class=choice>\n<label for={name} id={name}-legend>{choice.legend}</label>"
        yield f"<select id={name} name={name} aria-describedby={why}>"
        for label, note in choice.options.items():
            picked = " selected" if label == choice.first else ""
            yield f"<option{picked}>{label}: {html.escape(note)}</option>"
        yield f"</select>\n<ul class=why id={why}></ul>\n</div>"
        return
    yield f"<fieldset class=choice aria-describedby={why}>\n<legend id={name}-legend>{choice.legend}</legend>"
    yield "<div class=options>"
    for number, (label, note) in enumerate(choice.options.items()):
        picked = " checked" if label == choice.first else ""
        said = f"<span>{html.escape(note)}</span>" if note else ""
        yield f"<label><input type=radio name={name} value={number}{picked}><b>{label}</b>{said}</label>"
    yield f"</div>\n<ul class=why id={why}></ul>\n</fieldset>"
