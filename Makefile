# Needs python3 >= 3.11 and nothing else: `make quickstart` in a fresh clone builds its own environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# For another wheel of torch: make venv PIP_ARGS="--extra-index-url ..."
PIP_ARGS ?=
SEED ?= 0
# Every seed has its own model, data and run
QUICKSTART_DIR ?= outputs/quickstart$(if $(filter-out 0,$(SEED)),-seed$(SEED))
QUICKSTART_CONFIG ?= recipes/quickstart/ama/config_lora.yaml
QUICKSTART_ARGS ?=
BENCH_DIR ?= outputs/bench
GPU_DIR ?= outputs/gpu
GPU_ARGS ?=
CHAOS_DIR ?= outputs/chaos
CHAOS_ARGS ?=
DOCS_DIR ?= outputs/site
# loadfile: a file's tests run in one worker, which makes what they share once (a run, an installed copy of the package)
# and in the order of tests/conftest.py, which has the files that take long at the beginning
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
# Copied into the environment, also by an editable installation
HOOK := trl_ama_register.pth trl_ama_register.py trl_ama_register.start
CHECKED := trl_ama trl_ama_register.py tests recipes docs

# The quickstart and the tests build their own models and data: they must not reach for the network.
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false

.PHONY: help venv quickstart test slow quick check style docs bench gpu chaos clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

venv: $(VENV)/.installed  ## create the environment in $(VENV)

# The stamp makes this run again when the dependencies change, and only then.
$(VENV)/.installed: pyproject.toml constraints.txt $(HOOK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "trl-ama needs Python 3.11 or later; name one with: make venv PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_ARGS) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

# One thread: a model this small is no faster with two, and far slower on a busy machine.
quickstart: venv  ## all stages on a tiny model, in minutes and without a GPU
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python recipes/quickstart/prepare.py --output_dir $(QUICKSTART_DIR) --seed $(SEED)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/trl ama --config $(QUICKSTART_CONFIG) --seed $(SEED) \
		--model_name_or_path $(QUICKSTART_DIR)/model --tasks_dir $(QUICKSTART_DIR)/data \
		--output_dir $(QUICKSTART_DIR)/run $(QUICKSTART_ARGS)

# One thread per worker: two workers that each use every core are slower than one.
test: venv  ## run the tests
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PYTEST_ARGS)

slow: venv  ## run the tests and note which of them take longer than half a second, for `make quick`
	$(OFFLINE) OMP_NUM_THREADS=1 TRL_AMA_NOTE_SLOW=1 $(BIN)/python -m pytest -q $(PYTEST_ARGS)

quick: venv  ## run the tests that train nothing, for work in progress
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PYTEST_ARGS) -m "not trains and not slow"

check: venv  ## static checks: lint, format, YAML and TOML syntax, byte compilation
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/python -m compileall -q $(CHECKED)
	git ls-files -z --cached --others --exclude-standard '*.yaml' '*.yml' '*.cff' | xargs -0 -r $(BIN)/python -c \
		'import sys, yaml; [list(yaml.safe_load_all(open(path, encoding="utf-8"))) for path in sys.argv[1:]]'
	bash -n .ci/run

style: venv  ## mend what `make check` finds, where it can be mended
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

# Strict: a broken link, a page without a menu entry or a name in a docstring that nothing has fails it. Made anew each
# time, because pages are made from the code too, which Sphinx does not watch.
docs: venv  ## build the documentation as a site in $(DOCS_DIR), strictly
	$(OFFLINE) $(BIN)/python -m sphinx -b html -c docs -W --keep-going -n -E -a -q -d $(DOCS_DIR)/.doctrees . $(DOCS_DIR)
	@echo "Open $(DOCS_DIR)/index.html"

# speed and pipeline_time want a real model and pairs (TRL_AMA_BENCH_MODEL, TRL_AMA_BENCH_DATA) and say so without
bench: venv  ## measure speed, memory and start-up against TRL; tables and JSON in $(BENCH_DIR)
	@for script in startup overhead speed pipeline_time; do \
		echo "== $$script"; \
		HF_HUB_DISABLE_TELEMETRY=1 $(BIN)/python tests/benchmarks/$$script.py --output $(BENCH_DIR) || exit 1; \
	done

# torch for CUDA is yours to choose, and the script runs in any environment: python tests/benchmarks/gpu/run.py
gpu: venv  ## everything to know of a card in 8 minutes; table, JSON and Markdown in $(GPU_DIR)
	$(BIN)/python tests/benchmarks/gpu/run.py --output $(GPU_DIR) $(GPU_ARGS)

chaos: venv  ## kill runs 25 times in every stage, resume them and compare; table and JSON in $(CHAOS_DIR)
	$(OFFLINE) $(BIN)/python tests/support/chaos.py --output $(CHAOS_DIR) $(CHAOS_ARGS)

clean:  ## remove the environment, caches and build products
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
