"""The deployment page: which machine runs which video how, what it takes, and what to type; one file for a browser.

Everything on it is the planner's, worked out for a grid of machines and videos when the page is written. The page is in
plan.html, plan.css and plan.js, what can be picked in choices.py, the plans in grid.py, and in document.py how the page
gets them.
"""

from ltxpack.deployment.page import render

__all__ = ["render"]
