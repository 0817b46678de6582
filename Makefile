# Everything a newcomer needs; each target sets up what it uses.
.DEFAULT_GOAL := help
SHELL := /bin/sh
BIN := .venv/bin
SOURCE ?=
export SOURCE
export DAGSTER_HOME := $(CURDIR)/.dagster
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# oversubscribed OpenMP threads can be many times slower than one
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: help setup demo demo-lakefs lakefs lakefs-stop test test-all lint fmt types bench ui board clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: ## make .venv and .venv-dvc from the lock files, build the lakeFS server once
	@tools/setup

demo: setup ## pictures in, a signed release out; SOURCE=folder:/my/pictures for your own
	@tools/demo

demo-lakefs: setup ## two releases of the demo's model through a real lakeFS server on loopback
	@tools/demo-lakefs

lakefs: setup ## lakeFS on loopback, state and keys in .dinov3/lakefs
	@$(BIN)/python tools/lakefs/server.py start

lakefs-stop: ## end that server
	@$(BIN)/python tools/lakefs/server.py stop

test: setup lint types ## lint, types, import contracts, tests
	$(TEST) -m "not slow"

test-all: setup lint types ## the tests with the long fault matrices
	$(TEST)

lint: setup ## style, spelling, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/lint-imports

types: setup ## static types
	$(BIN)/mypy

fmt: setup ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## speed as ratios in one run, one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m dinov3.bench

ui: PORT ?= 3000
ui: export PYTHONWARNINGS := ignore:Function `dev_command` is superseded
ui: setup ## Dagster on loopback, state in .dagster; PORT=3000
	@mkdir -p .dagster/.nux
	@cp orchestration/dagster.yaml .dagster/dagster.yaml
	@echo 'seen: 1' >.dagster/.nux/nux.yaml
	$(BIN)/dagster dev -w workspace.yaml -h 127.0.0.1 -p $(PORT)

board: PORT ?= 6006
board: setup ## TensorBoard on loopback; PORT=6006
	$(BIN)/tensorboard --logdir data --host 127.0.0.1 --port $(PORT)

clean: ## remove what was made (environments, pictures and the log of releases stay)
	rm -rf .dagster .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .cache
	find data -mindepth 1 -maxdepth 1 ! -name README.md ! -name stamps ! -name release_log ! -name raw_images -exec rm -rf {} +
