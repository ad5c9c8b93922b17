"""An overlay's weights as one safetensors file with the official names, for ComfyUI and the official code."""

from __future__ import annotations

from ltxpack.export.plan import ExportOptions, plan_export
from ltxpack.export.write import export

__all__ = ["ExportOptions", "export", "plan_export"]
