"""The line the rooms hold: imports point one way, heavy packages are loaded late, every module says what it is for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY

PACKAGE = REPOSITORY / "ltxpack"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Room -> the rooms it may import. errors and reporter know nobody.
ALLOWED: dict[str, set[str]] = {"errors": set(), "reporter": set()}
ALLOWED["files"] = {"errors", "reporter"}
ALLOWED["ltx23"] = ALLOWED["manifest"] = {"errors", "files"}
ALLOWED["repack"] = {"errors", "reporter", "files", "ltx23", "manifest"}
ALLOWED["runtime"] = {"errors", "reporter", "files", "ltx23", "manifest"}
ALLOWED["materialize"] = {*ALLOWED["repack"], "repack"}
ALLOWED["lora_bake"] = {*ALLOWED["materialize"], "materialize"}
ALLOWED["export"] = {*ALLOWED["lora_bake"], "lora_bake"}
ALLOWED["demo"] = {*ALLOWED["export"], "export", "runtime"}
ALLOWED["cli"] = {*ALLOWED["demo"], "demo"}
ALLOWED["__main__"] = {"cli"}
ALLOWED["__init__"] = {"runtime"}
HEAVY = ("torch", "diffusers", "transformers", "numpy", "av", "PIL", "huggingface_hub", "jsonschema", "tqdm")


def room(path: Path) -> str:
    """``ltxpack/repack/work.py`` -> ``repack``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms a module imports, late imports included; the bare package (its version) does not count."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ltxpack":
            parts = (node.module or "").split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            found.update(name for name in names if name != "__version__")
        if isinstance(node, ast.Import):
            found.update(a.name.split(".")[1] for a in node.names if a.name.startswith("ltxpack."))
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    beyond = imported_rooms(path) - ALLOWED[room(path)] - {room(path)}
    assert not beyond, f"{room(path)} must not import {sorted(beyond)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_cli_prints(path: Path) -> None:
    calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    prints = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
    assert not prints or room(path) == "cli"


def modules_after(statement: str) -> set[str]:
    """Top-level packages loaded in a fresh interpreter after ``statement``."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_help_loads_no_heavy_package() -> None:
    loaded = modules_after("import ltxpack.cli")
    assert not loaded & set(HEAVY)
    assert "click" in loaded


@pytest.mark.parametrize("module", ["ltxpack.materialize", "ltxpack.repack.execute", "ltxpack.repack.verify"])
def test_the_copying_half_loads_no_torch(module: str) -> None:
    assert not modules_after(f"import {module}") & {"torch", "diffusers", "transformers"}
