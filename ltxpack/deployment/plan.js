"use strict";
// Looks up the plan of the chosen options in the document (see document.py) and shows it. Plans nothing itself.
const data = JSON.parse(document.getElementById("data").textContent);
const names = Object.keys(data.choices);
const counts = names.map((name) => data.choices[name].length);
const rank = Object.fromEntries(names.map((name, number) => [name, number]));
const element = (id) => document.getElementById(id);
const text = (number) => data.texts[number];
const label = (picked, name) => data.choices[name][picked[rank[name]]];
// Of a list that leaves out what is equal to its last entry.
const entry = (list, number) => list[Math.min(number, list.length - 1)];
const gigabytes = (tenths) => `${(tenths / 10).toFixed(1)} GB`;

// `picked` lists the number of the chosen option of each choice, in the order of the page.
// Returns its plan, or why there is none.
function found(picked) {
  const of = (name) => picked[rank[name]];
  const number = of("recipe") * counts[rank.form] + of("form");
  const model = data.cases[number];
  if ("no" in model) return { why: text(model.no) };
  const work = data.works[number][of("size") * counts[rank.frames] + of("frames")];
  const gain = work.gains[of("devices")];
  if (!gain) return { why: "fewer cards gain as much" };
  const useful = work.gains.slice(0, of("devices")).filter((one) => one).length;
  const plan = entry(entry(work.grid[useful], of("card")), of("host"));
  if (!Array.isArray(plan)) return { why: text(plan) };
  const [way, card, host] = plan;
  const [mode, first, next, ...how] = data.ways[way];
  const memory = { card: data.sizes[card], host: data.sizes[host] };
  const run = data.lines[work.runs[useful][of("loras")]].map(text).join(" --");
  const commands = [data.install, ...model.before[of("loras")].map(text), run];
  const beyond = { beside: data.sizes[work.beside[useful]], free: data.sizes[work.free[useful]] };
  const words = { mode: text(mode), how: how.map(text).join(", ") };
  return { model, work, gain, ...words, ...memory, ...beyond, first, next, commands };
}

const changed = (picked, at, option) => picked.map((old, number) => (number === at ? option : old));

// `picked` with the choices after `at` moved to the nearest options that fit; null if none fit.
function fitted(picked, at) {
  const next = at + 1;
  if (next === names.length) return "why" in found(picked) ? null : picked;
  const options = [...Array(counts[next]).keys()];
  options.sort((a, b) => Math.abs(a - picked[next]) - Math.abs(b - picked[next]) || a - b);
  for (const option of options) {
    const done = fitted(changed(picked, next, option), next);
    if (done) return done;
  }
  return null;
}

// Why `option` cannot be chosen, even for the smallest video on one card.
function reason(picked, at, option) {
  const kept = (number) => number < at || names[number] === "recipe" || names[number] === "form";
  const least = picked.map((old, number) => (kept(number) ? old : 0));
  return found(changed(least, at, option)).why;
}

function made(tag, content, className) {
  const node = document.createElement(tag);
  node.append(...[content].flat());
  if (className) node.className = className;
  return node;
}

function inputs(name) {
  const list = element(name);
  return list ? [...list.options] : [...document.querySelectorAll(`input[name=${name}]`)];
}

function showChoices(picked) {
  names.forEach((name, at) => {
    const reasons = new Map();
    inputs(name).forEach((input, option) => {
      input[input.tagName === "OPTION" ? "selected" : "checked"] = option === picked[at];
      input.disabled = !fitted(changed(picked, at, option), at);
      if (!input.disabled) return;
      const why = reason(picked, at, option);
      reasons.set(why, [...(reasons.get(why) || []), data.choices[name][option]]);
    });
    element(`${name}-why`).replaceChildren(...[...reasons].map(([why, labels]) => made("li", `${labels.join(", ")}: ${why}`)));
  });
}

function tile(term, value, note) {
  return made("div", [made("dt", term), made("dd", [made("b", value), made("span", note)])], "tile");
}

