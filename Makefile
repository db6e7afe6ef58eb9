# `make demo` trains a small GPT-2; `make test` runs the suite. Both make .venv first.

PYTHON ?= python3
BIN := .venv/bin
COMMA := ,
GPUS := $(if $(CUDA_VISIBLE_DEVICES),$(words $(subst $(COMMA), ,$(CUDA_VISIBLE_DEVICES))),\
	$(shell nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU'))
RANKS := $(if $(filter-out 0,$(GPUS)),$(GPUS),2)
# CPU=1 installs PyTorch's CPU build (0.2 GB) instead of the one for CUDA (several GB).
CPU ?= $(if $(filter-out 0,$(GPUS)),0,1)
CPU_BUILD := 'torch==2.13.0' --no-deps --extra-index-url https://download.pytorch.org/whl/cpu --retries 1

.PHONY: help install demo test soak browser bench lint format clean

help:
	@echo "make demo     train a small model on this Python's standard library (2 to 4 minutes on 2 cores)"
	@echo "make install  make .venv and install the package into it"
	@echo "make test     run the test suite"
	@echo "make soak     run the tests of many trials, and every fault"
	@echo "make browser  look at TensorBoard and Optuna's dashboard in Chromium"
	@echo "make bench    time the training step beside those of other trainers"
	@echo "make lint     check format, style and types"
	@echo "make format   format the code"
	@echo "make clean    remove .venv and caches; checkpoints, runs, logs and data stay"
	@echo "CPU=1 or CPU=0 behind a command installs PyTorch's CPU build or the one for CUDA;"
	@echo "by default it depends on whether nvidia-smi lists a GPU"

install: .venv/installed
.venv/installed: pyproject.toml
	@echo "Installing into .venv: a few minutes the first time"
	$(PYTHON) -m venv .venv
	@if [ "$(CPU)" = 1 ]; then \
		echo "No GPU: PyTorch's CPU build. With an NVIDIA GPU: make clean install CPU=0"; \
		$(BIN)/pip install --quiet $(CPU_BUILD); fi
	$(BIN)/pip install --quiet --editable '.[search]'
	touch $@

.venv/tested: pyproject.toml .venv/installed
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

# An earlier demo is kept: a new run starts in an empty folder.
demo: .venv/installed
	@if ls checkpoints/demo-fast/step_*.json >/dev/null 2>&1; then \
		kept=checkpoints/demo-fast_$$(date +%Y%m%d_%H%M%S) && mv checkpoints/demo-fast $$kept && \
		echo "The previous demo's checkpoints are now in $$kept"; fi
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=$(RANKS) \
		src/train_improved.py --preset demo-fast --use_tensorboard

# Two processes for each of a few cores, as many tests wait for processes that they start. worksteal:
# one that has no tests left takes half of another's, so all cores end together. The variable:
# modules are compiled once, not by each of hundreds of processes.
test: .venv/tested
	cores=$$(nproc) && PYTHONDONTWRITEBYTECODE= $(BIN)/pytest --dist worksteal \
		--numprocesses $$((cores > 4 ? cores : 2 * cores))

soak: .venv/tested
	$(BIN)/pytest -m "soak or faults"

# The picture of the README is the one that the test looks at.
browser: .venv/tested
	$(BIN)/pip install --quiet --editable '.[browser]'
	SCREENSHOT=docs/tensorboard.png $(BIN)/pytest -m browser tests/browser

bench: .venv/installed
	$(BIN)/pip install --quiet --editable '.[bench]'
	$(BIN)/python bench/train.py

lint: .venv/tested
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/tested
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .pytest_cache .hypothesis .mypy_cache .ruff_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
