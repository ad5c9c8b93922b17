"""Reads coverage.html as a browser would: tags nested, attributes and text unescaped, tables by row and cell."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr", "col"}
# Their end tags may be left out.
OPTIONAL = {"p", "tr", "td", "th", "html", "head", "body"}


class Page(HTMLParser):
    """Checks nesting; keeps all attributes, the text, and the text of every table's cells, row by row."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID | OPTIONAL:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in OPTIONAL:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "table" in self.open and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def row(self, label: str) -> list[str]:
        """The cells of the one row that begins with ``label``, gaps between groups left out."""
        [found] = [cells for cells in self.rows if cells and cells[0].strip() == label]
        return [cell.strip() for cell in found[1:]]

    @property
    def titles(self) -> list[str]:
        """What is shown where the pointer rests."""
        return [value for name, value in self.attributes if name == "title"]


def parsed(data: bytes) -> Page:
    """The page ``data``; every element that must be closed is."""
    page = Page()
    page.feed(data.decode())
    page.close()
    assert page.open == []
    return page
