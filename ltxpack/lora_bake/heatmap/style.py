"""The style sheet of coverage.html: light or dark as the reader has it; printed, all of it grows with the paper."""

from __future__ import annotations

from ltxpack.lora_bake.heatmap.scale import RAMP

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1d21; --quiet: #5b6470; --line: #d8dce2; --card: #f5f6f8;
  --hatch: #c3c9d1; --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #13161a; --ink: #e4e7eb; --quiet: #98a2ae; --line: #2e343c; --card: #1b1f25; --hatch: #414952; }
}
* { box-sizing: border-box; }
body { background: var(--paper); color: var(--ink); font: .875rem/1.45 system-ui, "Segoe UI", Roboto, sans-serif;
  margin: 0 auto; max-width: 92rem; padding: 1.8rem 2rem 2.5rem; print-color-adjust: exact; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .1rem 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; } h3 { font-size: 1rem; margin: 0 0 .55rem; }
p { margin: .25rem 0; } .quiet { color: var(--quiet); }
.kicker { color: var(--quiet); font-size: .78rem; letter-spacing: .09em; text-transform: uppercase; }
.name { overflow-wrap: anywhere; unicode-bidi: isolate; } .mono { font-family: var(--mono); font-size: .86em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13.5rem, 1fr)); gap: .8rem; margin-top: 1.1rem; }
.tile, .lora { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem; }
.tile b { display: block; font-size: 1.45rem; font-weight: 600; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { display: block; color: var(--quiet); font-size: .82rem; }
.loras { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: .8rem; }
.lora h3 span { color: var(--quiet); font-weight: 400; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(25rem, 100%), 1fr)); gap: .22rem 1.5rem;
  margin: 0; }
dl div { display: grid; grid-template-columns: 7rem 1fr; gap: .6rem; }
dt { color: var(--quiet); } dd { margin: 0; min-width: 0; font-variant-numeric: tabular-nums; }
.left { border-left: 3px solid #d08700; margin: .7rem 0 0; padding: .1rem 0 .1rem .8rem; }
.left ul { columns: 24rem; column-gap: 1.5rem; list-style: none; margin: .3rem 0 0; padding: 0; font-size: .86rem; }
.left li { break-inside: avoid; padding-left: 1rem; text-indent: -1rem; }
.key { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; align-items: flex-end; margin: .8rem 0 1.1rem; }
.legend { flex: 0 1 34rem; min-width: min(22rem, 100%); padding: 0 1.6rem; font-size: .78rem; }
.bars { display: flex; align-items: flex-end; height: 3.2rem; gap: 1px; }
.bars i { flex: 1; } .ramp { height: .85rem; background: linear-gradient(to right, @RAMP@); }
.marks, .ticks { position: relative; height: 1.25rem; } .ticks { margin-top: .15rem; color: var(--quiet); }
.marks span, .ticks span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.told { font-size: .82rem; } .told p { margin: .2rem 0; }
.count { display: inline-block; margin-right: .4rem; min-width: 2.3rem; text-align: right;
  font-variant-numeric: tabular-nums; }
.chip { display: inline-block; width: 1.9rem; height: .85rem; line-height: .85rem; margin-right: .5rem;
  text-align: center; vertical-align: middle; }
.none { background: repeating-linear-gradient(135deg, var(--hatch) 0 1px, transparent 1px 5px);
  box-shadow: inset 0 0 0 1px var(--line); }
.wide { overflow-x: auto; }
.map { border-collapse: separate; border-spacing: 1px; table-layout: fixed; width: 100%; min-width: 76rem; }
.map caption { caption-side: bottom; color: var(--quiet); font-size: .78rem; padding-top: .5rem; text-align: left; }
.map .axis { width: 6.6rem; } .map .gap { width: .5rem; } .map .break { width: 1.3rem; }
.map th { font-weight: 400; padding: 0; }
.map .stream { border-bottom: 2px solid var(--ink); font-weight: 600; padding-bottom: .15rem; text-align: left; }
.map .group { font-size: .73rem; line-height: 1.25; padding-top: .35rem; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
.map .group .quiet { white-space: nowrap; }
.map .part { color: var(--quiet); font-size: .74rem; padding-bottom: .1rem; text-align: center;
  vertical-align: bottom; }
.map .part div { writing-mode: vertical-rl; transform: rotate(180deg); white-space: nowrap; max-height: 14rem;
  overflow: hidden; text-overflow: ellipsis; margin: auto; }
.map .block { color: var(--quiet); font-size: .7rem; line-height: 1; padding-right: .45rem; text-align: right;
  font-variant-numeric: tabular-nums; }
.map .corner { font-size: .76rem; padding: 0 .45rem .1rem 0; text-align: right; vertical-align: bottom; }
.map tbody td { height: .98rem; padding: 0; font-size: .62rem; line-height: 1; text-align: center; color: #fff; }
.map tbody .hi, .map tbody .fz { color: #000; } .map tbody .zr { color: var(--quiet); }
.map tfoot td { font-size: .68rem; text-align: center; padding: 0; font-variant-numeric: tabular-nums;
  white-space: nowrap; letter-spacing: -.02em; }
.map tfoot th { color: var(--quiet); font-size: .7rem; padding-right: .45rem; text-align: right; white-space: nowrap; }
.map tfoot tr:first-child > * { padding-top: .4rem; } .map .some { color: #c27803; font-weight: 600; }
.map .no { color: var(--hatch); }
.lo::after { content: "\\25be"; } .hi::after { content: "\\25b4"; } .zr::after { content: "0"; }
.fz::after { content: "\\221e"; } .zr { box-shadow: inset 0 0 0 1px var(--line); }
.chip.lo, .chip.hi, .chip.zr, .chip.fz { font-size: .62rem; }
.chip.lo { color: #fff; } .chip.hi, .chip.fz { color: #000; } .chip.zr { color: var(--quiet); }
.ends { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(34rem, 100%), 1fr)); gap: .4rem 3rem; }
.ends table { border-collapse: collapse; width: 100%; align-self: start; font-size: .84rem; }
.ends th { border-bottom: 2px solid var(--ink); font-weight: 600; text-align: left; padding: 0 .8rem .15rem 0; }
.ends td { border-bottom: 1px solid var(--line); padding: .16rem .8rem .16rem 0; font-variant-numeric: tabular-nums; }
.ends .number { text-align: right; white-space: nowrap; } .ends th.number { font-weight: 400; color: var(--quiet); }
.ends td:first-child { width: 2.3rem; padding-right: 0; } .ends td:last-child, .ends th:last-child { padding-right: 0; }
footer { border-top: 1px solid var(--line); color: var(--quiet); font-size: .8rem; margin-top: 2rem;
  padding-top: .7rem; }
@media (max-width: 40rem) { body { padding: 1.2rem 1rem; } }
@page { margin: 9mm; }
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --quiet: #444; --line: #ccc; --card: #fff; --hatch: #bbb;
    font-size: 1.13vw; }
  body { max-width: none; padding: 0; } .wide { overflow: visible; } h2 { break-after: avoid; }
  .key, .tile, .lora, .map { break-inside: avoid; }
}
""".strip().replace("@RAMP@", ", ".join(RAMP))
