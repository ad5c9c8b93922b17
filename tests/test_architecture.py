"""The limits that the package keeps: imports point one way, names are single, functions and files stay small."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from support import REPOSITORY

PACKAGE = REPOSITORY / "ltxpack"
# Room -> the rooms it may import. errors, reporter, page and imports know nobody.
ALLOWED: dict[str, set[str]] = {"errors": set(), "reporter": set(), "page": set(), "imports": set()}
ALLOWED["files"] = {"errors", "reporter"}
ALLOWED["strength"] = {"errors"}
ALLOWED["ltx23"] = {"errors", "files"}
ALLOWED["manifest"] = {"errors", "files", "strength"}
ALLOWED["activations"] = {"errors", "files", "manifest", "strength"}
ALLOWED["repack"] = {"errors", "reporter", "files", "ltx23", "manifest", "strength"}
ALLOWED["runtime"] = {*ALLOWED["repack"], "activations", "imports"}
ALLOWED["materialize"] = {*ALLOWED["repack"], "repack"}
ALLOWED["lora_bake"] = {*ALLOWED["materialize"], "materialize", "activations", "page", "imports"}
ALLOWED["export"] = {*ALLOWED["lora_bake"], "lora_bake"}
ALLOWED["deployment"] = {*ALLOWED["lora_bake"], "lora_bake", "runtime"}
ALLOWED["demo"] = {*ALLOWED["export"], "export", "runtime"}
ALLOWED["serve"] = {*ALLOWED["runtime"], "runtime"}
ALLOWED["cli"] = {*ALLOWED["demo"], "demo", "deployment", "serve"}
ALLOWED["__main__"] = {"cli"}
ALLOWED["__init__"] = {"runtime"}
# What makes the parts of a video other than the transformer, and what comes with it.
LIBRARIES = {
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "huggingface_hub",
    "tokenizers",
    "sympy",
    "torch._dynamo",
}
HEAVY = {"torch", "diffusers", "transformers", "numpy", "av", "PIL", "huggingface_hub", "jsonschema", "tqdm"}

# What may be at most. Goals without recipes, quantised bakes and exports: the package 19,000 lines in 120 files, the
# tests 20,000 lines.
BOUNDS = {
    "lines of a function": 40,
    "parameters of a function": 10,
    "class names twice": 0,
    "lines of the package": 34_319,
    "files of the package": 179,
    "lines of the tests": 34_584,
}


@functools.cache
def modules() -> dict[Path, ast.Module]:
    """Every module of the package, read once."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def room(path: Path) -> str:
    """``ltxpack/repack/work.py`` -> ``repack``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def dotted(path: Path) -> str:
    """``ltxpack/repack/work.py`` -> ``ltxpack.repack.work``."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(nodes: Iterable[ast.AST], known: set[str]) -> set[str]:
    """The package's modules that these nodes import; of ``from ltxpack import x`` the module x where it is one."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else str(node.module))
    return found & known - {"ltxpack"}


def run_on_import(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that an import of the module runs, without those for type checkers."""
    for statement in body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        yield statement
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from run_on_import(node for node in ast.iter_child_nodes(statement) if isinstance(node, ast.stmt))


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function with where it is."""
    for path, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(PACKAGE)}: {node.name}", node


def test_imports_point_one_way() -> None:
    known = {dotted(path) for path in modules()}
    faults = []
    for path, tree in modules().items():
        beyond = {name.split(".")[1] for name in imported(ast.walk(tree), known)} - ALLOWED[room(path)] - {room(path)}
        faults += [f"{path.relative_to(PACKAGE)} must not import {sorted(beyond)}"] * bool(beyond)
    assert not faults


def test_no_modules_import_one_another_in_a_circle() -> None:
    """Imports that Python runs while it imports; what a function imports when it is called is no circle."""
    known = {dotted(path) for path in modules()}
    left = {dotted(path): imported(run_on_import(tree.body), known) for path, tree in modules().items()}
    while free := [name for name, needed in left.items() if not needed & left.keys() - {name}]:
        for name in free:
            del left[name]
    assert not left, f"among these: {sorted(left)}"


def test_every_module_says_what_it_is_for() -> None:
    assert not [path for path, tree in modules().items() if not ast.get_docstring(tree)]


def test_only_the_cli_prints() -> None:
    assert not [
        f"{path}:{node.lineno}"
        for path, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        if room(path) != "cli"
    ]


def test_no_class_name_twice() -> None:
    """Whether a name is private makes no difference to who reads it."""
    names = Counter(
        node.name.lstrip("_")
        for tree in modules().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    )
    twice = sorted(name for name, count in names.items() if count > 1)
    assert len(twice) <= BOUNDS["class names twice"], twice


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From ``def`` to the end, without the docstring."""
    docstring = node.body[0] if ast.get_docstring(node) else None
    told = 0 if docstring is None else (docstring.end_lineno or 0) - docstring.lineno + 1
    return (node.end_lineno or 0) - node.lineno + 1 - told


def parameters_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without self and cls, which no caller writes."""
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def test_no_function_is_long() -> None:
    assert not [where for where, node in functions() if lines_of(node) > BOUNDS["lines of a function"]]


def test_no_signature_is_wide() -> None:
    assert not [where for where, node in functions() if parameters_of(node) > BOUNDS["parameters of a function"]]


def lines_below(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.rglob("*.py"))


def test_the_package_and_its_tests_stay_small() -> None:
    assert lines_below(PACKAGE) <= BOUNDS["lines of the package"]
    assert len(modules()) <= BOUNDS["files of the package"]
    assert lines_below(REPOSITORY / "tests") <= BOUNDS["lines of the tests"]


def modules_after(*names: str) -> set[str]:
    """All modules in a fresh interpreter after these are imported."""
    code = f"import sys\nimport {', '.join(names)}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


SUMS = ["lora_bake.stream", "lora_bake.trial", "export.write"]
RUNS = ["runtime.run", "runtime.batch", "runtime.pipeline"]
WORKERS = ["runtime.parallel.worker", "runtime.parallel.line_worker", "serve.worker", "serve.ray_workers"]


@pytest.mark.parametrize(
    ("names", "absent"),
    [
        (["ltxpack.cli"], HEAVY),
        (["ltxpack.cli.serve", "ltxpack.serve.server"], {"torch", "diffusers", "av"}),
        (["ltxpack.cli.serve"], {"torch", "fastapi", "uvicorn"}),
        (["ltxpack.materialize", "ltxpack.repack.write", "ltxpack.repack.verify"], {"torch", "diffusers"}),
        (["ltxpack.lora_bake", "ltxpack.export", "ltxpack.cli.bake_lora", "ltxpack.cli.export"], HEAVY - {"numpy"}),
        (["ltxpack.cli.plan", "ltxpack.deployment", "ltxpack.runtime.parallel.planned"], HEAVY - {"numpy"}),
        ([f"ltxpack.{name}" for name in SUMS + RUNS + WORKERS], LIBRARIES),
    ],
    ids=[
        "help",
        "the HTTP process of serve",
        "the command serve",
        "the copying half",
        "reading a LoRA",
        "plan",
        "a bake's sums, and a run and its workers until the overlay is open",
    ],
)
def test_no_heavy_package_is_loaded_for(names: list[str], absent: set[str]) -> None:
    loaded = modules_after(*names)
    assert "click" in loaded or "ltxpack.cli" not in names
    assert not loaded & (absent | {"transformers"})
