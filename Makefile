# Everything that a person types. `make help` lists it.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Pictures, numbers and tests never depend on the outside: no telemetry, no hub look-ups unless asked for.
export RAY_USAGE_STATS_ENABLED := 0
export WANDB_ERROR_REPORTING := false

.DEFAULT_GOAL := help
.PHONY: help setup train-image-grpo testbed-models evaluate check test clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(VENV)/.done  ## make the trainer's environment, .venv

$(VENV)/.done: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; give another: make setup PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --editable '.[dev]'
	@touch $@

train-image-grpo: setup  ## train the tiny FLUX: a new run, or RESUME=runs/NAME; ARGS="field=value …"
	@$(PY) -m grpo_flex train experiments/shapes_image.py $(if $(RESUME),--resume $(RESUME)) $(ARGS)

evaluate: setup  ## score a run's adapter on held-out prompts: RUN=runs/NAME
	@$(PY) -m grpo_flex evaluate $(RUN)

testbed-models: setup  ## rebuild the testbed's weights (hours on a laptop; resumable)
	$(PY) -m testbed.train_flux

check: setup  ## ruff and pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

test: setup  ## every test, on the CPU
	$(PY) -m pytest tests

clean:  ## remove the environments; runs stay
	rm -rf $(VENV) .venv-judge
