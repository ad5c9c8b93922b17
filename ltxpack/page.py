"""The style of the HTML pages that ltxpack writes; each page is one file with its style in it. Knows no page."""

from __future__ import annotations

from pathlib import Path


def style(own: Path) -> str:
    """The style of every page (page.css), then the file ``own`` of one page."""
    files = (Path(__file__).with_name("page.css"), own)
    return "".join(file.read_text(encoding="utf-8") for file in files)
