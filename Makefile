# The README's two commands are `make serve` and `make test`; both set up .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc cuda cmake pyruntime/_ext CMakeLists.txt setup.py pyproject.toml -type f \
             -not -name '*.so*' -not -name '_fast.cpp' 2>/dev/null)

.PHONY: serve test test-gpu dev lint bench clean

serve: $(VENV)/serve.stamp
	$(BIN)/pyruntime doctor
	$(BIN)/pyruntime serve

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest

# On a machine with a GPU, without network and without a virtual environment: builds with the active
# Python, its packages and nvcc, and runs what is marked `gpu` and the kernel tests. What it lacks is
# taken from a folder `wheels` in or beside the checkout: *.whl, and googletest/ (a source tree).
WHEELS := $(firstword $(wildcard wheels ../wheels))
CUDA_ARCHITECTURES ?= native
test-gpu: export PYTHONPATH := $(CURDIR)/build/gpu/site:$(PYTHONPATH)
test-gpu:
	@test -z "$(wildcard $(WHEELS)/*.whl)" || $(PYTHON) -m pip install -q --no-index --no-deps --no-compile \
	  --upgrade --target build/gpu/site $(wildcard $(WHEELS)/*.whl)
	cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$$(command -v $(PYTHON)) \
	  -DCMAKE_MAKE_PROGRAM=$$(command -v ninja) -DCMAKE_INSTALL_PREFIX=$(CURDIR) --log-level=WARNING \
	  -DPYRUNTIME_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES) -DPYRUNTIME_TESTS=ON \
	  -DPYRUNTIME_GTEST_SOURCE=$(abspath $(wildcard $(WHEELS)/googletest))
	cmake --build build/gpu --target pyruntime_cuda _native _fast _kv _cffi kernel_tests
	cmake --install build/gpu --component runtime >/dev/null
	for program in build/gpu/test_*_kernels build/gpu/test_shim; do $$program || exit 1; done
	@if command -v compute-sanitizer >/dev/null; then for tool in memcheck racecheck; do \
	  for program in build/gpu/test_*_kernels build/gpu/test_shim; do \
	    compute-sanitizer --tool $$tool --report-api-errors no --error-exitcode 1 $$program || exit 1; \
	  done; done; else echo "no compute-sanitizer here: memcheck and racecheck are skipped"; fi
	$(PYTHON) -m pytest -o addopts="-ra --import-mode=importlib --strict-markers" -m gpu \
	  $$(grep -l 'mark\.gpu' tests/test_*.py)

# Inner loop: build and install in place with the tools of the active environment.
dev:
	cmake -S . -B build/dev -G Ninja -DPython_EXECUTABLE=$$(command -v python) -DCMAKE_MAKE_PROGRAM=$$(command -v ninja) \
	  -DCMAKE_INSTALL_PREFIX=$(CURDIR) --log-level=WARNING
	cmake --build build/dev
	cmake --install build/dev --component runtime >/dev/null

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.hpp' '*.cpp' '*.h' '*.cuh' '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

bench: $(VENV)/test.stamp
	$(BIN)/python -m pytest bench --benchmark-only

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -U pip

$(VENV)/%.stamp: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install -e ".[$*]"
	touch $@

clean:
	rm -rf build $(VENV)
