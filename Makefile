# `make help` lists the targets. Variables that may be set on the command line:
#   WORKERS the number of processes that tests run in, of one thread each (2)
#   PYTHON  the interpreter the virtual environment is made with (python3, 3.10 or newer)
#   VENV    where the virtual environment lies (.venv); an existing one with torch in it is used as it is
#   OLDEST_TORCH, NEWEST_TORCH  what test-oldest and test-newest install
#   TORCH   what pip installs where torch cannot be imported, with any pip option behind it
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OLDEST_TORCH ?= torch==2.10.0
NEWEST_TORCH ?= torch
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(filter-out csrc/emulation/%,$(wildcard csrc/*.h csrc/*/*.[ch]* csrc/core/*/*.[ch]*))
CUDA_LIBRARY := dynaprune_kernels/_C_cuda.abi3.so
NVCC := $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
# A step's output goes to a log, and to the terminal where the step fails.
QUIETLY = > $(VENV)/setup.log 2>&1 || { cat $(VENV)/setup.log >&2; exit 1; }
# The packages of an extra, for pip: installing `.[extra]` again would compile the extensions again.
extra = $$($(BIN)/python -c 'import importlib.metadata as m; \
	print(*(r.split(";")[0] for r in m.requires("dynaprune") if r.endswith("extra == \"$(1)\"")))')

# A file's tests stay in one process, so that what they share is set up once.
SPREAD = -n $(WORKERS) --dist loadfile
SIDE_BY_SIDE = OMP_NUM_THREADS=1

.PHONY: help demo test test-gpu-offline test-oldest test-newest sanitize fuzz fuzz-files fuzz-kernels gpu gpu-parity gpu-speed gpu-sanitizers watchdog check bench families ext clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ {printf "%-17s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## train the digits network dense and pruned; writes runs/demo anew
	@rm -rf runs/demo
	$(BIN)/dynaprune compare digits --out runs/demo

test: $(VENV)/.installed  ## the tests that need no GPU (PYTEST_ARGS adds options)
	$(SIDE_BY_SIDE) $(BIN)/python -m pytest -q $(SPREAD) -m "not gpu and not gpu_offline and not sanitized" --durations=10 $(PYTEST_ARGS)

test-gpu-offline: $(VENV)/.installed $(if $(NVCC),$(CUDA_LIBRARY))  ## GPU kernels without a GPU: compiled, and run on host threads
	$(BIN)/python -m pytest -q -m "gpu_offline and not sanitized" --durations=10 $(PYTEST_ARGS)

sanitize: $(VENV)/.installed  ## the CUDA kernels on host threads under address, undefined-behaviour and thread sanitizers
	$(BIN)/python -m pytest -q -m sanitized --durations=10 $(PYTEST_ARGS)

fuzz: fuzz-files fuzz-kernels  ## all that is fuzzed, minutes

fuzz-files: $(VENV)/.installed  ## 10,000 mutated checkpoint files: refused, or loaded as they were saved
	$(BIN)/python -m tests.fuzz.files

fuzz-kernels: $(VENV)/.installed  ## 100,000 corrupted indices and as many malformed calls of the CPU ops, under AddressSanitizer
	$(BIN)/python -m tests.fuzz.kernels

# Both use the extensions of $(VENV), which work with any torch from 2.10 on; Triton's kernels are compiled by the one
# version of Triton that their tables are for.
UNTIED = -q $(SPREAD) -p no:cacheprovider -m "not gpu and not gpu_offline and not sanitized and not interpret" \
	--ignore=tests/triton --ignore=tests/packaging
WITH_THIS_TREE = $(SIDE_BY_SIDE) PYTHONPATH=python:.

test-oldest: $(VENV)/.installed .venv-oldest/.installed  ## the tests with the oldest packages allowed (5 GB; PYTEST_ARGS names some)
	$(WITH_THIS_TREE) .venv-oldest/bin/python -m pytest $(UNTIED) $(PYTEST_ARGS)

test-newest: $(VENV)/.installed .venv-newest/.installed  ## the same with the newest packages
	$(WITH_THIS_TREE) .venv-newest/bin/python -m pytest $(UNTIED) $(PYTEST_ARGS)

.venv-oldest/.installed: requirements/oldest.txt
	@echo "dynaprune: installing $(OLDEST_TORCH) and the oldest packages in .venv-oldest"
	@$(PYTHON) -m venv --clear .venv-oldest
	@.venv-oldest/bin/python -m pip install "$(OLDEST_TORCH)" -r requirements/oldest.txt $(QUIETLY)
	@touch $@

.venv-newest/.installed: requirements/oldest.txt
	@echo "dynaprune: installing $(NEWEST_TORCH) and the newest packages in .venv-newest"
	@$(PYTHON) -m venv --clear .venv-newest
	@.venv-newest/bin/python -m pip install "$(NEWEST_TORCH)" $$(sed -n 's/==.*//p' requirements/oldest.txt) $(QUIETLY)
	@touch $@

GPU_PYTHON = PYTHONPATH=python:. PYTHONUNBUFFERED=1 $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu: gpu-parity gpu-speed gpu-sanitizers  ## on an NVIDIA GPU, whose torch has CUDA: the next three (docs/gpu.md)

gpu-parity:  ## every kernel against float64, 6 minutes
	$(GPU_PYTHON) -m tests.gpu parity

gpu-speed:  ## kernel benchmarks beside their peers, 9 minutes
	$(GPU_PYTHON) -m tests.gpu speed

gpu-sanitizers:  ## memory errors and races by compute-sanitizer, 8 minutes
	$(GPU_PYTHON) -m tests.gpu sanitizers

watchdog: $(VENV)/.installed  ## a build of Hopper's kernels that ends one that hangs, for gpu-parity (needs nvcc)
	FORCE_CUDA=1 DYNAPRUNE_WATCHDOG=1 TORCH_CUDA_ARCH_LIST=9.0a $(BIN)/python setup.py --quiet build_ext \
		--build-lib build/watchdog --build-temp build/watchdog/objects

check: $(VENV)/.checkers  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed  ## time the CPU kernels beside the best dense library
	$(BIN)/python -m benchmarks.cpu_linear
	$(BIN)/python -m benchmarks.cpu_conv2d

# torchvision wants a torch of its own, so the sweep has an environment of its own: about 6 GB.
families:  ## train tiny networks of over 50 architectures sparse, beside dense references; writes benchmarks/results/families.csv
	$(MAKE) VENV=.venv-families TORCH="torch==2.14.1 torchvision==0.29.1" .venv-families/.families
	.venv-families/bin/python -m benchmarks.families

$(VENV)/.families: $(VENV)/.installed
	@echo "dynaprune: installing the networks' libraries"
	@$(BIN)/python -m pip install $(call extra,families) $(QUIETLY)
	@touch $@

ext: $(VENV)/.torch  ## compile the extensions in place, after a change in csrc/
	$(BIN)/python setup.py --quiet build_ext --inplace

clean:  ## remove what was built, but not the virtual environment
	rm -rf build dist *.egg-info python/*.egg-info dynaprune_kernels/_C*.so dynaprune_kernels/_build.json
	rm -f $(VENV)/.installed

$(VENV)/bin/python:
	@echo "dynaprune: making a virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "dynaprune needs Python 3.10 or newer; name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -f $(VENV)/bin/python; echo "$(PYTHON) cannot make a virtual environment: install its venv module" \
		"(Debian, Ubuntu: apt install python3-venv) or name another interpreter with PYTHON=..." >&2; exit 1; }

$(VENV)/.torch: | $(VENV)/bin/python
	@$(BIN)/python -c 'import torch' 2>/dev/null || echo "dynaprune: installing $(TORCH), the longest download"
	@$(BIN)/python -m pip install --upgrade "setuptools>=78.1.1" wheel packaging ninja $(QUIETLY)
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install $(TORCH) $(QUIETLY)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	@echo "dynaprune: compiling the kernels and installing the packages they are used with"
	@$(BIN)/python -m pip install --no-build-isolation -e '.[test]' $(QUIETLY)
	@$(BIN)/python -m dynaprune_kernels.info
	@touch $@

$(VENV)/.checkers: $(VENV)/.installed
	@echo "dynaprune: installing the checkers"
	@$(BIN)/python -m pip install $(call extra,dev) $(QUIETLY)
	@touch $@

# For tests of GPU kernels without a GPU: the CUDA part even where torch has no CUDA.
$(CUDA_LIBRARY): $(SOURCES) | $(VENV)/.installed
	@echo "dynaprune: compiling the CUDA kernels"
	@FORCE_CUDA=1 $(BIN)/python setup.py --quiet build_ext --inplace $(QUIETLY)
	@touch $@
