"""coverage.html: a bake at a glance, block by module, as one page without scripts or anything from elsewhere.

Made from the document of coverage.json alone; the same document gives the same bytes. Names are escaped. Whatever is
measured stands in fields of fixed width: the plan states the page's size before a weight has been read.
"""

from __future__ import annotations

from ltxpack.lora_bake.heatmap.page import HTML_NAME, render

__all__ = ["HTML_NAME", "render"]
