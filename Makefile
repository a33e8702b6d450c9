# jetson_det: two commands do all the set-up.
#   make demo   makes .venv, installs, runs the whole flow on generated scenes
#   make test   the same, and runs every test that needs no GPU
# Both are quick when run again. `make help` lists the rest.

SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT ?= runs/demo
# processes of pytest; each file's tests stay in one. Three keep two cores busy: many tests wait for other processes.
WORKERS ?= 3
# how many times `make fuzz` draws
SEEDS ?= 5
# Several processes on few cores: OpenMP's threads should soon sleep when they wait (see nbs/89_cli.ipynb).
export GOMP_SPINCOUNT ?= 3000
# Modules are compiled once, not in each process.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-quick layout types lint-web lint-docker bench soak gpu-check docs readme sync notebooks-test pytest fuzz test-runtime36 test-wheel lab notebooks env env-dev env-bench env-pycuda clean

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: env ## the whole flow on generated scenes: train, evaluate, export, measure, report
	@echo "== demo: train, evaluate, export and measure a detector on generated scenes (about 8 minutes on 2 cores)"
	$(BIN)/jetson-det demo --out $(OUT)

test: env-dev ## everything a CPU can test
	@echo "== 1/3 notebooks and package in sync"
	@$(MAKE) --no-print-directory sync
	@echo "== 2/3 side by side: layout, types, web files, containers and scripts, the runtime under Python 3.6, the built wheel under each Python found, the notebooks' own examples"
	@$(MAKE) --no-print-directory -j7 --output-sync=target layout types lint-web lint-docker test-runtime36 test-wheel notebooks-test
	@echo "== 3/3 pytest; it builds the site too"
	@$(MAKE) --no-print-directory pytest

test-quick: env-dev ## what daily work needs, in under 5 minutes: sync, layout, and the tests without trainings and browsers
	@$(MAKE) --no-print-directory sync layout
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -n $(WORKERS) --dist loadfile -m "not browser" \
	  --ignore tests/train --ignore tests/models --ignore tests/site --ignore tests/export

layout: env-dev
	@$(BIN)/python tools/check_layout.py

types: env-dev ## mypy and ruff
	@$(BIN)/ruff check -q jetson_det tools bench tests
	@$(BIN)/mypy --no-error-summary

lint-docker: env-dev
	@bash tools/lint_docker.sh $(BIN)

lint-web:
	@bash tools/lint_web.sh

sync: env-dev
	@bash tools/check_sync.sh $(BIN)
	@$(BIN)/python tools/build_site.py --check

notebooks-test: env-dev
	@cd nbs && OMP_NUM_THREADS=1 JETSON_DET_CACHE=$$(mktemp -d) ../$(BIN)/nbdev_test --n_workers 2 --do_print

# One thread for each process: the processes share the cores already.
pytest: env-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -rs --durations=10 -n $(WORKERS) --dist loadfile --max-worker-restart 0

fuzz: env-dev ## the tests that Hypothesis draws examples for, with other examples each time; SEEDS=100: a hundred times
	@for seed in $$(shuf -i 1-1000000000 -n $(SEEDS)); do echo "== --hypothesis-seed=$$seed"; \
	  HYPOTHESIS_PROFILE=random OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -m hypothesis -n $(WORKERS) \
	  --hypothesis-seed=$$seed || exit 1; done

test-runtime36: env-dev
	@bash tools/test_runtime36.sh

test-wheel: env-dev
	@bash tools/test_wheel.sh $(BIN)

bench: env-bench ## speed against the peers, as ratios, interleaved in one run
	@failed=0; for f in bench/bench_*.py; do echo "== $$f"; $(BIN)/python $$f || failed=1; done; exit $$failed

soak: env-dev ## 20,000 frames and 20 cuts of a stream: nothing lost, memory flat; films from $JETSON_DET_DATA
	PYTHONPATH=. $(BIN)/python bench/soak.py $(ARGS)

gpu-check: env-dev ## what only a GPU can show, in under ten minutes; ARGS=--cpu: a dry run on the CPU
	$(BIN)/python tools/gpu_check.py $(ARGS)

docs: env-dev ## the site, into site/
	@$(BIN)/python tools/build_site.py --out site

readme: env-dev ## README.md and the sidebar from the notebooks
	@$(BIN)/python tools/build_site.py --readme
	@$(BIN)/python tools/build_site.py --sidebar

lab: env-dev ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir nbs

notebooks: env-dev ## run every notebook again and store its outputs
	$(BIN)/python tools/run_notebooks.py nbs

env: $(VENV)/.train
env-dev: $(VENV)/.dev
env-bench: $(VENV)/.bench

$(VENV)/.made:
	@bash tools/make_venv.sh $(VENV)
	@touch $@

$(VENV)/.train: $(VENV)/.made settings.ini setup.py constraints.txt
	@echo "== installing jetson_det with what training needs into $(VENV) (once; minutes on a slow line)"
	@$(PIP) install --progress-bar off -q -c constraints.txt -e ".[train]"
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	@echo "== installing the tools for tests, notebooks and docs (once)"
	@$(PIP) install --progress-bar off -q -c constraints.txt -e ".[dev,lint-check]"
	@echo "== installing the yolox package, the oracle of the tests (it builds for about 20 s)"
	@$(PIP) install --progress-bar off -q --no-deps torchvision==0.28.0 thop
	@$(PIP) install --progress-bar off -q ninja
	@$(PIP) install --progress-bar off -q --no-deps --no-build-isolation yolox==0.3.0
	@echo "== installing Ultralytics (AGPL-3.0), for the tests of its family"
	@# What it needs first, then itself without dependencies (they would bring a second OpenCV): so pip reports no conflict.
	@$(PIP) install --progress-bar off -q -c constraints.txt polars requests tqdm
	@$(PIP) install --progress-bar off -q --no-deps ultralytics==8.4.190 ultralytics-thop
	@touch $@

# One more peer of the benchmarks, without its dependencies.
$(VENV)/.bench: $(VENV)/.dev
	@$(PIP) install --progress-bar off -q --no-deps tidecv==1.0.1 appdirs
	@echo "== installing the peers of the benchmarks (once)"
	@$(PIP) install --progress-bar off -q --no-deps libreyolo==1.6.0
	@touch $@

# The wheel stays in the user's cache folder.
env-pycuda: env-dev ## compile PyCUDA for the tests of device memory (minutes, once)
	$(BIN)/python tests/fake_cuda.py $$(ls -d .venv-py36/bin/python 2>/dev/null) $(BIN)/python

clean: ## remove what was built (not .venv, not runs/)
	rm -rf build dist site _proc _docs *.egg-info .pytest_cache .hypothesis
