# make demo   LeNet-5 from torch to Keras, trained and compared here
# make test   the whole test suite
# make check  ruff, mypy, import-linter, the README table, the tests against the built wheel
# make table  measure what converts, write the support table into the README and docs/table.md
# make chains 200 random models, 20 random walks each through five frameworks and back
# make schema write the published JSON Schema of the manifest
# make bench  speed and memory, beside cp and the hand-written way
#
# Each makes .venv first if it is missing or older than pyproject.toml and constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --no-input --disable-pip-version-check -c constraints.txt
READY := $(VENV)/.ready

# What runs against the wheel as well: every module's examples, every command, each framework's files written and filled.
# A wheel differs from the checkout in what it leaves out, not in what it computes; `make wheel WHEEL_TESTS=tests` runs all.
WHEEL_TESTS := tests/test_doctests.py tests/test_packaging.py tests/test_cli.py tests/test_readme.py tests/test_demo.py \
	tests/importers

# What the tests see of the machine: no GPU, no chatter.
export CUDA_VISIBLE_DEVICES :=
export TF_CPP_MIN_LOG_LEVEL := 3
export TF_ENABLE_ONEDNN_OPTS := 0
export KERAS_BACKEND := tensorflow

.PHONY: demo test check lint types layers readme wheel table chains schema bench clean

demo: $(READY)
	$(BIN)/python demo/lenet5.py

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: lint types layers readme wheel

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

layers: $(READY)
	$(BIN)/lint-imports

readme: $(READY)
	$(BIN)/python -m tests.table --check
	$(BIN)/python -m tests.pairs_table --check

wheel: $(READY)
	bash tests/wheel.sh $(BIN)/python $(WHEEL_TESTS)

table: $(READY)
	$(BIN)/python -m tests.table
	$(BIN)/python -m tests.pairs_table

chains: $(READY)
	$(BIN)/python -m tests.chains 200 20

schema: $(READY)
	$(BIN)/python -c 'import json; from neutral.schema.manifest import json_schema; \
		print(json.dumps(json_schema(), indent=1, sort_keys=True))' > schema/manifest.schema.json

bench: $(READY)
	$(BIN)/python bench/bench.py

clean:
	rm -rf $(VENV) build dist demo-out *.egg-info

# torch first: what is already there satisfies the later steps. tf_keras asks for the large tensorflow package
# and works beside tensorflow-cpu, so its dependencies are left out.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'neutral needs Python 3.11 or newer: make PYTHON=python3.12 ...' >&2; exit 1; }
	@echo 'making $(VENV) (some minutes the first time)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) setuptools wheel
	$(PIP) --no-build-isolation -e '.[all,dev]'
	$(PIP) --no-deps tf_keras
	@$(BIN)/python -m compileall -q neutral exporters importers schema
	@touch $@
