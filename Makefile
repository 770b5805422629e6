PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint docs bench bench-check clean

demo: $(READY)
	$(BIN)/python examples/lightning_image_finetune.py

test: $(READY)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo build/site/index.html

# Two of the peers are optional; without them the others are measured.
bench: $(READY)
	-$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt fastsafetensors runai-model-streamer
	$(BIN)/python benchmarks/loading.py --write

bench-check: $(READY)
	$(BIN)/python benchmarks/loading.py --quick --check

clean:
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist runs lightning_logs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "warmstart needs Python 3.11 or newer; $(PYTHON) is not. Name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[dev]" -c constraints.txt
	@# After torch, which its build imports; where it cannot be built its tests are skipped, with this line as the reason.
	-DS_BUILD_OPS=0 $(BIN)/python -m pip install --disable-pip-version-check -q --no-build-isolation deepspeed -c constraints.txt
	@touch $@
