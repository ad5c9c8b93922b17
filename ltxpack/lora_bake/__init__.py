"""Bakes LoRAs of any naming into complete transformer folders: one rounding, one read of the base for all strengths."""

from __future__ import annotations

from ltxpack.lora_bake.bake import bake, plan_bake
from ltxpack.lora_bake.coverage import PAGE_NAME, REPORT_NAMES, BakeReport
from ltxpack.lora_bake.plan import BakeOptions, parse_added, parse_blocks

__all__ = ["PAGE_NAME", "REPORT_NAMES", "BakeOptions", "BakeReport", "bake", "parse_added", "parse_blocks", "plan_bake"]
