"""An overlay's weights as one safetensors file with the official names, for ComfyUI and the official code."""

from __future__ import annotations

from ltxpack.export.plan import PARTS, ExportOptions, plan_export
from ltxpack.export.write import ExportReport, export

__all__ = ["PARTS", "ExportOptions", "ExportReport", "export", "plan_export"]
