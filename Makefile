# Every target does its own set-up; CI calls the same names.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROTO_VENV := .venv-proto
PROTO_STAMP := $(PROTO_VENV)/.installed

.PHONY: setup proto proto-check lint type test test-fast test-long test-ray redis e2e bench bench-gpu demo serve models clean
.DEFAULT_GOAL := help

help:
	@echo "make serve   start the service on the bundled model and keep it running"
	@echo "make demo    send eight prompts through the whole path and stop"
	@echo "make test    run the tests           make test-fast   only the quick ones"
	@echo "make test-ray  the tests that start Ray clusters   make test-long  a few at full size"
	@echo "make lint type proto setup bench bench-gpu e2e models"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tandem needs Python 3.11 or newer; set PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(STAMP)

# Without one the tests that need it say so and are skipped.
redis: $(STAMP)
	-@.ci/redis

# Stubs are made with the oldest protobuf we support, so the generator lives in a venv of its own.
$(PROTO_STAMP): Makefile
	@test -x $(PROTO_VENV)/bin/python || $(PYTHON) -m venv $(PROTO_VENV)
	@$(PROTO_VENV)/bin/python -m pip install -q --disable-pip-version-check grpcio-tools==1.78.0 mypy-protobuf==5.1.0
	@touch $@

proto: $(PROTO_STAMP)
	$(PROTO_VENV)/bin/python protos/generate.py

proto-check: $(PROTO_STAMP)
	$(PROTO_VENV)/bin/python protos/generate.py --check

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP)
	$(BIN)/mypy

test: $(STAMP) redis
	$(BIN)/python -m pytest -m "not ray and not long"

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not e2e and not ray and not long"

test-long: $(STAMP) redis
	$(BIN)/python -m pytest -m long

test-ray: $(STAMP)
	$(BIN)/python -m pytest -m ray

e2e: $(STAMP)
	$(BIN)/python -m pytest -m e2e

bench: $(STAMP)
	$(BIN)/python -m bench.service

# On a GPU; everything but CUDA: make bench-gpu ARGS='--device cpu --shape tiny'
bench-gpu: $(STAMP)
	$(BIN)/python -m bench.gpu $(ARGS)

demo: $(STAMP)
	@$(BIN)/tandem demo

serve: $(STAMP)
	@$(BIN)/tandem serve --try

models: $(STAMP)
	$(BIN)/python -m bench.bundled_pair

clean:
	rm -rf $(VENV) $(PROTO_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
