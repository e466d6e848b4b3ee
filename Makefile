# `make demo` and `make test` work on a fresh machine: they set it up first (tools/setup.sh).

PYTHON_BIN := .venv/bin/python
READY := .venv/.ready

.PHONY: help setup demo napari test lint format bench clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

setup: $(READY) ## virtual environment .venv and system libraries

$(READY): pyproject.toml constraints.txt tools/setup.sh
	tools/setup.sh
	@touch $@

demo: $(READY) ## denoise example stacks; images and tables go to demo-output/
	$(PYTHON_BIN) examples/demo.py --out demo-output

napari: $(READY) ## open the demo's result in napari
	$(PYTHON_BIN) examples/demo.py --out demo-output --show

test: lint ## every check and every test
	tools/with-display $(PYTHON_BIN) -m pytest

lint: $(READY) ## style, types and the napari manifest
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/npe2 validate --imports napari-learned-diffusion

format: $(READY) ## repair the style where that is automatic
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

bench: $(READY) ## speed against peers; with LEARNED_DIFFUSION_DATA=FOLDER quality, too
	$(PYTHON_BIN) -m pip install --quiet --constraint constraints.txt --group bench
	$(PYTHON_BIN) -m benchmarks.speed
ifdef LEARNED_DIFFUSION_DATA
	$(PYTHON_BIN) -m benchmarks.quality --crops 100
	$(PYTHON_BIN) -m benchmarks.real_noise
endif

clean: ## remove what make made: .venv, caches, demo-output
	rm -rf .venv demo-output build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
