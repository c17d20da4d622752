# Two commands do everything on a machine with Python >= 3.10, a C++ compiler and make:
#   make demo   phantoms -> store -> both CNNs -> tables and figures, in demo/
#   make test   lint, the whole test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
DEMO := demo
SECONDS := 60
CXX_SOURCES = $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

.PHONY: demo test test-oldest install install-test lint format bench fuzz clean

# ---- the two ----

demo: install
	tools/demo.sh $(BIN) $(DEMO)

test: install-test lint
	if command -v clang++ >/dev/null; then $(MAKE) fuzz SECONDS=20; else echo "no clang++: not fuzzed"; fi
	$(BIN)/python -m pytest

# Not of the two: the quick tests with the oldest packages that pyproject.toml allows, on what `make test` has compiled.
test-oldest: install-test
	$(PYTHON) -m venv $(VENV)-oldest
	$(BIN)/python tools/pin.py oldest >$(VENV)-oldest/packages.txt
	$(VENV)-oldest/bin/python -m pip install --quiet torch==$$(sed -n 's/^torch==//p' constraints.txt) -r $(VENV)-oldest/packages.txt
	$(VENV)-oldest/bin/python -m pytest -m "not slow"

# ---- their parts ----

install: $(VENV)/installed
install-test: $(VENV)/installed-test

# pip builds without isolation, so that torch is fetched once and the loss is compiled against that very torch.
$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*.*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip setuptools wheel pybind11 ninja torch numpy
	$(PIP) --no-build-isolation --editable .
	touch $@

# CI refuses what an installation puts up with: a part that does not compile, or compiles with a warning.
test install-test lint format bench fuzz: export CXRFAST_WERROR = 1
# DALI first, with CUDA's headers: its operator is compiled against it.
$(VENV)/installed-test: $(VENV)/installed
	tools/system_packages.sh
	$(PIP) nvidia-dali-cuda120 nvidia-cuda-runtime-cu12 nvidia-cuda-nvcc-cu12 nvidia-cuda-cccl-cu12
	CXRFAST_REQUIRE_BUILD=1 $(PIP) --no-build-isolation --editable '.[test,lint,dali]'
	touch $@

lint: install-test
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: install-test
	$(BIN)/ruff format
	$(BIN)/ruff check --fix
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: install-test
	$(PIP) --no-build-isolation --editable '.[bench]'
	$(BIN)/python -m pytest --benchmark-only benchmarks

fuzz: install-test
	PYTHON=$(BIN)/python tools/fuzz.sh $(SECONDS)

clean:
	rm -rf build $(DEMO) $(VENV)-oldest cxrfast/*.so cxrfast/_dali_build.json
