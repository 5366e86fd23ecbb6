# make demo     install and run the demo
# make test     install everything and run the tests
# make fuzz     3000 random graphs, 100,000 damaged files
# make kills    50 kills of each of train, tune, lower and certify
# make digits   both digits models end to end, as make test does one
# make check    lint, formatting, types, documentation
# make docs     the documentation, in build/site
# make runner   the runner without Python, for this machine and for arm64, in build/runner
# make help     all targets

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
# Modules are compiled at their first import; most are never imported.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt
# setuptools is installed first and used as it is, so that the build is pinned like the rest.
PACKAGE := --no-build-isolation -e

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz kills digits check lint types typed docs arm64-root runner clean

help:
	@echo "make demo | test | fuzz | kills | digits | check | docs | arm64-root | runner | clean     (PYTHON=$(PYTHON) makes .venv)"

demo: .venv/installed
	@$(BIN)/python scripts/arm64_root.py || echo "arm64 is left out of the demo: see the line above"
	$(BIN)/t3c-compile demo

# Where the arm64 system cannot be built its tests are skipped with the reason; with CI=true they fail.
test: .venv/installed-dev
	@$(BIN)/python scripts/arm64_root.py || test "$$CI" != true
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Many times as many random graphs and damaged files as in `make test`; it prints the seeds, the refusals and reasons.
fuzz: .venv/installed-dev
	T3C_FUZZ_CASES=3000 $(BIN)/python -m pytest tests/test_random_graphs.py
	T3C_FUZZ_LOADS=100000 $(BIN)/python -m pytest tests/test_loader_fuzz.py

kills: .venv/installed-dev
	T3C_KILLS=50 $(BIN)/python -m pytest tests/test_kills.py

digits: .venv/installed-dev
	T3C_DIGITS="cnn vit" $(BIN)/python -m pytest tests/test_digits.py

check: lint types docs

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev typed
	MYPYPATH=build/typed $(BIN)/mypy --strict -p t3c_compile

# A broken link, a page without a place or one that loads from another host is an error (mkdocs.yml).
docs: .venv/installed-dev typed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# Neither mypy nor mkdocstrings follows setuptools' mapping of passes/ and backends/: this is the package as installed.
typed:
	@rm -rf build/typed && mkdir -p build/typed/t3c_compile
	@ln -sf $(CURDIR)/t3c_compile/* $(CURDIR)/passes $(CURDIR)/backends build/typed/t3c_compile/

arm64-root: .venv/installed
	$(BIN)/python scripts/arm64_root.py

# Against the runtime libraries of TVM's wheels: this machine's, and those of the arm64 system.
runner: .venv/installed
	$(BIN)/python scripts/arm64_root.py
	$(MAKE) -C runner OUT=$(CURDIR)/build/runner/host \
		SITE=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
	$(MAKE) -C runner OUT=$(CURDIR)/build/runner/arm64 SITE=$(CURDIR)/build/arm64-root/site \
		CXX='$(CURDIR)/$(BIN)/python -m ziglang c++ -target aarch64-linux-gnu.2.28'

# A stamp file for each: nothing is installed again until the project's metadata or the pins change.
.venv/installed: pyproject.toml constraints.txt | .venv/bin/pip
	@echo "installing t3c-compile and its examples into .venv"
	@$(INSTALL) setuptools wheel
	@$(INSTALL) $(PACKAGE) '.[examples]'
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "installing what the tests need into .venv"
	@$(INSTALL) $(PACKAGE) '.[dev,examples]'
	@touch $@

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "Python's venv module is missing (on Debian: apt-get install python3-venv)"; exit 1; }
	@$(PYTHON) -m venv .venv

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
