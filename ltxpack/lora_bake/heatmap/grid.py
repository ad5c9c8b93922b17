"""The map of coverage.html: blocks down, modules across, with its scale above and the columns' sums below."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ltxpack.lora_bake.heatmap import scale
from ltxpack.lora_bake.heatmap.layout import Group
from ltxpack.lora_bake.heatmap.markup import FROM_ZERO, brief, fixed, name, percent, text
from ltxpack.lora_bake.heatmap.view import View

# A longer label stands upright.
_FLAT_LABEL = 4


def look(change: float | None) -> str:
    """The class of a cell that is not simply its colour: below or above the scale, no change, a change from zero."""
    if change is None:
        return "fz"
    if change == 0:
        return "zr"
    place = scale.place(change)
    return "lo" if place < 0 else "hi" if place > 1 else ""


def shade(change: float | None) -> str:
    """The attribute that colours a cell."""
    return "" if change == 0 else f' style="background:{scale.colour(change)}"'


def legend(view: View) -> Iterable[str]:
    """The scale with the page's own distribution on it, and what is not on it."""
    median, largest = view.document["median_change"], view.document["largest_change"]
    yield (
        "<p>How far the bake moves each linear, relative to its size: ‖ΔW‖ / ‖W‖ (Frobenius norms). The colours are "
        "the same on every page, so two pages can be compared.</p>"
    )
    yield "<div class=key>\n<div class=legend>"
    yield f"<div class=marks>{_mark('▽', median)}{_mark('▼', largest)}</div>"
    yield f"<div class=bars>{_bars(view.targets.values())}</div>"
    yield "<div class=ramp></div>"
    ticks = (
        f'<span style="left:{scale.within(10.0**power):.0%}">{_decade(power)}</span>'
        for power in range(scale.LOW, scale.HIGH + 1)
    )
    yield f"<div class=ticks>{''.join(ticks)}</div>\n</div>"
    yield "<div class=told>"
    yield f"<p><span class=chip>▽</span>median {percent(median)}</p>"
    yield f"<p><span class=chip>▼</span>largest {percent(largest)}</p>"
    for told in _looks(view):
        yield f"<p>{told}</p>"
    yield "</div>\n</div>"


def table(view: View) -> Iterable[str]:
    """The map itself."""
    if not view.groups:
        yield "<p>This transformer has no blocks.</p>"
        return
    if not view.cells:
        yield "<p>No weight inside the blocks is touched.</p>"
    blocks = view.document["blocks"]
    yield "<div class=wide><table class=map>"
    yield (
        f"<caption>Rows: blocks 0, next to the input, to {blocks - 1}, next to the output. Columns: linears in model "
        "order. Hold the pointer on a cell for its name and exact figures.</caption>"
    )
    yield from _head(view.groups)
    yield "<tbody>"
    for block in range(blocks):
        row = [f"<tr><th class=block scope=row>{block}"]
        for i, group in enumerate(view.groups):
            row.append(f"<td rowspan={blocks}>" if i and not block else "")
            row += (_cell(view, block, column.kind) for column in group.columns)
        yield "".join(row)
    yield "</tbody>\n<tfoot>"
    for line in _sums(view):
        yield f"<tr><th scope=row>{line.label}" + "<td>".join(
            "".join(line.cells[column.kind] for column in group.columns) for group in view.groups
        )
    yield "</tfoot>\n</table></div>"


def _mark(sign: str, change: float | None) -> str:
    """A sign above the bars at the place of ``change``."""
    return "" if change is None else f'<span style="left:{fixed(f"{scale.within(change):.1%}", 6)}">{sign}</span>'


def _bars(targets: Iterable[Mapping[str, Any]]) -> str:
    counts = scale.histogram(target["change"] for target in targets)
    tallest = max(*counts, 1)
    return "".join(
        f'<i style="height:{fixed(f"{count / tallest:.0%}", 4)};background:{scale.colour(scale.bin_middle(i))}"></i>'
        for i, count in enumerate(counts)
    )


def _decade(power: int) -> str:
    return f"{10.0 ** (power + 2):g} %"


