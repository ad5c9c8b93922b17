"""The page of ``plan --page``: one file for a browser that says how a machine runs a video, and what to type.

The planner computes every figure when the page is written, for a grid of machines and videos. choices.py has the grid,
grid.py its plans, document.py the plans as JSON, and plan.html, plan.css and plan.js the page.
"""

from ltxpack.deployment.document import render

__all__ = ["render"]
