# make demo: data, training, pictures, in one go. make test: the whole suite. Both first make or complete .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)
# Two test processes on two cores: threads of their own would only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The interpreter of the GPU targets: PY where it is set (nothing is installed then), else that of .venv.
GPU_PYTHON := $(or $(PY),$(BIN)/python)
GPU_ENV := $(if $(PY),,env-test)

.PHONY: env env-test demo test test-full test-slurm gpu-path test-gpu sanitize-gpu bench-gpu lint bench soak clean
.PHONY: image image-gpu test-images

# env: what the demo needs. env-test: with it what the tests, the linter and the benchmarks need.
env: $(VENV)/.installed
env-test: $(VENV)/.installed-test

INSTALL = PYTHON="$(PYTHON)" sh tools/check_machine.sh && $(PYTHON) tools/install.py $(VENV)
INPUTS := pyproject.toml constraints.txt tools/check_machine.sh tools/install.py

$(VENV)/.installed: $(INPUTS)
	@$(INSTALL) demo

$(VENV)/.installed-test: $(INPUTS)
	@$(INSTALL) test

demo: env
	$(BIN)/python tools/demo.py

test: env-test lint
	$(PYTEST)

test-full: env-test lint
	$(PYTEST) --full

# On a private SLURM cluster: apt-get install slurm-wlm munge; skipped where it cannot be, failed where CI is set.
test-slurm: env-test
	@if command -v shellcheck > /dev/null; then shellcheck tools/slurm/*.sbatch; fi
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --slurm -n 3 --dist loadfile --durations=10 tests/slurm

# On a machine with a GPU and a CUDA build of PyTorch of its own, without installing anything and without a network:
# make test-gpu PY=python. The kernels need torch, triton and pytest; the model also numpy, omegaconf, safetensors, tqdm,
# tensorboard, tokenizers, sentencepiece and Pillow, else its tests are skipped. --confcutdir leaves out the fixtures that
# need more.
GPU_PATH := $(CURDIR)/build/gpu
GPU_PYTEST = PYTHONPATH=$(GPU_PATH) $(GPU_PYTHON) -m pytest --confcutdir=tests/kernels -p no:cacheprovider -m gpu -rs
GPU_TESTS := tests/kernels/test_on_gpu.py tests/test_model_on_gpu.py
# Minutes of each benchmark, 18 together; fewer at a time: make bench-gpu BENCH="head block" JSON=FILE
BENCH ?= head block step sampling off_range
MINUTES_head := 4
MINUTES_block := 2
MINUTES_step := 6
MINUTES_sampling := 3
MINUTES_off_range := 3
JSON ?=

# The package as an installation would lay it out: kernels/ is imported as megat2i.kernels.
gpu-path: $(GPU_ENV)
	@rm -rf $(GPU_PATH) && mkdir -p $(GPU_PATH)/megat2i
	@ln -s $(CURDIR)/megat2i/* $(GPU_PATH)/megat2i/ && ln -s $(CURDIR)/kernels $(GPU_PATH)/megat2i/kernels

test-gpu: gpu-path
	$(GPU_PYTEST) $(GPU_TESTS)

# The small cases under a memory checker and a race checker.
sanitize-gpu: gpu-path
	@command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is not on the PATH: nothing was checked"; exit 1; }
	PYTHONPATH=$(GPU_PATH) PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(GPU_PYTHON) -m pytest --confcutdir=tests/kernels -p no:cacheprovider -q -k small tests/kernels/test_on_gpu.py
	PYTHONPATH=$(GPU_PATH) compute-sanitizer --tool racecheck --error-exitcode 1 \
		$(GPU_PYTHON) -m pytest --confcutdir=tests/kernels -p no:cacheprovider -q -k small tests/kernels/test_on_gpu.py

# A benchmark that fails leaves its rows and does not stop the others; the tables come last.
bench-gpu: gpu-path
	@status=0; file="$(JSON)"; \
	$(foreach name,$(BENCH),PYTHONPATH=$(GPU_PATH) $(GPU_PYTHON) benchmarks/bench_$(name).py --minutes $(MINUTES_$(name)) \
		$${file:+--json $$file} || status=1;) \
	$(GPU_PYTHON) benchmarks/table.py $$file; exit $$status

bench: env-test
	@PYTHON="$(PYTHON)" sh tools/check_machine.sh compiler
	$(BIN)/python benchmarks/bench_dataset.py
	$(BIN)/python benchmarks/bench_verification.py
	$(BIN)/python benchmarks/bench_preprocess.py
	$(BIN)/python benchmarks/bench_training.py
	$(BIN)/python benchmarks/bench_recompute.py vocab.text_tokens=1024
	$(BIN)/python benchmarks/bench_checkpoint.py
	$(BIN)/python benchmarks/bench_memory.py
	$(BIN)/python benchmarks/bench_scale.py

# Hurts trainings for MINUTES, recovers them and prints a table: docs/faults.md. A failure names what repeats it.
MINUTES ?= 10
SEED ?= 1
FIRST ?= 0
COUNT ?=
TABLE ?=
soak: env-test
	PYTHONPATH=tests $(BIN)/python -m soak --minutes $(MINUTES) --seed $(SEED) \
		$(if $(COUNT),--first $(FIRST) --count $(COUNT)) $(if $(TABLE),--table $(TABLE))

lint: env-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Images, by docker, podman or buildah: docs/in-a-container.md. IMAGE_OPTIONS go to the builder.
IMAGE_OPTIONS ?=
image:
	@sh docker/build.sh cpu $(IMAGE_OPTIONS)

image-gpu:
	@sh docker/build.sh gpu $(IMAGE_OPTIONS)

# As root, with buildah, podman, mmdebstrap and shellcheck. FULL=--full also builds the GPU image.
FULL ?=
test-images: env-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/images -rsP --durations=10 $(FULL)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
