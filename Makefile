# The README's two commands are `make serve` and `make test`; both set up .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc cuda cmake pyruntime/_ext CMakeLists.txt setup.py pyproject.toml -type f \
             -not -name '*.so*' -not -name '_fast.cpp' 2>/dev/null)

.PHONY: serve test dev lint bench clean

serve: $(VENV)/serve.stamp
	$(BIN)/pyruntime doctor
	$(BIN)/pyruntime serve

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest

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
