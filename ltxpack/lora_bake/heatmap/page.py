"""coverage.html from head to foot; the map of its middle is in grid.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ltxpack.lora_bake.heatmap.grid import legend, look, shade, table
from ltxpack.lora_bake.heatmap.markup import (
    FROM_ZERO,
    and_others,
    clipped,
    fixed,
    name,
    percent,
    targets,
    text,
    values,
)
from ltxpack.lora_bake.heatmap.style import STYLE
from ltxpack.lora_bake.heatmap.view import View
from ltxpack.lora_bake.report import split_name

HTML_NAME = "coverage.html"
# A list without an end is cut here; coverage.json has it whole.
MAX_LEFT_OUT = 48

_RULES = {
    "fp32": "base and update summed in float32, one rounding",
    "official": "the official bf16 arithmetic",
}
# Chip and figures of a line that has none.
_UNTOUCHED = ('<span class="chip none"></span>', '<td class="number quiet" colspan=2>not touched')


def render(document: Mapping[str, Any]) -> bytes:
    """The page for ``document`` (coverage.json)."""
    view = View(document)
    sections = (_head(view), _tiles(view), _loras(view), _blocks(view), _outside(view), _left_out(view), _foot())
    body = "\n".join(line for section in sections for line in section)
    return (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>LoRA coverage: {text(document['bake'])}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n"
        f"{body}\n</body>\n</html>\n"
    ).encode("utf-8", "backslashreplace")


def _head(view: View) -> Iterable[str]:
    document = view.document
    told = f" ({_RULES[document['rule']]})" if document["rule"] in _RULES else ""
    yield f"<header>\n<p class=kicker>LoRA coverage</p>\n<h1 class=name>{name(document['bake'])}</h1>"
    yield (
        f"<p class=quiet>rule {text(document['rule'])}{told} · kernel {text(document['kernel'])} · "
        f"device {text(document['device'])}</p>\n</header>"
    )


def _tiles(view: View) -> Iterable[str]:
    document = view.document
    (reached, total), (changed, aimed) = view.linears, (document["changed_weights"], document["targeted_weights"])
    largest = document["largest_change"]
    at = [key for key, target in view.targets.items() if target["change"] == largest and largest is not None]
    tiles = (
        (f"{reached:,} of {total:,}", f"linears reached{and_others(len(view.targets) - reached)}"),
        (
            fixed(f"{changed / aimed:.1%}" if aimed else "none", 6),
            f"of {aimed:,} targeted weights changed: {fixed(f'{changed:,}', len(f'{aimed:,}'))} in "
            f"{document['changed_tensors']:,} tensors",
        ),
        (percent(document["median_change"]), "median ‖ΔW‖ / ‖W‖ of the targets"),
        (percent(largest), f"largest ‖ΔW‖ / ‖W‖<br>{_one_of(at[:1], view.targets)}"),
    )
    yield "<section class=tiles>"
    for figure, told in tiles:
        yield f"<div class=tile><b>{figure}</b><span>{told}</span></div>"
    yield "</section>"


def _one_of(chosen: Sequence[str], names: Iterable[str]) -> str:
    """The chosen target, in as many bytes as the longest of ``names`` would take."""
    shown = "".join(name(_short(key)) for key in chosen)
    longest = max((len(name(_short(key)).encode()) for key in names), default=0)
    return f'<span class="name mono">{shown}</span>' + " " * (longest - len(shown.encode()))


def _short(key: str) -> str:
    block, kind = split_name(key)
    return kind if block is None else f"block {block}, {kind}"


def _loras(view: View) -> Iterable[str]:
    if not view.loras:
        return
    yield f"<h2>{'LoRA' if len(view.loras) == 1 else 'LoRAs, in the order they were applied'}</h2>"
    yield "<section class=loras>"
    for i, lora in enumerate(view.loras, 1):
        number = f"<span>{i} · </span>" if len(view.loras) > 1 else ""
        yield f"<article class=lora>\n<h3 class=name>{number}{name(lora['name'])}</h3>\n<dl>"
        for term, value in _facts(lora, view.document["rule"]):
            yield f"<div><dt>{term}</dt><dd>{value}</dd></div>"
        yield "</dl>\n</article>"
    yield "</section>"


def _facts(lora: Mapping[str, Any], rule: str) -> Iterator[tuple[str, str]]:
    """The lines of one LoRA's card, escaped."""
    ranks = sorted(lora["ranks"].items(), key=lambda item: int(item[0]))
    ignored = " (not used by the official rule)" if rule == "official" and lora["alphas"] else ""
    yield "strength", f"{lora['strength']:g}"
    yield "scale of B·A", values(f"{value:g}" for value in lora["scales"])
    yield "matched", f"{lora['matched']:,} of {lora['total']:,} linears{and_others(lora['other_tensors'])}"
    yield "ranks", values((f"{rank} ×{count:,}" for rank, count in ranks), [rank for rank, _ in ranks])
    yield "alpha", (values(lora["alphas"]) if lora["alphas"] else "none in the file") + ignored
    yield "DoRA", targets(lora["dora"])
    yield "full differences", targets(lora["full_differences"])
    yield "left out", f"{targets(len(lora['left_out']))}, listed below" if lora["left_out"] else "none"
    yield "naming", name(", ".join(lora["namings"]))
    yield "file", f'<span class="name mono">{name(lora["file"])}</span>'
    yield "blake3", f'<span class="name mono">{text(lora["blake3"][:16])}…</span>'


