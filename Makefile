# make bench | test: two commands on a fresh machine with Python, a C++ compiler and make.
# VENV= (empty) uses the interpreter at hand and installs nothing from a network.
VENV ?= .venv
ifeq ($(VENV),)
PYTHON ?= python3
else
BIN := $(abspath $(VENV))/bin/
PYTHON := $(BIN)python
SETUP := $(VENV)/.installed
endif

# Spinning OpenMP threads stall on a machine whose cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
BUILT := build/.built$(subst /,_,$(VENV))
CUDA_ARCHS := 80 90 100
TORCH_INCLUDE = $(shell $(PYTHON) -c "import os, torch; print(os.path.join(os.path.dirname(torch.__file__), 'include'))")
PYTEST = $(PYTHON) -m pytest --durations 12 $(if $(VENV),--numprocesses $(or $(PYTEST_PROCESSES),2) --dist worksteal)

.PHONY: bench test build lint format docs cuda-check gpu-check wheel clean \
        test-triton test-default test-avx2 test-pure test-sanitized test-wheel

bench: build
	$(PYTHON) -m fastmix bench --report build/report

test: build test-triton
	$(PYTEST) tests --ignore tests/triton

build: $(BUILT)

$(BUILT): $(SETUP) $(SOURCES)
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@mkdir -p build && touch $@

ifneq ($(VENV),)
$(SETUP): constraints.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --no-compile --requirement constraints.txt
	@touch $@
endif

lint: $(SETUP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	git ls-files 'csrc/*' 'tests/*.cpp' 'tests/*.h' | xargs $(BIN)clang-format --dry-run --Werror

format: $(SETUP)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	git ls-files 'csrc/*' 'tests/*.cpp' 'tests/*.h' | xargs $(BIN)clang-format -i

# Also checks that links lead somewhere.
docs: build
	$(PYTHON) -m sphinx -q -W --keep-going -b html docs build/docs

# Triton's interpreter is chosen when a kernel is decorated, so these tests have a process of their own.
test-triton: build
	TRITON_INTERPRET=1 $(PYTEST) tests/triton

# Left out where tests are repeated: what reads sources, and what would learn nothing new about the kernels.
GPU_SOURCE := cuda_emulated beam_search_emulated triton_compile
PROGRAMS := readme docs $(patsubst tests/test_%.py,%,$(wildcard tests/test_benchmarks*.py tests/test_examples*.py))
METHODS := $(patsubst tests/test_%.py,%,$(wildcard tests/test_nn_*.py tests/test_generation_*.py \
  tests/test_per_sample_*.py tests/test_losses_*.py tests/test_init*.py))
ANY_LEVEL := $(GPU_SOURCE) $(PROGRAMS) $(METHODS) budgets cli contract scaled_attention_reference \
  trie_builder trie_cli trie_file

# At the other instruction levels the ops themselves: what stands on them, models, integrations and compiled programs,
# knows no level.
test-default test-avx2: test-%: build
	ATEN_CPU_CAPABILITY=$* $(PYTEST) tests -k "not compile" --ignore tests/triton --ignore tests/integration \
	  $(ANY_LEVEL:%=--ignore tests/test_%.py)

# What starts processes or trains: without kernels the reference answers it, as it answers float64 in every run.
LONG := per_sample_distributed per_sample_gan losses_multi_task

# From the tests' folder, so that the package built into build/ is imported and not the clone.
test-pure: $(SETUP)
	FASTMIX_NO_EXT=1 $(PYTHON) setup.py -q build --build-base build/pure --build-lib build/pure/lib
	cd tests && FASTMIX_NO_EXT=1 PYTHONPATH=$(CURDIR)/build/pure/lib \
	  $(PYTEST) --ignore triton --ignore integration/opacus \
	  $(patsubst %,--ignore test_%.py,$(GPU_SOURCE) $(PROGRAMS) $(LONG)) .

# The CPU kernels under the address and the undefined-behaviour sanitizer: what they check depends on no optimisation,
# and -Og compiles sooner than -O1.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -Og -g1
SANITIZED_LEVELS := default avx2
test-sanitized: $(SETUP)
	CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" FASTMIX_CUDA=0 \
	  FASTMIX_CPU_LEVELS="$(SANITIZED_LEVELS)" \
	  $(PYTHON) setup.py -q build --build-base build/sanitized --build-lib build/sanitized/lib
	cd tests && files=$$(grep -rl --include "test_*.py" "mark\.kernel" .) && for level in $(SANITIZED_LEVELS); do \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 ATEN_CPU_CAPABILITY=$$level \
	  PYTHONPATH=$(CURDIR)/build/sanitized/lib $(PYTEST) -m kernel -k "not compile" $$files || exit 1; \
	done

# Every CUDA file compiles where there is no GPU; optimising the code, which nobody runs, would take twice as long.
cuda-check: $(SETUP)
	@if ! command -v nvcc > /dev/null; then \
	  echo "NOTICE: no nvcc here, the CUDA files were NOT compiled"; exit 0; fi; \
	echo "nvcc for$(foreach arch,$(CUDA_ARCHS), sm_$(arch)): $(wildcard csrc/cuda/*.cu)"; \
	printf '%s\n' $(wildcard csrc/cuda/*.cu) | xargs -P 2 -I {} \
	  nvcc -c -std=c++17 -Xcicc -O1 -Xptxas -O1 --threads 0 -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000 \
	    $(foreach arch,$(CUDA_ARCHS),-gencode arch=compute_$(arch),code=sm_$(arch)) \
	    -Icsrc -I$(TORCH_INCLUDE) -I$(TORCH_INCLUDE)/torch/csrc/api/include {} -o /dev/null

# On a machine with a GPU: build with CUDA, run the GPU tests and benchmarks, leave records and logs in OUT.
# OPS="fft_mixing …" limits it to some ops.
OUT ?= build/gpu
OPS ?=
gpu-check:
	OPS="$(OPS)" OUT="$(OUT)" PYTHON="$(PYTHON)" MAKE="$(MAKE) VENV=$(VENV)" bash .ci/gpu-check

wheel: $(SETUP)
	$(PYTHON) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

# The wheel, installed in a clean environment beside the same PyTorch, imports and answers.
test-wheel: wheel
	rm -rf build/clean && python3 -m venv build/clean
	build/clean/bin/pip install --quiet --no-compile --constraint constraints.txt dist/fastmix-*.whl
	cd build && clean/bin/python -c "import torch, fastmix; x = torch.randn(2, 8, 8); \
	  torch.testing.assert_close(fastmix.fourier_mixing(x), torch.fft.fft2(x).real)" \
	  && clean/bin/fastmix doctor && clean/bin/fastmix parity

clean:
	rm -rf build dist *.egg-info fastmix/*.so .pytest_cache .ruff_cache
