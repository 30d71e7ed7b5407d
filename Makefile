# make demo         everything it needs into .venv, then the shipped package: train, export, compare
# make test         everything it needs into .venv, then the test suite, in two processes (WORKERS=8 for eight)
# make test-fast    those of the tests that train and export no model
# make test-slow    what takes an hour: builds that are killed, long fuzzing, and the tables of hostile inputs, in build/test-slow
# make lint         ruff, mypy, and the imports between the rooms of olpack/
# make docs         the generated pages of docs/reference/
# make site         the documents as a site in build/site/; a broken link fails it
# make links        checks links within the project, and lists those that lead to other hosts
.PHONY: demo test test-fast test-slow lint docs site links install clean

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
LLAMA_CPP := 0.3.36
WORKERS ?= 2
# Source archives in here are fetched once, and the converter is taken from the same one that the library was built from.
SDIST := $(VENV)/sdist/llama_cpp_python-$(LLAMA_CPP).tar.gz
export OLPACK_LLAMA_CPP ?= $(abspath $(SDIST))

demo: install
	$(VENV)/bin/olpack build coding-assistant

test: install
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile

test-fast: install
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --fast

test-slow: install
	rm -rf build/test-slow
	mkdir -p build/test-slow
	OLPACK_FUZZ=1500 $(VENV)/bin/python -m pytest tests/test_fuzz.py
	$(VENV)/bin/python tests/test_sandbox.py > build/test-slow/sandbox.md
	$(VENV)/bin/python -m pytest -rP tests/test_bad_inputs.py tests/test_server_answers.py > build/test-slow/inputs_and_answers.txt
	$(VENV)/bin/python benchmarks/kills.py --work build/test-slow/kills --output build/test-slow/kills.md

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python .ci/rooms.py
	$(VENV)/bin/mypy

docs: install
	$(VENV)/bin/python -m olpack.reference

site: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --config-file .ci/mkdocs.yml

links: install
	$(VENV)/bin/python .ci/links.py

# Once for each set of versions, as the rest of the environment.
$(VENV)/.docs: $(READY)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

$(VENV)/.lint: $(READY)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[lint]'
	touch $@

install: $(READY)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# GGML_NATIVE=OFF: some compilers miscompile the native build for CPUs with AMX, and it crashes on quantized models. From a file,
# so that a wheel that pip built and cached earlier, without this option, is not taken instead.
$(VENV)/.llama-cpp-$(LLAMA_CPP): $(SDIST)
	$(VENV)/bin/python -m pip install -q --no-deps --force-reinstall -C cmake.args=-DGGML_NATIVE=OFF $(SDIST)
	touch $@

$(SDIST): | $(VENV)/bin/python
	$(VENV)/bin/python -m pip download -q --no-deps --no-binary llama-cpp-python -d $(@D) llama-cpp-python==$(LLAMA_CPP)

# torch by itself and first: its pinned version alone decides which build is taken.
$(READY): pyproject.toml constraints.txt $(VENV)/.llama-cpp-$(LLAMA_CPP)
	$(VENV)/bin/python -m pip install -q $$(grep '^torch==' constraints.txt)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist
