# make train   trains a small Griffin on real text; run again, it continues, or says it is complete
# make test    runs all tests          make lint    runs ruff, pyright and shellcheck
# make lock    writes requirements.lock again, from pyproject.toml (needs uv)
#
# Each installs what it needs in .venv first, with uv if it is installed, else with pip.
# EXTRA=tpu or EXTRA=cuda chooses the jax of `make train`, PYTHON the interpreter; ARGS are passed on.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
EXTRA ?= cpu
VENV := .venv
RUN := $(VENV)/bin/python
CORPUS := runs/corpus

.PHONY: help
help:
	@sed -n 's/^# \{0,1\}//; 1,6p' Makefile

# install,EXTRAS: the pinned versions of those extras. The project itself is an empty package.
define install
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"Python {sys.version.split()[0]} is too old: 3.11 or newer is needed, set PYTHON=/path/to/python3.11")'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) || { echo 'no virtual environment could be made: install the venv module of $(PYTHON) (Debian: python3-venv)' >&2; exit 1; }
	@echo 'installing the pinned dependencies ($(1)) into $(VENV) ...'
	@if command -v uv >/dev/null; then \
	  uv pip install --quiet --python $(RUN) --constraint requirements.lock '.[$(1)]'; \
	else \
	  $(RUN) -m pip install --quiet --disable-pip-version-check --constraint requirements.lock '.[$(1)]'; \
	fi
	@touch $@
endef

$(VENV)/ready-$(EXTRA): pyproject.toml requirements.lock Makefile
	$(call install,$(EXTRA))

$(VENV)/ready-test: pyproject.toml requirements.lock Makefile
	$(call install,tpu$(comma)$(SEQIO)test)

$(VENV)/ready-lint: pyproject.toml requirements.lock Makefile
	$(call install,cpu$(comma)$(SEQIO)lint)

# TensorFlow, which seqio needs, has no packages for Python 3.14.
SEQIO = $(if $(shell $(PYTHON) -c 'import sys; print("yes" * (sys.version_info < (3, 14)))'),seqio$(comma))

comma := ,
EXTRAS := cpu tpu cuda
$(if $(filter $(EXTRA),$(EXTRAS)),,$(error EXTRA=$(EXTRA) is none of $(EXTRAS): it says which jax is installed))

# If `make test` has installed the TPU's compiler too, jax would look for a TPU, with long warnings.
train: export JAX_PLATFORMS := $(if $(filter cpu,$(EXTRA)),cpu,$(JAX_PLATFORMS))

.PHONY: train
train: $(VENV)/ready-$(EXTRA)
ifeq ($(strip $(ARGS)),)
	@$(RUN) -m launch.prepare --input 'data/corpus/*.jsonl.zst' --vocabulary byte \
	  --output $(CORPUS)/train --holdout_every 20 --holdout_output $(CORPUS)/eval
	@$(RUN) -m launch.train --config=configs/smoke.py --workdir=runs/smoke
	@echo
	@echo 'In runs/smoke: loss.png (the loss curve), metrics.jsonl, checkpoints, config.json, tensorboard.'
	@echo 'A page of it:   $(RUN) -m launch.report runs/smoke'
	@echo 'Text from it:   $(RUN) -m launch.generate --config=configs/smoke.py --workdir=runs/smoke --prompt=HAMLET'
	@echo 'Train longer:   $(RUN) -m launch.train --config=configs/smoke.py --workdir=runs/smoke --config.total_steps=2000'
	@echo 'Your own text:  see docs/data.md and docs/training.md'
else
	@$(RUN) -m launch.train $(ARGS)
endif

.PHONY: test
test: $(VENV)/ready-test
	@$(RUN) -m pytest -n 2 --dist loadgroup $(ARGS)

.PHONY: lint
lint: $(VENV)/ready-lint
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/shellcheck --external-sources launch/*.sh .ci/run
	@$(VENV)/bin/pyright

.PHONY: lock
lock:
	uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url \
	  --no-emit-find-links --no-header --no-annotate --all-extras \
	  --output-file requirements.lock pyproject.toml
