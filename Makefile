# The commands of a working copy. `make` alone prints them; ARGS="..." goes to the command behind.
SHELL := /bin/bash
MAKEFLAGS += --no-print-directory
export PATH := $(PATH):/usr/local/bin:/usr/bin:/bin
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels
python := .venv/bin/python

# Two processes test: one file's tests stay in one of them, as fixtures are made once a file.
JOBS ?= 2
pytest = $(python) -m pytest --ignore=tests/gpu -n $(JOBS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all test-gpu lint lock clean distclean

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv from requirements.lock (the targets below do it when needed)
	@bash tools/setup_env.sh

train: setup ## pretrain a small GPT with mHC and without, on CPU or GPU, and write the report
	@$(python) launch/train_tiny.py $(ARGS)

test: setup ## the tests that run on CPUs in minutes; ARGS="-k sinkhorn" chooses
	@echo "Without the tests marked slow; make test-all runs them too."  # xdist counts no deselected
	@$(pytest) -m "not gpu and not slow" $(ARGS)

test-all: setup ## all tests for CPUs, the slow ones too
	@$(pytest) -m "not gpu" $(ARGS)

test-gpu: setup ## the tests that need a CUDA device
	@$(python) -m pytest tests/gpu $(ARGS)

lint: setup ## ruff, as the lock pins it
	@$(python) -m ruff check $(or $(ARGS),.)

lock: ## solve requirements.lock anew from pyproject.toml (needs uv)
	@bash tools/lock.sh

clean: ## remove caches and build folders; runs, data and .venv stay
	@rm -rf build .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv; runs and data stay
	@rm -rf .venv