def _blocks(view: View) -> Iterable[str]:
    yield "<h2>Blocks</h2>"
    yield from legend(view)
    yield from table(view)


def _outside(view: View) -> Iterable[str]:
    if not view.outside:
        return
    yield "<h2>Outside the blocks</h2>"
    if not view.ends:
        count = sum(len(kinds) for kinds in view.outside.values())
        yield f"<p><span class='chip none'></span>None of the {count} linears outside the blocks is touched.</p>"
        return
    yield "<section class=ends>"
    for stream, kinds in view.outside.items():
        yield f"<table>\n<tr><th colspan=2>{stream}<th class=number>‖ΔW‖ / ‖W‖<th class=number>weights changed</tr>"
        for kind in kinds:
            target = view.ends.get(kind)
            chip, figures = _touched(view.targets[target]) if target else _UNTOUCHED
            yield f'<tr><td>{chip}<td class="name mono">{name(target or kind)}{figures}</tr>'
        yield "</table>"
    yield "</section>"


def _touched(target: Mapping[str, Any]) -> tuple[str, str]:
    change = target["change"]
    chip = f'<span class="chip {look(change)}"{shade(change)}></span>'
    told = FROM_ZERO if change is None else percent(change)
    counts = f"{target['changed']:,} of {target['elements']:,}"
    return chip, f"<td class=number>{fixed(told, 11)}<td class=number>{counts}"


def _left_out(view: View) -> Iterable[str]:
    """The targets that --allow-unmatched left out, each LoRA's by itself."""
    found = [(lora["name"], lora["left_out"]) for lora in view.loras if lora["left_out"]]
    if not found:
        return
    yield "<h2>Left out</h2>\n<p>Targets that this transformer does not have (--allow-unmatched).</p>"
    for lora, modules in found:
        yield "<section class=left>"
        yield f"<h3><span class=name>{name(lora)}</span>: {len(modules):,} left out</h3>\n<ul>"
        for module in modules[:MAX_LEFT_OUT]:
            yield f'<li class="name mono">{name(clipped(module))}</li>'
        yield "</ul>"
        if len(modules) > MAX_LEFT_OUT:
            rest = len(modules) - MAX_LEFT_OUT
            yield f"<p class=quiet>and {rest:,} more; coverage.json lists all {len(modules):,}</p>"
        yield "</section>"


def _foot() -> Iterable[str]:
    yield (
        "<footer>coverage.json beside this page holds every figure and every name in full. "
        "The same bake always gives the same page.</footer>"
    )
