# Every target first brings .venv up to date; nothing else has to be installed by hand.
SHELL  := /bin/bash
PYTHON ?= python3
SEEDS  ?= 1
BIN    := .venv/bin
READY  := .venv/.installed
# For tools that call each other by name.
WITH_VENV := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: help demo test test-all lab export bench
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

demo: $(READY)  ## train, unlearn and judge on the small embedded world, into demo/ (SEEDS=3 for three seeds)
	$(BIN)/safeeraser demo --out demo --seeds $(SEEDS)

test: $(READY)  ## exports in step, every notebook, pytest
	$(WITH_VENV) bash scripts/test.sh

test-all: $(READY)  ## what CI runs: the same with the slow tests
	$(WITH_VENV) bash scripts/test.sh --all

bench: $(READY)  ## measure training and generation against the published loop (about an hour)
	rm -f benchmarks/results/cpu.json
	$(BIN)/python benchmarks/cpu.py

lab: $(READY)  ## open the notebooks in JupyterLab
	$(WITH_VENV) jupyter lab nbs

export: $(READY)  ## after changing a notebook: the package, clean notebooks, README
	$(WITH_VENV) nbdev_export
	$(WITH_VENV) nbdev_clean
	$(WITH_VENV) python scripts/build_readme.py

# torch first, alone: it is by far the largest download, and the build that the configured index offers
# (CPU, CUDA) is settled before anything else asks for it. Its version is written once, in constraints.txt.
$(READY): settings.ini setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
