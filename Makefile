# make demo: data, training, pictures, in one go. make test: the whole suite. Both make their own .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export PATH := $(BIN):$(PATH)
# Two test processes on two cores: threads of their own would only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The interpreter of the GPU targets: PY where it is set (nothing is installed then), else that of .venv.
GPU_PYTHON := $(or $(PY),$(BIN)/python)
GPU_ENV := $(if $(PY),,env)

.PHONY: env demo test test-full test-gpu bench-gpu lint bench clean

env: $(VENV)/.installed

# torch comes first and alone: DeepSpeed's set-up imports it, hence no build isolation for the rest.
$(VENV)/.installed: pyproject.toml constraints.txt tools/check_machine.sh
	@PYTHON="$(PYTHON)" sh tools/check_machine.sh
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy setuptools wheel
	$(PIP) --no-build-isolation -e '.[test]'
	@touch $@

demo: env
	$(BIN)/python tools/demo.py

test: env lint
	$(PYTEST)

test-full: env lint
	$(PYTEST) --full

# On a machine with a GPU and a CUDA build of PyTorch of its own, after `pip install --no-deps --no-build-isolation -e .`:
# make test-gpu PY=python. That needs torch, triton and pytest, and no network; --confcutdir leaves out what needs more.
test-gpu: $(GPU_ENV)
	$(GPU_PYTHON) -m pytest --confcutdir=tests/kernels -m gpu tests/kernels/test_on_gpu.py

bench-gpu: $(GPU_ENV)
	$(GPU_PYTHON) benchmarks/bench_head.py --json benchmarks/head.json
	$(GPU_PYTHON) benchmarks/bench_block.py --json benchmarks/block.json
	$(GPU_PYTHON) benchmarks/bench_step.py --json benchmarks/step.json

bench: env
	$(BIN)/python benchmarks/bench_dataset.py
	$(BIN)/python benchmarks/bench_preprocess.py
	$(BIN)/python benchmarks/bench_training.py
	$(BIN)/python benchmarks/bench_recompute.py vocab.text_tokens=1024
	$(BIN)/python benchmarks/bench_checkpoint.py
	$(BIN)/python benchmarks/bench_memory.py

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
