"""What the tests of the deployment page share: its document decoded, and what the planner says of the same."""

from __future__ import annotations

import json
import re
from itertools import product
from typing import Any

from ltxpack.deployment.choices import DEVICES, FORMS, FRAMES, RECIPES

CASES = list(product(RECIPES, FORMS))


def document_of(page: bytes) -> dict[str, Any]:
    """What the page's script works from."""
    found = re.search(rb"<script type=application/json id=data>(.*?)</script>", page, re.DOTALL)
    assert found
    document: dict[str, Any] = json.loads(found[1])
    return document


class Shown:
    """What the page has for one thing of each choice, decoded by the words of document.py."""

    def __init__(self, document: dict[str, Any], recipe: int, form: int, size: int, frames: int) -> None:
        self.document = document
        self.case = document["cases"][recipe * len(FORMS) + form]
        self.work = document["works"][recipe * len(FORMS) + form][size * len(FRAMES) + frames]

    def text(self, number: int) -> str:
        return str(self.document["texts"][number])

    @property
    def devices(self) -> list[int]:
        """The numbers of cards that are of use."""
        return [count for count, gain in zip(DEVICES, self.work["gains"], strict=True) if gain > 0]

    def on(self, devices: int, card: int, host: int) -> dict[str, Any]:
        """The plan or the refusal, with the numbers of document.py as texts."""
        cards = self.work["grid"][self.devices.index(devices)]
        hosts = cards[min(card, len(cards) - 1)]
        plan = hosts[min(host, len(hosts) - 1)]
        if isinstance(plan, int):
            return {"refused": self.text(plan)}
        way, on_card, on_host = plan
        mode, first, further, *how = self.document["ways"][way]
        sizes, phases = self.document["sizes"], map(self.text, self.document["lines"][self.work["phases"]])
        return {
            "mode": self.text(mode),
            "description": ", ".join(map(self.text, how)),
            "phases": list(zip(phases, sizes[on_card], sizes[on_host], strict=True)),
            "reads": (first, further),
        }

    def commands(self, devices: int, loras: int) -> list[str]:
        run = self.document["lines"][self.work["runs"][self.devices.index(devices)][loras]]
        return [*map(self.text, self.case["before"][loras]), " --".join(map(self.text, run))]
