# Two commands do all the set-up on a fresh machine: `make run` and `make test`. They make .venv with the first Python of
# 3.11 or newer that they find, and install into it what they need. Calling them again installs nothing.
#
#   make run            train, evaluate and sample recipes/hdlm_small.toml
#   make run RECIPE=recipes/mdlm_small.toml SET="--set train.steps=200"
#   make test           the whole test suite, on two cores
#   make lint           ruff, mypy, import-linter
#   make bench          what a step and a sample cost beside the obvious way: half an hour on a quiet machine
#   make bench BENCH="--quick --only train"
#   make soak           kill runs at fifty random moments, also in a save, and see that each ends as if left alone
#   make fuzz           a thousand mutated recipes through --dry-run, and short runs of some that pass
#   make clean          remove .venv
#
# PYTHON=python3.12 picks the Python, VENV=elsewhere the folder, CONSTRAINTS= (empty) takes any torch in place of the
# tested one.

RECIPE = recipes/hdlm_small.toml
SET =
PYTHON =
VENV = .venv
CONSTRAINTS = -c ci/constraints.txt
BENCH =
SOAK = --trials 50
FUZZ = --recipes 1000 --runs 40

PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check $(CONSTRAINTS)

.PHONY: run test lint bench soak fuzz install dev clean

run: install
	$(VENV)/bin/ddiff run $(RECIPE) $(SET)

# What tests and checks tell the libraries: a thread for each of the two test processes, no question to the Hugging Face
# hub, nothing sent to W&B, no tokenizer threads in processes that fork. `make run` sets none of it: it uses every core.
test lint soak fuzz: export OMP_NUM_THREADS = 1
test lint soak fuzz: export HF_HUB_OFFLINE = 1
test lint soak fuzz: export WANDB_MODE = offline
test lint soak fuzz: export TOKENIZERS_PARALLELISM = false

test: dev
	$(VENV)/bin/python -m pytest -n 2

lint: dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: install
	$(VENV)/bin/python benchmarks/bench $(BENCH)

soak: install
	$(VENV)/bin/python benchmarks/soak.py $(SOAK)

fuzz: install
	$(VENV)/bin/python benchmarks/fuzz.py $(FUZZ)

install: $(VENV)/.installed
dev: $(VENV)/.installed_dev

clean:
	rm -rf $(VENV)

# A stamp is written last, so that an interrupted installation is taken up again.
$(VENV)/.installed: pyproject.toml ci/constraints.txt | $(VENV)/.made
	$(PIP) -e .
	@touch $@

$(VENV)/.installed_dev: pyproject.toml ci/constraints.txt | $(VENV)/.made
	$(PIP) -e ".[dev]"
	@touch $(VENV)/.installed $@

$(VENV)/.made:
	@for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python); do \
	    command -v "$$python" > /dev/null || continue; \
	    tried="$$tried $$python ($$($$python --version 2>&1))"; \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || continue; \
	    if ! "$$python" -c 'import ensurepip, venv' 2> /dev/null; then \
	        echo "$$python cannot make virtual environments: its venv module is missing. On Debian and Ubuntu:" \
	             "apt install python3-venv" >&2; exit 2; \
	    fi; \
	    echo "Making $(VENV) with $$python ($$("$$python" --version))"; \
	    "$$python" -m venv --clear $(VENV) && touch $@; exit; \
	done; \
	echo "ddiff needs Python 3.11 or newer. Found:$${tried:- none}." \
	     "Install one, or name it: make run PYTHON=/path/to/python3.12" >&2; exit 2
