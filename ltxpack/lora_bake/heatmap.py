"""coverage.html: a bake at a glance, block by module, as one page without scripts or anything from elsewhere.

Made from the document of coverage.json alone; the same document gives the same bytes. Names are escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ltxpack.lora_bake.report import split_name

HTML_NAME = "coverage.html"

# Dark to light as a change grows; the text on it stays readable at both ends.
_RAMP = ((0x1B, 0x1F, 0x4B), (0x3B, 0x4C, 0xA0), (0x2A, 0x8F, 0x9E), (0x6C, 0xC2, 0x6B), (0xF6, 0xE0, 0x4B))
_LEGEND_STEPS = 9
_STYLE = """
:root { color-scheme: light dark; --edge: #8884; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 110rem; padding: 0 1.5rem; }
h1 { font-size: 1.4rem; margin: 0 0 .2rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { margin: .2rem 0; } .quiet { opacity: .7; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
th { font-weight: 500; text-align: left; } .facts td, .facts th { padding: .2rem .9rem .2rem 0; vertical-align: top; }
.map td { width: 1.7rem; min-width: 1.7rem; height: 1.15rem; border: 1px solid var(--edge); padding: 0; }
.map th.kind { height: 13.5rem; vertical-align: bottom; padding: 0 0 .3rem; }
.map th.kind div { writing-mode: vertical-rl; transform: rotate(180deg); font-size: 12px; white-space: nowrap; }
.map th.block { padding-right: .6rem; text-align: right; font-size: 12px; font-variant-numeric: tabular-nums; }
.none { background: repeating-linear-gradient(45deg, #8882 0 2px, transparent 2px 5px); }
.list td, .list th { padding: .12rem .9rem .12rem 0; font-variant-numeric: tabular-nums; }
.chip { display: inline-block; width: 1.7rem; height: .9rem; border: 1px solid var(--edge); vertical-align: middle; }
.number { text-align: right; }
""".strip()


def render(document: Mapping[str, Any]) -> bytes:
    """The page for ``document`` (coverage.json)."""
    title = f"LoRA coverage: {_text(document['bake'])}"
    targets = document["targets"]
    scale = _Scale(value["change"] for value in targets.values())
    body = [
        f"<h1>{title}</h1>",
        f"<p class=quiet>rule {_text(document['rule'])}, kernel {_text(document['kernel'])}, "
        f"device {_text(document['device'])}</p>",
        _summary(document),
        *_loras(document["loras"]),
        *_map(document, scale),
        *_outside(document, scale),
    ]
    return (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    ).encode("utf-8", "backslashreplace")


class _Scale:
    """Relative change -> colour, on a logarithmic scale over the changes of this bake."""

    def __init__(self, changes: Iterable[float | None]) -> None:
        logs = [math.log10(change) for change in changes if change]
        self.low, self.high = (min(logs), max(logs)) if logs else (-1.0, 0.0)
        # Below a factor of ten a full ramp would make noise look like structure.
        if self.high - self.low < 1:
            self.low = self.high - 1

    def colour(self, change: float) -> str:
        """``#rrggbb``; the darkest for no change."""
        place = 0.0 if change <= 0 else (math.log10(change) - self.low) / (self.high - self.low)
        position = min(max(place, 0.0), 1.0) * (len(_RAMP) - 1)
        lower = min(int(position), len(_RAMP) - 2)
        part = position - lower
        mixed = (round(start + (end - start) * part) for start, end in zip(_RAMP[lower], _RAMP[lower + 1], strict=True))
        return "#" + "".join(f"{channel:02x}" for channel in mixed)

    def legend(self) -> str:
        """The ramp with its ends named."""
        steps = (self.low + (self.high - self.low) * i / (_LEGEND_STEPS - 1) for i in range(_LEGEND_STEPS))
        chips = "".join(f'<span class=chip style="background:{self.colour(10**step)}"></span>' for step in steps)
        return (
            f"<p>{10**self.low:.1e} {chips} {10**self.high:.1e} = |change| / |weight|, logarithmic; "
            "<span class='chip none'></span> not touched</p>"
        )


def _summary(document: Mapping[str, Any]) -> str:
    return (
        f"<p>{document['changed_weights']:,} of {document['targeted_weights']:,} targeted weights changed, in "
        f"{document['changed_tensors']:,} tensors.</p>"
    )


def _loras(loras: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    yield "<h2>LoRAs, in the order they were applied</h2>"
    yield ("<table class=facts><tr><th>name<th>file<th>strength<th>scale<th>targets<th>ranks<th>naming<th>blake3</tr>")
    for lora in loras:
        scales = lora["scales"]
        span = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} … {scales[-1]:g}"
        ranks = ", ".join(f"{rank} ×{count}" for rank, count in sorted(lora["ranks"].items(), key=_by_rank))
        cells = (
            lora["name"],
            lora["file"],
            f"{lora['strength']:g}",
            span,
            f"{lora['matched']} of {lora['total']} linears, {lora['other_tensors']} other",
            ranks,
            ", ".join(lora["namings"]),
            lora["blake3"][:16],
        )
        yield "<tr>" + "".join(f"<td>{_text(cell)}" for cell in cells) + "</tr>"
    yield "</table>"


def _map(document: Mapping[str, Any], scale: _Scale) -> Iterable[str]:
    cells: dict[tuple[int, str], tuple[str, Mapping[str, Any]]] = {}
    for name, value in document["targets"].items():
        block, kind = split_name(name)
        if block is not None:
            cells[block, kind] = (name, value)
    yield "<h2>Blocks</h2>"
    if not cells:
        yield "<p>No weight inside the blocks is touched.</p>"
        return
    kinds = sorted({kind for _, kind in cells} | set(document["block_kinds"]))
    yield scale.legend()
    yield "<div class=wide><table class=map><tr><th>"
    yield "".join(f"<th class=kind><div>{_text(kind)}</div>" for kind in kinds) + "</tr>"
    for block in range(document["blocks"]):
        row = "".join(_cell(cells.get((block, kind)), f"block {block}, {kind}", scale) for kind in kinds)
        yield f"<tr><th class=block>{block}{row}</tr>"
    yield "</table></div>"


def _cell(found: tuple[str, Mapping[str, Any]] | None, place: str, scale: _Scale) -> str:
    if found is None:
        return f'<td class=none title="{_text(place)}: not touched">'
    name, value = found
    return f'<td style="background:{_colour(value, scale)}" title="{_text(name)}: {_text(_told(value))}">'


def _outside(document: Mapping[str, Any], scale: _Scale) -> Iterable[str]:
    rows = [(name, value) for name, value in document["targets"].items() if split_name(name)[0] is None]
    if not rows:
        return
    yield "<h2>Outside the blocks</h2>"
    yield "<table class=list><tr><th><th>weight<th class=number>change<th class=number>weights changed</tr>"
    for name, value in rows:
        change = "from zero" if value["change"] is None else f"{value['change']:.2e}"
        yield (
            f'<tr><td><span class=chip style="background:{_colour(value, scale)}"></span><td>{_text(name)}'
            f"<td class=number>{change}<td class=number>{value['changed']:,} of {value['elements']:,}</tr>"
        )
    yield "</table>"


def _colour(value: Mapping[str, Any], scale: _Scale) -> str:
    return scale.colour(10**scale.high if value["change"] is None else value["change"])


def _told(value: Mapping[str, Any]) -> str:
    change = "from zero" if value["change"] is None else f"{value['change']:.2e}"
    terms = "; ".join(f"LoRA {term['lora'] + 1} rank {term['rank']} scale {term['scale']:g}" for term in value["terms"])
    return f"{change}, {value['changed']:,} of {value['elements']:,} weights changed; {terms}"


def _by_rank(item: tuple[str, int]) -> int:
    return int(item[0])


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