function facts(picked, all) {
  const devices = Number(label(picked, "devices"));
  const [base, bakes, total] = all.model.disk[Math.min(picked[rank.loras], 1)];
  const gain = `; on ${devices} cards at most ${(all.gain / 100).toFixed(2)} videos in the time of one, without the transfers between them`;
  return [
    tile(devices > 1 ? "Peak on each card" : "Peak on the card", gigabytes(Math.max(...all.card)), `of ${label(picked, "card")}`),
    tile("Peak on the host", gigabytes(Math.max(...all.host)), devices > 1 ? `for each of ${devices} processes` : `of ${label(picked, "host")}`),
    tile("Work", `${(all.work.petaflop / 10).toFixed(1)} PFLOP`, `${all.work.forwards} forwards of the transformer${devices > 1 ? gain : ""}`),
    tile("Download", gigabytes(base), "once, for all recipes"),
    tile("Disk", gigabytes(total), bakes ? `the download, and ${gigabytes(bakes)} of bakes` : "the download"),
    tile("Read for the first video", gigabytes(all.first), `${gigabytes(all.next)} for each further one with another prompt`),
  ];
}

// A bar of parts [class, tenths of a GB], cut off at `whole`.
function bar(parts, whole) {
  const pieces = parts.map(([className, size]) => {
    const piece = made("i", "", className);
    piece.style.width = `${(100 * size) / whole}%`;
    return piece;
  });
  const drawn = made("div", pieces, "bar");
  drawn.setAttribute("aria-hidden", "true");
  return drawn;
}

function phases(picked, { work, card, host, beside, free }) {
  const devices = Number(label(picked, "devices"));
  const [wholeCard, wholeHost] = ["card", "host"].map((name) => parseFloat(label(picked, name)) * 10);
  return data.lines[work.phases].map((name, at) => {
    const head = made("th", text(name));
    head.scope = "row";
    const onCard = [["weights", card[at] - beside[at]], ["beside", beside[at]], ["free", free[at]]];
    const onHost = [["on-host", host[at] * devices], ["free", data.system]];
    return made("tr", [
      head,
      made("td", [bar(onCard, wholeCard), made("span", gigabytes(card[at]))]),
      made("td", [bar(onHost, wholeHost), made("span", `${gigabytes(host[at])}${devices > 1 ? ` × ${devices}` : ""}`)]),
    ]);
  });
}

function show(picked) {
  const all = found(picked);
  showChoices(picked);
  element("answer").textContent = `It fits, in mode ${all.mode}`;
  element("how").textContent = `${all.how[0].toUpperCase()}${all.how.slice(1)}.`;
  const beneath = picked[rank.loras] ? "; with LoRAs of your own in each" : "";
  element("stages").textContent = `Transformers of ${text(all.model.stages)}${beneath}`;
  element("facts").replaceChildren(...facts(picked, all));
  element("card-head").textContent = `card, of ${label(picked, "card")}`;
  element("host-head").textContent = `host, of ${label(picked, "host")}`;
  element("phases").replaceChildren(...phases(picked, all));
  element("commands").textContent = all.commands.join("\n");
  element("copied").textContent = "";
  element("loras-note").hidden = picked[rank.loras] === 0;
}

function written(picked) {
  return names.map((name) => `${name}=${encodeURIComponent(label(picked, name))}`).join("&");
}

// What the address says, as far as it is an option and fits.
function read(picked) {
  const said = new URLSearchParams(location.hash.slice(1));
  const wanted = names.map((name, at) => {
    const option = data.choices[name].indexOf(said.get(name));
    return option < 0 ? picked[at] : option;
  });
  return fitted(wanted, -1);
}

let now = read(names.map((name) => inputs(name).findIndex((input) => input.checked || input.selected)));

function pick(at, option) {
  const before = now;
  now = fitted(changed(before, at, option), at);
  const moved = names.filter((name, number) => number > at && before[number] !== now[number]);
  element("changed").textContent = moved.length ? `Changed, because it would not fit: ${moved.map((name) => `${element(`${name}-legend`).textContent.toLowerCase()} from ${label(before, name)} to ${label(now, name)}`).join(", ")}.` : "";
  show(now);
  history.replaceState(null, "", `#${written(now)}`);
}

element("choices").addEventListener("change", (event) => {
  const input = event.target;
  pick(rank[input.name], input.tagName === "SELECT" ? input.selectedIndex : Number(input.value));
});
addEventListener("hashchange", () => show((now = read(now))));
element("copy").addEventListener("click", async () => {
  const typed = element("commands");
  try {
    await navigator.clipboard.writeText(`${typed.textContent}\n`);
    element("copied").textContent = "Copied.";
  } catch {
    getSelection().selectAllChildren(typed);
    element("copied").textContent = "Selected: copy it with the keyboard.";
  }
});
show(now);
document.querySelector("main").hidden = false;
