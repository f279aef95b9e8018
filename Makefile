# Everything that a person types. `make help` lists it.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# The judge's environment is its own: vLLM pins torch and transformers, the trainer wants newer ones.
GPU := $(shell command -v nvidia-smi 2>/dev/null)
JUDGE ?= $(if $(GPU),gpu,cpu)
JUDGE_VENV := .venv-judge
JUDGE_PY := $(JUDGE_VENV)/bin/python
# vLLM for CPUs wants torch's CPU build, which is not on PyPI, and the trainer does without gigabytes of CUDA then. Whoever has
# told pip of another place than PyPI (a mirror, a folder of wheels) has it there.
TORCH_CPU ?= https://download.pytorch.org/whl/cpu
cpu_builds = $$($(1) -m pip config list | grep -qE 'find-links|index-url' || echo --extra-index-url $(TORCH_CPU))
PRESET ?= $(if $(MODEL),,flex-qwen3vl-8b)
# Pictures, numbers and tests never depend on the outside: no telemetry, no hub look-ups unless asked for.
export RAY_USAGE_STATS_ENABLED := 0
export WANDB_ERROR_REPORTING := false
# Where this is set, as in many images, every process of a run compiles all that it imports anew: it starts half as fast.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup setup-judge environments serve-judge train-image-grpo train-video-grpo testbed-models train-judge train-video-judge evaluate check test chaos clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(VENV)/.done  ## make the trainer's environment, .venv
	@:

$(VENV)/.done: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; give another: make setup PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --no-compile --editable '.[dev]' $(if $(GPU),,$(call cpu_builds,$(PY)))
	@# Compiling all that is installed takes longer than installing it; this compiles what every run imports.
	@$(PY) -c 'import datasets, peft, ray, wandb; from diffusers import FluxPipeline, WanPipeline' 2>/dev/null || :
	@touch $@

environments:
	@$(MAKE) --no-print-directory -j2 setup setup-judge

train-image-grpo: environments  ## train the tiny FLUX by the tiny judge's verdicts: a new run, or RESUME=runs/NAME; ARGS="field=value …"
	@$(PY) -m grpo_flex train experiments/shapes_image.py $(if $(RESUME),--resume $(RESUME)) $(ARGS)

train-video-grpo: environments  ## the same for clips: the tiny Wan, which shows moving shapes, and a tiny judge of clips
	@$(PY) -m grpo_flex train experiments/shapes_video.py $(if $(RESUME),--resume $(RESUME)) $(ARGS)

evaluate: setup  ## score a run's adapter on held-out prompts: RUN=runs/NAME
	@$(PY) -m grpo_flex evaluate $(RUN)

setup-judge: $(JUDGE_VENV)/.done-$(JUDGE)  ## make the judge's environment, .venv-judge; JUDGE=cpu|gpu (gpu where nvidia-smi is)
	@:

$(JUDGE_VENV)/.done-$(JUDGE): reward_server/environment/$(JUDGE).txt reward_server/environment/torchvision_names.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; give another: make setup-judge PYTHON=python3.11"; exit 1; }
	rm -rf $(JUDGE_VENV)
	$(PYTHON) -m venv $(JUDGE_VENV)
	$(JUDGE_PY) -m pip install --quiet --no-compile --requirement $< $(if $(filter cpu,$(JUDGE)),$(call cpu_builds,$(JUDGE_PY)))
ifeq ($(JUDGE),cpu)
	# CUDA builds that a judge does without and that cannot be imported beside a CPU torch …
	$(JUDGE_PY) -m pip uninstall --quiet --yes torchaudio torchcodec
	@# … and one that can, with a little help. A torchvision built for CPUs needs none.
	@$(JUDGE_PY) -c 'import torchvision' 2>/dev/null || { \
		site=$$($(JUDGE_PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		cp reward_server/environment/torchvision_names.py "$$site" && \
		echo 'import torchvision_names' > "$$site/torchvision_names.pth" && \
		$(JUDGE_PY) -c 'import torchvision'; }
endif
	@touch $@

serve-judge: setup-judge $(if $(RAY_ADDRESS),setup)  ## host a judge until Ctrl-C: PRESET=think, or MODEL=folder; ARGS="--replicas 2 …"
	@$(if $(RAY_ADDRESS),$(PY),$(JUDGE_PY)) -m reward_server serve $(if $(PRESET),--preset $(PRESET)) $(if $(MODEL),--model $(MODEL)) $(ARGS)

testbed-models: setup  ## rebuild the testbed's weights (hours on a laptop; resumable)
	$(PY) -m testbed.train_flux
	$(PY) -m testbed.train_wan

train-judge: setup setup-judge  ## train the testbed's tiny judge from nothing (hours; resumable)
	$(PY) -m testbed.train_judge
	$(PY) -m testbed.refine_judge

train-video-judge: setup setup-judge  ## extend the tiny judge to clips (hours; resumable)
	$(PY) -m testbed.train_video_judge
	$(PY) -m testbed.measure_video_judge --card

check: setup  ## ruff and pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

# Tests with processes mostly wait for these to start, so the others run beside them, with what they leave of the processor.
# A GPU's tests are a pytest of their own: the others do not see it (tests/conftest.py).
test: environments  ## every test: two pytests side by side on the CPU, then a GPU's
	@nice -n 19 $(PY) -m pytest tests/unit tests/invariants > .tests.log 2>&1 & others=$$!; \
	trap "kill $$others; exit 130" INT TERM; \
	$(PY) -m pytest tests/integration; first=$$?; \
	echo "the other tests, which ran beside these:"; wait $$others; second=$$?; cat .tests.log; \
	$(PY) -m pytest tests/gpu; exit $$((first || second || $$?))

chaos: setup  ## the chaos test in full: STEPS=200 SEED=0, tens of minutes
	CHAOS_STEPS=$(or $(STEPS),200) CHAOS_SEED=$(or $(SEED),0) $(PY) -m pytest tests/integration/test_chaos.py

clean:  ## remove the environments; runs stay
	rm -rf $(VENV) $(JUDGE_VENV)