def _looks(view: View) -> Iterator[str]:
    """One line for every look of a cell that is not simply its colour, with how many targets have it."""
    found = Counter(look(target["change"]) for target in view.targets.values())
    low, high = _decade(scale.LOW), _decade(scale.HIGH)
    bottom, top = shade(10.0**scale.LOW), shade(10.0**scale.HIGH)
    width = len(f"{len(view.targets):,}")

    def line(kind: str, attribute: str, told: str) -> str:
        count = fixed(f"{found[kind]:,}", width)
        return f'<span class="chip {kind}"{attribute}></span><span class=count>{count}</span>{told}'

    yield f'<span class="chip none"></span><span class=count>{view.untouched:,}</span>not touched'
    yield line("lo", bottom, f"below {low}, drawn as {low}")
    yield line("hi", top, f"above {high}, drawn as {high}")
    yield line("zr", "", "touched, and ΔW is zero")
    yield line("fz", top, "changed from zero: W is zero, there is no ratio")


def _head(groups: Sequence[Group]) -> Iterable[str]:
    """Three lines over the columns: the stream, the module, its part."""
    columns, streams, modules, parts = ["<col class=axis>"], "", "", ""
    for i, group in enumerate(groups):
        first = not i or groups[i - 1].stream != group.stream
        if i:
            columns.append(f"<col class={'break' if first else 'gap'}>")
            modules += "<td>"
            parts += "<td>"
        width = len(group.columns)
        columns.append(f"<col span={width}>")
        if first:
            span = sum(len(other.columns) + 1 for other in groups if other.stream == group.stream) - 1
            streams += f"{'<td>' if i else ''}<th class=stream colspan={span} scope=colgroup>{group.stream}"
        note = f"<br><span class=quiet>{group.note}</span>" if group.note else ""
        modules += f"<th class=group colspan={width} scope=colgroup><span class=mono>{name(group.module)}</span>{note}"
        parts += "".join(f"<th class=part scope=col>{_label(column.label)}" for column in group.columns)
    yield f"<colgroup>{''.join(columns)}</colgroup>"
    yield f"<thead>\n<tr><th class=corner rowspan=3>block ↓{streams}\n<tr>{modules}\n<tr>{parts}\n</thead>"


def _label(label: str) -> str:
    return text(label) if len(label) <= _FLAT_LABEL else f"<div>{text(label)}</div>"


def _cell(view: View, block: int, kind: str) -> str:
    target_name = view.cells.get((block, kind))
    if target_name is None:
        return f'<td class=none title="block {block}, {text(kind)}: not touched">'
    target = view.targets[target_name]
    found = look(target["change"])
    mark = f" class={found}" if found else ""
    return f'<td{mark}{shade(target["change"])} title="{text(target_name)}: {_told(target, found)}">'


def _told(target: Mapping[str, Any], found: str) -> str:
    change = FROM_ZERO if target["change"] is None else f"{target['change']:.2e}"
    beyond = {"lo": ", below the scale", "hi": ", above the scale"}.get(found, "")
    terms = "; ".join(
        f"LoRA {term['lora'] + 1} rank {term['rank']} scale {term['scale']:g}" for term in target["terms"]
    )
    return f"{change}{beyond}, {target['changed']:,} of {target['elements']:,} weights changed; {terms}"


@dataclass(frozen=True)
class _Line:
    """One line below the map: its label, and a cell for each kind."""

    label: str
    cells: Mapping[str, str]


def _sums(view: View) -> Iterator[_Line]:
    """What the columns come to: the change in figures, and how much of the model each LoRA has."""
    kinds = [column.kind for group in view.groups for column in group.columns]
    for label, key in (("median, %", "median_change"), ("largest, %", "largest_change")):
        yield _Line(label, {kind: f"<td>{_figure(view, kind, key)}" for kind in kinds})
    for i in range(len(view.loras)):
        whose = f"LoRA {i + 1} " if len(view.loras) > 1 else ""
        yield _Line(f"{whose}matched", {kind: _share(view.matched(i, kind), view.total(kind)) for kind in kinds})
        yield _Line(f"{whose}rank", {kind: f"<td>{_rank(view.ranks(i, kind))}" for kind in kinds})
    yield _Line("in the model", {kind: f"<td>{view.total(kind) or ''}" for kind in kinds})


def _figure(view: View, kind: str, key: str) -> str:
    found = view.document["kinds"].get(kind)
    if found is None:
        return ""
    return brief(None if found["median_change"] is None else found[key])


def _share(matched: int, total: int | None) -> str:
    kind = " class=no" if not matched else "" if matched == total else " class=some"
    return f"<td{kind}>{matched}"


def _rank(ranks: Sequence[int]) -> str:
    """``384``, or ``≤72`` if they differ."""
    if not ranks:
        return ""
    largest = max(ranks)
    if not largest:
        return "full"
    return f"{'≤' if min(ranks) != largest else ''}{largest}"
