# make demo         everything it needs into .venv, then the shipped package: train, export, compare
# make test         everything it needs into .venv, then the test suite, in two processes (WORKERS=8 for eight)
# make test-fast    those of the tests that train and export no model
# make test-oldest  the fast tests and some others with the oldest packages that pyproject.toml admits, in .venv-oldest
# make test-slow    what takes an hour: builds that are killed, long fuzzing, and the tables of hostile inputs, in build/test-slow
# make lint         ruff, mypy, and the imports between the rooms of olpack/
# make docs         the generated pages of docs/reference/
# make audit        known vulnerabilities of what constraints.txt pins (DATABASE=PATH: OSV records on the disk, in place of PyPI)
# make lock         the hashes in .ci/requirements/, after a change of constraints.txt
# make dist         the archives of a release in dist/, checked
# make site         the documents as a site in build/site/; a broken link fails it
# make links        checks links within the project, and lists those that lead to other hosts
.PHONY: demo test test-fast test-oldest test-slow lint docs site links install audit lock dist clean

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready
TESTED := $(VENV)/.ready-for-tests
OLDEST := .venv-oldest
# Modules that train, plan, export and compare, on a Hub model's folder and on a GGUF: together they call every library.
CALLING_LIBRARIES := pipeline plan_bases train_forward four_bits gguf_base gguf_package export_identity compare_harness train_trackers
LLAMA_CPP := 0.3.36
WORKERS ?= 2
# Source archives in here are fetched once, and the converter is taken from the same one that the library was built from.
SDIST := $(VENV)/sdist/llama_cpp_python-$(LLAMA_CPP).tar.gz
export OLPACK_LLAMA_CPP ?= $(abspath $(SDIST))

demo: install
	$(VENV)/bin/olpack build coding-assistant

test: install $(TESTED)
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile

test-fast: $(TESTED)
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --fast

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile --fast
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(CALLING_LIBRARIES:%=tests/test_%.py)

test-slow: $(TESTED)
	rm -rf build/test-slow
	mkdir -p build/test-slow
	OLPACK_FUZZ=1500 $(VENV)/bin/python -m pytest tests/test_fuzz.py
	$(VENV)/bin/python tests/test_sandbox.py > build/test-slow/sandbox.md
	$(VENV)/bin/python -m pytest -rP tests/test_bad_inputs.py tests/test_server_answers.py > build/test-slow/inputs_and_answers.txt
	$(VENV)/bin/python benchmarks/kills.py --work build/test-slow/kills --output build/test-slow/kills.md

lint: $(TESTED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python .ci/rooms.py
	$(VENV)/bin/mypy

docs: $(READY)
	$(VENV)/bin/python -m olpack.reference

site: $(TESTED)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --config-file .ci/mkdocs.yml

links: install
	$(VENV)/bin/python .ci/links.py

install: $(READY)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Whole lists with hashes: pip resolves nothing and takes no other file.
$(VENV)/.requirements: .ci/requirements/olpack.txt | $(VENV)/bin/python
	$(PIP) install -q --no-deps --require-hashes -r $<
	touch $@

$(SDIST): .ci/requirements/llama-cpp.txt | $(VENV)/.requirements
	$(PIP) download -q --no-deps --no-build-isolation --no-binary :all: --require-hashes -r $< -d $(@D)
	touch $@

$(VENV)/.llama-cpp-$(LLAMA_CPP): $(SDIST) .ci/llama_cpp.py .ci/llama_cpp.cmake
	$(VENV)/bin/python .ci/llama_cpp.py $(SDIST)
	touch $@

# torch by its version alone, which decides with pip's settings whether a build for CPUs or for GPUs is taken.
$(READY): pyproject.toml constraints.txt $(VENV)/.requirements $(VENV)/.llama-cpp-$(LLAMA_CPP)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q --no-deps --no-build-isolation -e .
	$(PIP) check
	touch $@

$(TESTED): .ci/requirements/test.txt $(READY)
	$(PIP) install -q --no-deps --require-hashes -r $<
	$(PIP) check
	touch $@

# pip resolves here, so that lower bounds which exclude each other are an error. llama.cpp's wheel is that of `make install`.
$(OLDEST)/.ready: pyproject.toml constraints.txt .ci/oldest.py $(READY)
	$(PYTHON) -m venv --clear $(OLDEST)
	$(VENV)/bin/python .ci/oldest.py > $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install -q -r $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python .ci/llama_cpp.py $(SDIST)
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install -q -e .
	$(OLDEST)/bin/python -m pip check
	touch $@

# pip-audit and uv have an environment of their own, so that olpack's has nothing that olpack does not need.
$(VENV)/tools/bin/python: | $(VENV)/bin/python
	$(PYTHON) -m venv $(VENV)/tools
	$(VENV)/tools/bin/python -m pip install -q pip-audit==2.10.1 uv==0.13.9 build==1.6.1 twine==7.0.0

audit: $(READY) | $(VENV)/tools/bin/python
	$(VENV)/bin/python .ci/audit.py $(VENV)/tools/bin/pip-audit $(if $(DATABASE),--database $(DATABASE))

lock: $(TESTED) | $(VENV)/tools/bin/python
	$(VENV)/bin/python .ci/lock.py $(VENV)/tools/bin/uv

dist: | $(VENV)/tools/bin/python
	rm -rf dist
	$(VENV)/tools/bin/python -m build
	$(VENV)/tools/bin/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) $(OLDEST) build dist
