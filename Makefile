# make demo    prepare Tiny Shakespeare, train the model that fits two minutes, print a sample
# make test    run the tests, on all cores
# make storm   kill, damage and fill up everything at random (minutes; STORM_SEEDS=7,8,9 for other storms)
# make check   lint, format, types, layers
# make bench   measure what bench/ claims (about a quarter of an hour; let nothing else run beside it)
# Each sets up .venv by itself. PYTHON=python3.12 make ... picks another interpreter (3.10 or newer).

PYTHON ?= python3
STORM_SEEDS ?= 1
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo test storm check bench format clean

demo: $(VENV)/installed
	$(BIN)/python data.py
	$(BIN)/python train.py --minutes 2
	$(BIN)/python sample.py --num_tokens 400 --temperature 0.8 --seed 1

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not long"

storm: $(VENV)/installed-dev
	NANOGPT_STORM_SEEDS=$(STORM_SEEDS) $(BIN)/python -m pytest -n auto --dist worksteal -m long

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest tests/test_layers.py

bench: $(VENV)/installed-dev
	$(BIN)/python data.py
	$(BIN)/python bench/step.py
	$(BIN)/python bench/step.py --small --compile
	$(BIN)/python bench/race.py
	$(BIN)/python bench/loss.py
	$(BIN)/python bench/attention.py
	$(BIN)/python bench/prepare.py
	$(BIN)/python bench/bpe.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/plan.py
	$(BIN)/python bench/scaling.py

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'error: Python 3.10 or newer is needed: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	touch $@ $(VENV)/installed
