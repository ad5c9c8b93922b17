# make install: a .venv with the pinned packages; make demo: a video in two minutes; make test: everything CI checks;
# make docs: what of the docs is the planner's, written anew.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo docs test lint types unit clean

install: $(STAMP)

# torch goes first and alone: a plain `torch` requirement can pull gigabytes of CUDA packages that are not needed here.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: install
	$(BIN)/ltxpack demo

docs: install
	$(BIN)/ltxpack plan --page docs/plan.html
	$(BIN)/python benchmarks/plan_table.py

# mypy takes one core for a while, so the tests run beside it.
test: install
	$(MAKE) --jobs=2 lint types unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

unit: install
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis ltxpack-demo
