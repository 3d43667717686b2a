# Every target does its own set-up: the virtual environment, the dependencies and the compiled kernels.
VENV ?= .venv
JAX ?= 0.12.0.1
BIN := $(VENV)/bin
WORKERS ?= 2
BUILD := build/$(notdir $(VENV))
FFI := $(shell find ffi -type f)
# The interpreter: on the PATH, or known only to a version manager (newest first, 3.12 or newer).
FIND_PYTHON = for p in "$$PYTHON" python3.12 python3.13 python3.14 python3 \
	$$(ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.*/bin/python3 "$$HOME"/.asdf/installs/python/3.*/bin/python3 \
	"$$HOME"/.local/share/mise/installs/python/3.*/bin/python3 "$$HOME"/.local/share/uv/python/*/bin/python3 \
	/opt/python*/bin/python3 "$$HOME"/miniconda3/bin/python3 "$$HOME"/miniforge3/bin/python3 2>/dev/null | sort -V); do \
	[ -n "$$p" ] && "$$p" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo "$$p" && break; done

.PHONY: setup demo bench test test-oldest-jax check format clean

setup: $(VENV)/.installed

$(VENV)/.dependencies: pyproject.toml .ci/constraints.txt
	@command -v $${CXX:-c++} >/dev/null || { echo "make: no C++ compiler found: install g++ or clang++, or set CXX" >&2; exit 1; }
	@python=$$($(FIND_PYTHON)); \
	[ -n "$$python" ] || { echo "make: no Python >= 3.12 with venv found on the PATH or under a version manager: install one, or set PYTHON" >&2; exit 1; }; \
	[ -x $(BIN)/python ] || { echo "make: creating $(VENV) with $$python"; "$$python" -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt jax==$(JAX) jaxlib==$(JAX) \
		$$($(BIN)/python .ci/requirements.py build run dev)
	@touch $@

$(VENV)/.installed: $(VENV)/.dependencies $(FFI)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps \
		--config-settings=build-dir=$(BUILD) --editable .
	@touch $@

demo: setup
	$(BIN)/jaxint8-eval --model=demo --text=demo --output=build/demo \
		--methods=float32,bfloat16,absmax,vectorwise,llm_int8,relative,topk
	$(BIN)/jaxint8-generate --model=demo --method=topk --max_new_tokens=48 \
		--prompt="The best thing about a small language model is"

# Every suite beside the peers that install, half an hour or more; `make bench BENCH="--suites=decode --quick"` for a part of it.
BENCH ?= --suites=all
bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt \
		$$($(BIN)/python .ci/requirements.py bench)
	$(BIN)/jaxint8-bench $(BENCH) --output=build/bench

TESTS ?=
test: setup
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) $(TESTS)

# The oldest JAX that is supported; also the version that GPU hosts have. CUDA kernels on a CPU know nothing of JAX.
test-oldest-jax:
	$(MAKE) test VENV=.venv-jax-0.11.2 JAX=0.11.2 TESTS='--ignore-glob=*/test_cuda_*.py'

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cc %.cu,$(FFI))

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(filter %.h %.cc %.cu,$(FFI))

clean:
	rm -rf build $(VENV) .venv-jax-0.11.2

# Everything about the CUDA kernels that needs no GPU: build, machine code, and the kernels run on the CPU.
CUDA_ARCHITECTURES ?= 90a-real
CUDA_BUILD := build/cuda
# JAX's CUDA compiler, 143 MB: beside the build and not in the virtual environment, where it would look for a GPU.
CUDA_PLUGIN := $(CUDA_BUILD)/plugin-$(JAX)
.PHONY: cuda-check gpu-check
CUDA_TESTS ?= tests/test_cuda_*.py
cuda-check: setup
	@command -v nvcc >/dev/null || { echo "make: cuda-check needs nvcc on the PATH" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(BIN)/cmake -S ffi -B $(CUDA_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
		-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) \
		-DJAXINT8_CUDA=on "-DJAXINT8_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)"
	$(BIN)/ninja -C $(CUDA_BUILD) _cuda jaxint8_gpu_executor
	$(BIN)/python ffi/cuda/check.py $$(find $(CUDA_BUILD)/cuda/CMakeFiles/jaxint8_cuda.dir -name '*.o')
	@[ -d $(CUDA_PLUGIN) ] || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target=$(CUDA_PLUGIN) jax-cuda13-pjrt==$(JAX) jax-cuda13-plugin==$(JAX) || \
		echo "make: jax-cuda13-plugin cannot be had: tests/test_cuda_target.py will be skipped" >&2
	PYTHONPATH=$(CUDA_PLUGIN) $(BIN)/python -m pytest -rs $(CUDA_TESTS)

# The CPU kernels for other processors, emulated: needs g++-aarch64-linux-gnu and qemu-user, and says so if they lack.
.PHONY: cross-check
cross-check: setup
	$(BIN)/python ffi/cpu/check.py build/check --cross

# The CPU kernels with the compiler's sanitizers: memory and undefined behaviour, and races (some ten minutes in all).
.PHONY: sanitize-check
SANITIZERS ?= address,undefined thread
sanitize-check: setup
	$(BIN)/python ffi/cpu/check.py build/check $(addprefix --sanitize=,$(SANITIZERS))

# On a machine with a GPU: builds, compares with the oracle, looks for races, times. Uses the python3 that has jax[cuda].
gpu-check:
	python3 ffi/cuda/gpu_check.py
