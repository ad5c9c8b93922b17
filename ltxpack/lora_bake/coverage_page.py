"""coverage.html: a bake at a glance, block by module, as one page without scripts or other files.

The page depends only on the document of coverage.json: the same document gives the same bytes. It escapes every name.
coverage.html has the fixed parts, coverage.css and page.css the style. All pages use one logarithmic scale of colours,
so that a reader can compare two pages.
"""

from __future__ import annotations

import html
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltxpack.lora_bake.coverage import split_name, told_strength
from ltxpack.manifest import FP8
from ltxpack.page import style

# The scale: 0.01 % to 100 %. A smaller change is below bf16's rounding; with a larger one the weight is mostly LoRA.
LOW, HIGH = -4, 0
BINS_PER_DECADE = 10
# Indigo to yellow by magenta, evenly lighter from stop to stop (OKLCH lightness 0.26 to 0.95, hue 275 to 465).
RAMP = ("#190070", "#4a008a", "#7f078e", "#b21e80", "#de3a66", "#ff603e", "#ff9b46", "#ffc962", "#fff465")
# The page cuts longer lists and names; coverage.json has them whole.
MAX_LEFT_OUT, MAX_VALUES, MAX_NAME = 48, 8, 200
OTHER = "Other"

_RULES = {"fp32": " (base and update summed in float32, one rounding)", "official": " (the official bf16 arithmetic)"}
# The modules of a block in the model's order: stream, module, its purpose.
_BLOCK = (
    ("Video", "attn1", "self-attention"),
    ("Video", "attn2", "text attention"),
    ("Video", "ff", "feed-forward"),
    ("Audio", "audio_attn1", "self-attention"),
    ("Audio", "audio_attn2", "text attention"),
    ("Audio", "audio_ff", "feed-forward"),
    ("Audio and video", "audio_to_video_attn", "video attends to audio"),
    ("Audio and video", "video_to_audio_attn", "audio attends to video"),
)
_LABELS = {
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out", "to_gate_logits": "gate", "norm_q": "q norm",
    "norm_k": "k norm", "net.0.proj": "in", "net.2": "out",
}  # fmt: skip
_OUTSIDE = {
    "Video": ("proj_in", "time_embed", "prompt_adaln", "av_cross_attn_video_scale_shift",
              "av_cross_attn_video_a2v_gate", "proj_out"),
    "Audio": ("audio_proj_in", "audio_time_embed", "audio_prompt_adaln", "av_cross_attn_audio_scale_shift",
              "av_cross_attn_audio_v2a_gate", "audio_proj_out"),
}  # fmt: skip
# A longer label is upright. A name's segment up to this length stays in one line: embeddings_connector.
_FLAT_LABEL, _MAX_SEGMENT = 4, 32
_SEGMENTS, _WORDS = re.compile(r"(?<=[./])"), re.compile(r"(?<=[_+-])")


@dataclass(frozen=True)
class ColumnGroup:
    """The columns of one attention or feed-forward, as (kind, label)."""

    stream: str
    module: str
    note: str
    columns: tuple[tuple[str, str], ...]


