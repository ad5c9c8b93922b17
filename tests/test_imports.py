"""Large imports leave the collector nothing to look through, and everything else as it was."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY, in_fresh_process

from ltxpack.imports import uncollected

FOUND = """
import gc
from ltxpack.imports import claim_process, uncollected
with uncollected():
    import colorsys
others = [gc.get_freeze_count() == 0]
claim_process()
with uncollected():
    off = not gc.isenabled()
    import decimal
once = gc.get_freeze_count()
with uncollected():
    import decimal
answer = [*others, off, gc.isenabled(), once, gc.get_freeze_count(), len(gc.get_objects())]
"""


def test_what_a_block_imports_is_never_looked_through() -> None:
    (untouched, off, on, once, twice, left), _ = in_fresh_process(FOUND)
    assert untouched, "a process that is somebody else's"
    assert off and on
    assert once == twice > 5_000 > left


@pytest.mark.parametrize("enabled", [True, False])
def test_a_block_that_fails_leaves_the_collector_as_it_was(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltxpack.imports._ours", True)
    monkeypatch.setattr(gc, "freeze", lambda: pytest.fail("nothing was imported"))
    if not enabled:
        gc.disable()
    try:
        with pytest.raises(ModuleNotFoundError), uncollected():
            import no_such_module_of_anybody  # type: ignore[import-not-found]  # noqa: F401
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_a_module_runs_after_its_imports(tmp_path: Path) -> None:
    (tmp_path / "large.py").write_text(
        "import gc\nimport decimal\nfrom ltxpack.imports import uncollected\nat_import = gc.isenabled()\n"
        "def main():\n    print(at_import, gc.isenabled(), gc.get_freeze_count() > 0, __name__)\n"
        "    with uncollected():\n        print(gc.isenabled())\n    return 3\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "ltxpack.imports", "large"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "False True True large\nFalse\n", "")


REFUSED = """
import sys
from ltxpack.cli import main
sys.argv = ["ltxpack", "run", "no-overlay", "--prompt", "A boat"]
try:
    main()
except SystemExit as stop:
    answer = [stop.code, "torch" in sys.modules, "diffusers" in sys.modules, "transformers" in sys.modules]
"""


def test_a_run_that_is_refused_has_not_waited_for_the_libraries() -> None:
    assert in_fresh_process(REFUSED)[0] == [1, True, False, False]


def of_libraries() -> list[str]:
    """The import statements of the runtime that take something from diffusers or transformers."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (REPOSITORY / "ltxpack/runtime").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    found = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return sorted({text for text in found if text.split()[1].split(".")[0] in ("diffusers", "transformers")})


def test_no_phase_of_a_video_imports_what_could_be_imported_before() -> None:
    imports = of_libraries()
    assert "from diffusers import AutoencoderKLLTX2Video" in imports
    code = """
import sys
from ltxpack.imports import import_libraries
import ltxpack.runtime.run
import_libraries()
known = set(sys.modules)
for statement in {imports}:
    exec(statement)
answer = sorted(set(sys.modules) - known)
"""
    late, _ = in_fresh_process(code.format(imports=imports))
    assert not late
