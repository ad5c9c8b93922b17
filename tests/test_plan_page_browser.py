"""The deployment page in a real browser: its choices, figures and commands; by keyboard, on a small screen, printed.

Needs the package playwright and a Chromium that is installed (``LTXPACK_BROWSER`` names another one than those on the
path); skipped where one of them is missing.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from plan_page_support import Shown, document_of
from support import REPOSITORY

from ltxpack.deployment.choices import CARDS, DEVICES, FORMS, FRAMES, HOSTS, RECIPES, SIZES, choices
from ltxpack.deployment.grid import Subject, gains, machine_of, share_of
from ltxpack.files.units import gigabytes
from ltxpack.runtime.sampling.recipes import RECIPES as EVERY_RECIPE
from ltxpack.runtime.weights.report import plan_or_refuse, to_json

FILE = REPOSITORY / "docs" / "plan.html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = os.environ.get("LTXPACK_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
CHOICES = choices()
NAMES = [choice.name for choice in CHOICES]
COUNTS = [len(choice.options) for choice in CHOICES]
Picked = tuple[int, ...]

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser here: {', '.join(BROWSERS)}, or LTXPACK_BROWSER")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=[*FLAGS])
        yield opened
        opened.close()


@pytest.fixture
def said() -> list[str]:
    """What the browser complains of, and what it asks for beside the page."""
    return []


@pytest.fixture
def opened(browser: Any, said: list[str]) -> Iterator[Any]:
    """``opened(address part, **of the context)``; in the end nothing may have been complained of or asked for."""
    contexts = []

    def made(fragment: str = "", **more: Any) -> Any:
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **more}))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(FILE.as_uri()) else said.append(request.url))
        page.goto(FILE.as_uri() + fragment)
        return page

    yield made
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture(scope="module")
def fitting() -> Any:
    """By the options of all choices but the last: whether the page has a plan for them."""
    document, found = document_of(FILE.read_bytes()), np.zeros(COUNTS[:-1], bool)
    for recipe, form, size, frames in product(*map(range, map(len, (RECIPES, FORMS, SIZES, FRAMES)))):
        shown = Shown(document, recipe, form, size, frames)
        for count, card, host in product(shown.devices, range(len(CARDS)), range(len(HOSTS))):
            at = (card, host, recipe, DEVICES.index(count), form, size, frames)
            found[at] = "refused" not in shown.on(count, card, host)
    return found


READ = """() => ({
  picked: [...document.querySelectorAll('.choice')].map((one) => one.querySelector('select')
    ? one.querySelector('select').selectedIndex : [...one.querySelectorAll('input')].findIndex((i) => i.checked)),
  enabled: [...document.querySelectorAll('.choice')].map((one) =>
    [...one.querySelectorAll('option, input')].map((i) => !i.disabled)),
  why: [...document.querySelectorAll('.why')].map((one) => [...one.children].map((li) => li.textContent)),
  answer: document.querySelector('#answer').textContent, how: document.querySelector('#how').textContent,
  facts: [...document.querySelectorAll('.tile')].map((one) => [one.querySelector('dt').textContent,
    one.querySelector('b').textContent, one.querySelector('span').textContent]),
  phases: [...document.querySelectorAll('#phases tr')].map((row) => [...row.children].map((cell) => cell.textContent)),
  bars: [...document.querySelectorAll('.bar')].map((one) => [...one.children].map((i) => parseFloat(i.style.width))),
  commands: document.querySelector('#commands').textContent,
})"""


def pick(page: Any, at: int, option: int) -> None:
    """As a person would: by the list, or on the label."""
    if NAMES[at] == "card":
        page.select_option("#card", index=option)
    else:
        page.locator(f"input[name={NAMES[at]}]").nth(option).click()


def together(row: Sequence[int]) -> set[tuple[int, int, int, int]]:
    """Every two options that are picked in ``row``."""
    return {(i, row[i], j, row[j]) for i, j in combinations(range(len(NAMES)), 2)}


def pairs() -> Iterator[Picked]:
    """Picks in which every two options of two choices come together, of each the best of some that are drawn."""
    draw = random.Random(0)
    left: set[tuple[int, int, int, int]] = set()
    for i, j in combinations(range(len(NAMES)), 2):
        left |= {(i, a, j, b) for a in range(COUNTS[i]) for b in range(COUNTS[j])}
    while left:
        i, a, j, b = min(left)
        rows = [[draw.randrange(count) for count in COUNTS] for _ in range(60)]
        for row in rows:
            row[i], row[j] = a, b
        best = max(rows, key=lambda row: len(left & together(row)))
        left -= together(best)
        yield tuple(best)


def told(subject: Subject, picked: Picked) -> dict[str, Any]:
    """What the page must show for ``picked``, by the planner."""
    card, host, recipe, devices, form, size, frames, loras = picked
    gb, memory, count, video = list(CARDS)[card], HOSTS[host], DEVICES[devices], (SIZES[size], FRAMES[frames])
    case = subject.case(EVERY_RECIPE[list(RECIPES)[recipe]], list(FORMS)[form])
    machine, work = machine_of(gb, memory, count), case.request(video).work(case.stages)
    work = share_of(subject.dit, work, case.model.itemsize, count)
    plan = plan_or_refuse(case.model, work, machine, "auto")
    words, several = to_json(plan, machine, 1, []), f" × {count}" if count > 1 else ""
    base, bakes = subject.disk(case, loras)
    gain = gains(subject.dit, case.request(video).work(case.stages), case.model.itemsize)[devices]
    forwards = sum(stage.evaluations * stage.passes for stage in work.stages)
    whole = [(one.weights, one.activations, one.needed - one.card + machine.context) for one in plan.phases]
    return {
        "answer": f"It fits, in mode {plan.mode}",
        "how": words["description"][0].upper() + words["description"][1:] + ".",
        "phases": [[one.name, gigabytes(one.card), gigabytes(one.host) + several] for one in plan.phases],
        "facts": {
            "card": (gigabytes(plan.card), f"of {gb} GB"),
            "host": (gigabytes(plan.host), f"of {memory} GB" if count == 1 else f"for each of {count} processes"),
            "Work": ("PFLOP", f"{forwards} forwards" if count == 1 else f"at most {gain:.2f} videos"),
            "Download": (gigabytes(base), "once"),
            "Disk": (gigabytes(base + bakes), gigabytes(bakes) if bakes else "the download"),
            "first": (gigabytes(plan.first_read), gigabytes(plan.next_read)),
        },
        "bars": [[100 * part / (gb * 1e9) for part in parts] for parts in whole],
        "commands": "\n".join(["pip install ltxpack", *subject.commands(case, video, count, loras)]),
    }


def test_every_two_choices_show_what_the_planner_says(opened: Any, fitting: Any) -> None:
    subject, page, met = Subject(None), opened(), set()
    for wanted in pairs():
        for at, option in enumerate(wanted):
            before = page.evaluate(READ)
            if before["enabled"][at][option]:
                if before["picked"][at] != option:
                    pick(page, at, option)
            elif NAMES[at] != "loras":
                assert not fitting[(*before["picked"][:at], option)].any()
        shown = page.evaluate(READ)
        picked = tuple(shown["picked"])
        met |= set(zip(NAMES, picked, strict=True))
        expected = told(subject, picked)
        for part in ("answer", "how", "phases", "commands"):
            assert shown[part] == expected[part], picked
        for (term, value, note), (key, (figure, words)) in zip(shown["facts"], expected["facts"].items(), strict=True):
            assert key in term and figure in value and words in note, picked
        for drawn, parts in zip(shown["bars"][::2], expected["bars"], strict=True):
            assert drawn == pytest.approx(parts, abs=100 * 0.11 / list(CARDS)[picked[0]])
        for at, enabled in enumerate(shown["enabled"]):
            possible = [fitting[(*picked[:at], option)[: len(COUNTS) - 1]].any() for option in range(COUNTS[at])]
            assert enabled == possible, (NAMES[at], picked)
            reasons = " ".join(shown["why"][at])
            labels = list(CHOICES[at].options)
            assert all((label in reasons) or fine for label, fine in zip(labels, enabled, strict=True))
            assert bool(reasons) == (not all(enabled))
    assert met == {(name, option) for name, count in zip(NAMES, COUNTS, strict=True) for option in range(count)}


def test_a_changed_choice_keeps_what_still_fits(opened: Any) -> None:
    page = opened("#card=180 GB&host=256 GB&recipe=two-stage&devices=1&form=fp8&size=1088×1920&frames=481&loras=2")
    before = page.evaluate(READ)["picked"]
    assert before == [8, 3, 2, 0, 1, 3, 3, 2]
    assert page.text_content("#changed") == ""
    pick(page, 0, 0)
    after = page.evaluate(READ)["picked"]
    assert [name for name, old, new in zip(NAMES, before, after, strict=True) if old != new] == ["card", "frames"]
    assert page.text_content("#changed") == (
        f"Changed, because it would not fit: frames, at 24 a second from 481 to {FRAMES[after[NAMES.index('frames')]]}."
    )
    pick(page, NAMES.index("recipe"), 1)
    assert page.text_content("#changed") == ""
    again = opened(page.evaluate("location.hash"))
    assert again.evaluate(READ) == page.evaluate(READ), "an address says what is picked"
    other = opened("#card=7 GB&frames=<b>&nothing")
    assert other.evaluate(READ) == opened().evaluate(READ)


def test_everything_can_be_done_by_keyboard(opened: Any) -> None:
    page = opened()
    focused = "document.activeElement.name || document.activeElement.id"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    met = []
    for name in NAMES:
        page.keyboard.press("Tab")
        met.append(page.evaluate(focused))
        assert page.evaluate(outline) == "solid"
        before, at = page.evaluate(READ), NAMES.index(name)
        possible = [option for option, enabled in enumerate(before["enabled"][at]) if enabled]
        page.keyboard.press("ArrowDown")
        following = possible[(possible.index(before["picked"][at]) + 1) % len(possible)]
        assert page.evaluate(READ)["picked"][at] == following, name
    assert met == NAMES
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "commands"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "copy" and page.evaluate(outline) == "solid"
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#copied').textContent")
    if page.text_content("#copied").startswith("Selected"):
        assert page.evaluate("getSelection().toString()").strip() == page.text_content("#commands")


CONTRAST = """() => {
  const light = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    const colour = light(getComputedStyle(node).backgroundColor);
    return colour.length === 4 && colour[3] === 0 ? behind(node.parentElement) : colour;
  };
  const texts = [...document.querySelectorAll('body *')].filter((node) =>
    node.checkVisibility() && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
  return texts.map((node) => {
    const [a, b] = [light(getComputedStyle(node).color), behind(node)].map(luminance).sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), node.tagName, node.textContent.slice(0, 30)];
  }).filter(([ratio]) => ratio < 4.5);
}"""


CLIPPED = """() => [...document.querySelectorAll('main *')].filter((node) => node.checkVisibility()
  && !node.closest('.bar') && getComputedStyle(node).display !== 'inline' && node.scrollWidth > node.clientWidth + 1)
  .map((node) => node.outerHTML)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1280])
def test_it_reads_well_dark_and_light_on_a_small_screen_and_a_large_one(width: int, scheme: str, opened: Any) -> None:
    page = opened("#devices=2&loras=3", viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate(CONTRAST) == []
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CLIPPED) == []
    low = "[...document.querySelectorAll('.options label, select, button')].filter((n) => n.offsetHeight < 24).length"
    assert page.evaluate(low) == 0


def test_printed_it_is_what_was_picked_on_one_sheet(opened: Any) -> None:
    page = opened("#card=48 GB&recipe=two-stage&loras=1")
    page.emulate_media(media="print")
    seen = page.locator(".options label:visible b").all_inner_texts()
    assert seen == ["64 GB", "two-stage", "1", "bf16", "1088×1920", "121", "1"]
    assert not page.is_visible("#copy") and page.is_visible("#commands") and page.is_visible("#phases")
    assert page.pdf(format="A4").count(b"/Type /Page\n") == 1


def test_without_scripts_it_says_what_to_type(opened: Any) -> None:
    page = opened(java_script_enabled=False)
    assert "ltxpack plan --vram 24GB --ram 64GB" in page.inner_text("noscript")
    assert not page.is_visible("#choices") and not page.is_visible("#result")