class CoverageView:
    """The document, by place on the page.

    ``cells`` maps (block, kind) to the name of the target there, ``ends`` a kind outside the blocks to its target's.
    ``groups`` and ``outside`` hold every kind in model order, touched or not.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self.targets: Mapping[str, Mapping[str, Any]] = document["targets"]
        self.loras: Sequence[Mapping[str, Any]] = document["loras"]
        self.blocks: int = document["blocks"]
        places = {split_name(name): name for name in self.targets}
        self.cells = {place: name for place, name in places.items() if place[0] is not None}
        self.ends = {kind: name for (block, kind), name in places.items() if block is None}
        inside = {kind for _, kind in self.cells} | set(document["block_kinds"])
        known = {kind for lora in self.loras for kind in lora["kinds"]}
        outside = known - inside | set(self.ends)
        self.groups = column_groups(inside)
        self.outside = outside_blocks(outside)
        self.untouched = len(inside) * self.blocks + len(outside) - len(self.targets)
        self.reached = sum(kind in known for _, kind in places)
        self.linears = max((lora["total"] for lora in self.loras), default=self.reached)
        self.totals = {kind: found["total"] for kind, found in document["kinds"].items()}
        self.totals |= {kind: found["total"] for lora in self.loras for kind, found in lora["kinds"].items()}
        # (LoRA, kind) -> the ranks of the LoRA's targets of this kind; 0 for a full difference alone.
        self.ranks: dict[tuple[int, str], list[int]] = {}
        for (_, kind), name in places.items():
            for term in self.targets[name]["terms"]:
                self.ranks.setdefault((term["lora"], kind), []).append(term["rank"])


def render(document: Mapping[str, Any]) -> bytes:
    view = CoverageView(document)
    folder = Path(__file__).parent
    page = (folder / "coverage.html").read_text(encoding="utf-8")
    sections = {"lora_cards": _loras(view), "map": _map(view), "outside": _outside(view), "left_out": _left_out(view)}
    facts: dict[str, Any] = {"view": view, "style": style(folder / "coverage.css")}
    facts |= {key: text(value) if isinstance(value, str) else value for key, value in document.items()}
    facts |= {place: "".join(f"{line}\n" for line in lines) for place, lines in sections.items()}
    return page.format_map(facts | _head(view) | _legend(view)).encode("utf-8", "backslashreplace")


# Model order


def column_groups(kinds: Iterable[str]) -> list[ColumnGroup]:
    """``kinds`` of a block in model order: weights as q, k, v, out, gate, a bias beside its weight."""
    left, made, order = set(kinds), [], list(_LABELS)

    def column(module: str, kind: str) -> tuple[int, str, str]:
        part, bias = kind.removeprefix(f"{module}.").removesuffix(".bias"), kind.endswith(".bias")
        label = _LABELS.get(part, part) + (" bias" if bias else "")
        return order.index(part) if part in _LABELS else len(order), kind, label

    for stream, module, note in _BLOCK:
        found = {kind for kind in left if kind.startswith(f"{module}.")}
        left -= found
        if found:
            columns = sorted(column(module, kind) for kind in found)
            made.append(ColumnGroup(stream, module, note, tuple((kind, label) for _, kind, label in columns)))
    if left:
        made.append(ColumnGroup(OTHER, "", "", tuple((kind, kind) for kind in sorted(left))))
    return made


def outside_blocks(names: Iterable[str]) -> dict[str, list[str]]:
    """Names outside the blocks, by stream, in the order of a forward pass."""
    left, made = set(names), {}
    for stream, modules in _OUTSIDE.items():
        made[stream] = [n for m in modules for n in sorted(left) if n == m or n.startswith(f"{m}.")]
        left -= set(made[stream])
    made[OTHER] = sorted(left)
    return {stream: found for stream, found in made.items() if found}


# The scale


def position(change: float) -> float:
    """The position of ``change`` on the scale, from 0 to 1; out of range the nearer end."""
    return min(max((math.log10(change) - LOW) / (HIGH - LOW), 0.0), 1.0) if change > 0 else 0.0


def colour(change: float | None) -> str:
    """``#rrggbb`` of ``change``; out of range the nearer end's. None, a change from zero, has the upper end's."""
    place = (1.0 if change is None else position(change)) * (len(RAMP) - 1)
    lower = min(int(place), len(RAMP) - 2)
    pairs = ((int(RAMP[lower][i : i + 2], 16), int(RAMP[lower + 1][i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(start + (end - start) * (place - lower)):02x}" for start, end in pairs)


def histogram(changes: Iterable[float | None]) -> list[int]:
    """The number of ``changes`` in each bin of the scale, without those out of range."""
    counts = [0] * (BINS_PER_DECADE * (HIGH - LOW))
    for change in changes:
        if change is not None and 10.0**LOW <= change <= 10.0**HIGH:
            counts[min(int(position(change) * len(counts)), len(counts) - 1)] += 1
    return counts


def _chip(change: float | None) -> tuple[str, str]:
    """The class of a cell, "" for a change on the scale, and the attribute that colours it."""
    if not change:
        look = "fz" if change is None else "zr"
    else:
        look = "lo" if change < 10.0**LOW else "hi" if change > 10.0**HIGH else ""
    return look, "" if change == 0 else f' style="background:{colour(change)}"'


# Values as text


def text(value: object) -> str:
    """``value``, escaped for text and for a quoted attribute."""
    return html.escape(str(value), quote=True)


def name(value: object) -> str:
    """An escaped name that may break after a dot, in a long segment after a word, or if necessary anywhere."""
    parts: list[str] = []
    for segment in _SEGMENTS.split(str(value)):
        parts += _WORDS.split(segment) if len(segment) > _MAX_SEGMENT else [segment]
    return "<wbr>".join(text(part) for part in parts)


def _mono(value: object) -> str:
    return f'<span class="name mono">{name(value)}</span>'


def _percent(change: float | None) -> str:
    return "none" if change is None else f"{100 * change:.3g} %"


def _brief(change: float | None) -> str:
    """A change in percent, short enough for a narrow column."""
    if not change:
        return "&infin;" if change is None else "0"
    if not 1e-4 <= change < 10:
        return "&lt;.01" if change < 1e-4 else "&gt;999"
    return f"{100 * change:.{2 if change < 0.01 else 1 if change < 0.1 else 0}f}"


def _listed(found: Iterable[str], ends: Sequence[str] = ()) -> str:
    """A list; for a long one its ends (in the form ``ends``) and its length."""
    values = list(found)
    if len(values) > MAX_VALUES:
        ends = ends or values
        return text(f"{ends[0]} … {ends[-1]} ({len(values)} different)")
    return text(", ".join(values) or "none")


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _others(count: int) -> str:
    """The number of a LoRA's other tensors: biases and norms."""
    return f" and {_count(count, 'other tensor')}" if count else ""


# The parts of coverage.html, from head to foot


def _head(view: CoverageView) -> dict[str, str]:
    document = view.document
    aimed, largest = document["targeted_weights"], document["largest_change"]
    at = [key for key, target in view.targets.items() if target["change"] == largest and largest is not None]
    block, kind = split_name(at[0]) if at else (None, "")
    error = "<div class=tile><b>{}</b><span>median error of quantised weights</span></div>\n"
    return {
        "bake_name": name(document["bake"]),
        "how": _RULES.get(document["rule"], ""),
        "form": _form(document),
        "others": _others(len(view.targets) - view.reached),
        "share": f"{document['changed_weights'] / aimed:.1%}" if aimed else "none",
        "median": _percent(document["median_change"]),
        "largest": _percent(largest),
        "place": name(kind if block is None else f"block {block}, {kind}"),
        "error": error.format(_percent(document["median_error"])) if "stored_as" in document else "",
    }


def _form(document: Mapping[str, Any]) -> str:
    """The quantised linears, and the source of the input scales."""
    if "stored_as" not in document:
        return ""
    form, calibration = document["stored_as"], document["calibration"]
    inputs = f", inputs calibrated by {name(calibration)}" if calibration else ", inputs not calibrated"
    return f" · {_count(document['quantised'], 'linear')} in {text(form)}{inputs if form == FP8 else ''}"


def _loras(view: CoverageView) -> Iterable[str]:
    if not view.loras:
        return
    several = len(view.loras) > 1
    yield f"<h2>{'LoRAs, in the order they were applied' if several else 'LoRA'}</h2>\n<section class=loras>"
    for i, lora in enumerate(view.loras, 1):
        number = f"<span>{i} · </span>" if several else ""
        yield f"<article class='panel lora'>\n<h3 class=name>{number}{name(lora['name'])}</h3>\n<dl>"
        for term, value in _facts(lora, view.document["rule"]):
            yield f"<div><dt>{term}</dt><dd>{value}</dd></div>"
        yield "</dl>\n</article>"
    yield "</section>"


def _facts(lora: Mapping[str, Any], rule: str) -> Iterator[tuple[str, str]]:
    """The lines of one LoRA's card, escaped."""
    ranks = sorted(lora["ranks"].items(), key=lambda item: int(item[0]))
    ignored = " (not used by the official rule)" if rule == "official" and lora["alphas"] else ""
    yield "strength", told_strength(lora["strength"])
    yield "scale of B·A", _listed(f"{value:g}" for value in lora["scales"])
    yield "matched", f"{lora['matched']:,} of {lora['total']:,} linears{_others(lora['other_tensors'])}"
    yield "ranks", _listed((f"{rank} ×{count:,}" for rank, count in ranks), [rank for rank, _ in ranks])
    yield "alpha", (_listed(lora["alphas"]) if lora["alphas"] else "none in the file") + ignored
    yield "methods", _listed(f"{method} ×{count:,}" for method, count in lora["methods"].items())
    for label, key in (("DoRA", "dora"), ("full differences", "full_differences")):
        yield label, _count(lora[key], "target") if lora[key] else "none"
    yield "left out", f"{_count(len(lora['left_out']), 'target')}, listed below" if lora["left_out"] else "none"
    yield "naming", name(", ".join(lora["namings"]))
    yield "file", _mono(lora["file"])
    yield "blake3", _mono(f"{lora['blake3'][:16]}…")


def _legend(view: CoverageView) -> dict[str, Any]:
    """The scale with this page's distribution, and the number of targets outside it."""
    changes = [target["change"] for target in view.targets.values()]
    counts = histogram(changes)
    marks = (("▽", view.document["median_change"]), ("▼", view.document["largest_change"]))
    bar = '<i style="height:{:.0%};background:{}"></i>'
    return {
        "marks": "".join(
            f'<span style="left:{position(at):.1%}">{sign}</span>' for sign, at in marks if at is not None
        ),
        "bars": "".join(
            bar.format(count / max(*counts, 1), colour(10 ** (LOW + (i + 0.5) / BINS_PER_DECADE)))
            for i, count in enumerate(counts)
        ),
        "ramp": ", ".join(RAMP),
        "colours": RAMP,
        "looks": Counter(_chip(change)[0] for change in changes),
    }


def _map(view: CoverageView) -> Iterable[str]:
    """A table: one row for each block, one column for each linear, and the columns' sums."""
    if not view.groups:
        yield "<p>This transformer has no blocks.</p>"
        return
    if not view.cells:
        yield "<p>No weight inside the blocks is touched.</p>"
    yield "<div class=wide><table class=map>"
    yield (
        f"<caption>Rows: blocks 0, next to the input, to {view.blocks - 1}, next to the output. Columns: linears in "
        "model order. Hold the pointer on a cell for its name and exact figures.</caption>"
    )
    yield from _column_heads(view.groups)
    yield "<tbody>"
    for block in range(view.blocks):
        gap = "" if block else f"<td rowspan={view.blocks}>"
        cells = ("".join(_cell(view, block, kind) for kind, _ in group.columns) for group in view.groups)
        yield f"<tr><th class=block scope=row>{block}{gap.join(cells)}"
    yield "</tbody>\n<tfoot>"
    for label, sums in _sums(view):
        cells = ("".join(sums[kind] for kind, _ in group.columns) for group in view.groups)
        yield f"<tr><th scope=row>{label}{'<td>'.join(cells)}"
    yield "</tfoot>\n</table></div>"


def _column_heads(groups: Sequence[ColumnGroup]) -> Iterable[str]:
    """Three lines over the columns: the stream, the module, its part."""
    streams = [list(own) for _, own in itertools.groupby(groups, lambda group: group.stream)]
    columns = ("<col class=gap>".join(f"<col span={len(group.columns)}>" for group in own) for own in streams)
    yield f"<colgroup><col class=axis>{'<col class=break>'.join(columns)}</colgroup>"
    heads = (
        f"<th class=stream colspan={sum(len(group.columns) + 1 for group in own) - 1} scope=colgroup>{own[0].stream}"
        for own in streams
    )
    modules = (
        f"<th class=group colspan={len(group.columns)} scope=colgroup><span class=mono>{name(group.module)}</span>"
        + (f"<br><span class=quiet>{group.note}</span>" if group.note else "")
        for group in groups
    )
    parts = ("".join(f"<th class=part scope=col>{_part(label)}" for _, label in group.columns) for group in groups)
    yield f"<thead>\n<tr><th class=corner rowspan=3>block ↓{'<td>'.join(heads)}"
    yield f"<tr>{'<td>'.join(modules)}\n<tr>{'<td>'.join(parts)}\n</thead>"


def _part(label: str) -> str:
    return text(label) if len(label) <= _FLAT_LABEL else f"<div>{text(label)}</div>"


def _cell(view: CoverageView, block: int, kind: str) -> str:
    key = view.cells.get((block, kind))
    if key is None:
        return f'<td class=none title="block {block}, {text(kind)}: not touched">'
    target = view.targets[key]
    change = target["change"]
    look, shade = _chip(change)
    beyond = {"lo": ", below the scale", "hi": ", above the scale"}.get(look, "")
    terms = "; ".join(
        f"LoRA {term['lora'] + 1} rank {term['rank']} scale {term['scale']:g}" for term in target["terms"]
    )
    figure = "from zero" if change is None else f"{change:.2e}"
    error = f"; stored with an error of {_percent(target['error'])}" if "error" in target else ""
    title = f"{text(key)}: {figure}{beyond}, {_counts(target)} weights changed; {terms}{error}"
    return f'<td{f" class={look}" if look else ""}{shade} title="{title}">'


def _counts(target: Mapping[str, Any]) -> str:
    return f"{target['changed']:,} of {target['elements']:,}"


def _sums(view: CoverageView) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The rows below the map, with a cell for every kind: the change, and each LoRA's share of the model."""
    kinds = [kind for group in view.groups for kind, _ in group.columns]
    measured = view.document["kinds"]
    for label, key in (("median, %", "median_change"), ("largest, %", "largest_change")):
        # A kind with only changes from zero has no ratio.
        shown = {k: _brief(None if found["median_change"] is None else found[key]) for k, found in measured.items()}
        yield label, {kind: f"<td>{shown.get(kind, '')}" for kind in kinds}
    if "stored_as" in view.document:
        errors = {kind: _brief(found["median_error"]) for kind, found in measured.items() if "median_error" in found}
        yield "error as stored, %", {kind: f"<td>{errors.get(kind, '')}" for kind in kinds}
    for i, lora in enumerate(view.loras):
        whose = f"LoRA {i + 1} " if len(view.loras) > 1 else ""
        ranks = {kind: view.ranks.get((i, kind), []) for kind in kinds}
        matched = {k: lora["kinds"][k]["matched"] if k in lora["kinds"] else len(ranks[k]) for k in kinds}
        looks = {k: "" if n == view.totals.get(k) else " class=some" if n else " class=no" for k, n in matched.items()}
        yield f"{whose}matched", {kind: f"<td{looks[kind]}>{count}" for kind, count in matched.items()}
        yield f"{whose}rank", {kind: f"<td>{_rank(found)}" for kind, found in ranks.items()}
    yield "in the model", {kind: f"<td>{view.totals.get(kind, '')}" for kind in kinds}


def _rank(ranks: Sequence[int]) -> str:
    """``384``, or ``≤72`` if they differ."""
    if not any(ranks):
        return "full" if ranks else ""
    return f"{'≤' if min(ranks) != max(ranks) else ''}{max(ranks)}"


def _outside(view: CoverageView) -> Iterable[str]:
    if not view.outside:
        return
    yield "<h2>Outside the blocks</h2>"
    if not view.ends:
        count = sum(map(len, view.outside.values()))
        yield f"<p><span class='chip none'></span>None of the {count} linears outside the blocks is touched.</p>"
        return
    yield "<section class=ends>"
    for stream, kinds in view.outside.items():
        yield f"<table>\n<tr><th colspan=2>{stream}<th class=number>‖ΔW‖ / ‖W‖<th class=number>weights changed</tr>"
        for kind in kinds:
            look, shade, figures = "none", "", '<td class="number quiet" colspan=2>not touched'
            if kind in view.ends:
                target = view.targets[view.ends[kind]]
                look, shade = _chip(target["change"])
                told = "from zero" if target["change"] is None else _percent(target["change"])
                figures = f"<td class=number>{told}<td class=number>{_counts(target)}"
            shown = name(view.ends.get(kind, kind))
            yield f'<tr><td><span class="chip {look}"{shade}></span><td class="name mono">{shown}{figures}</tr>'
        yield "</table>"
    yield "</section>"


def _left_out(view: CoverageView) -> Iterable[str]:
    """The targets that --allow-unmatched left out, by LoRA."""
    found = [(lora["name"], lora["left_out"]) for lora in view.loras if lora["left_out"]]
    if found:
        yield "<h2>Left out</h2>\n<p>Targets that this transformer does not have (--allow-unmatched).</p>"
    for lora, modules in found:
        yield f"<section class=left>\n<h3><span class=name>{name(lora)}</span>: {len(modules):,} left out</h3>\n<ul>"
        for module in modules[:MAX_LEFT_OUT]:
            long = len(module) > MAX_NAME
            shown = f"{module[: MAX_NAME // 2]} … {module[-MAX_NAME // 2 :]}" if long else module
            yield f'<li class="name mono">{name(shown)}</li>'
        yield "</ul>"
        more = len(modules) - MAX_LEFT_OUT
        if more > 0:
            yield f"<p class=quiet>and {more:,} more; coverage.json lists all {len(modules):,}</p>"
        yield "</section>"
