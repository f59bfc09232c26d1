# `make run` and `make test` set up a fresh machine: they create .venv with the first Python 3.11 or newer that they find,
# and install the dependencies into it. Later calls install nothing.
#
#   make run            train, evaluate and sample recipes/novels_small.toml
#   make run RECIPE=recipes/hdlm_small.toml SET="--set train.steps=200"
#   make test           the whole test suite, on two cores
#   make lint           ruff, mypy, import-linter
#   make docs           the site of the documentation in build/site; refuses broken links
#   make bench          cost of steps and samples, compared with a plain implementation; takes half an hour
#   make bench BENCH="--quick --only train"
#   make soak           kill runs at fifty random moments, resume them, and compare with uninterrupted runs
#   make serve-soak     send a thousand requests of 16 clients to `ddiff serve`, some of which are aborted
#   make fuzz           dry runs of a thousand mutated recipes, and short runs of some accepted recipes
#   make clean          remove .venv
#
# Variables: PYTHON=python3.12 selects the Python and VENV=elsewhere the folder; an empty CONSTRAINTS= permits any version
# of torch in place of the tested version.

RECIPE = recipes/novels_small.toml
SET =
PYTHON =
VENV = .venv
CONSTRAINTS = -c ci/constraints.txt
BENCH =
SOAK = --trials 50
SERVE_SOAK = --requests 1000 --clients 16
FUZZ = --recipes 1000 --runs 40

PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check $(CONSTRAINTS)

.PHONY: run test lint docs bench soak serve-soak fuzz install dev clean

run: install
	$(VENV)/bin/ddiff run $(RECIPE) $(SET)

# Environment of tests and checks: one thread for each of the two test processes, no requests to the Hugging Face hub or
# W&B, and no tokenizer threads in processes that fork. `make run` does not set these variables and uses all cores.
test lint soak serve-soak fuzz: export OMP_NUM_THREADS = 1
test lint soak serve-soak fuzz: export HF_HUB_OFFLINE = 1
test lint soak serve-soak fuzz: export WANDB_MODE = offline
test lint soak serve-soak fuzz: export TOKENIZERS_PARALLELISM = false

# One process runs all tests of a file, so that costly fixtures of modules are not set up twice. The files run in
# alphabetical order, which puts no long file last, so that neither process waits for the other one for long.
test: dev
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# The variable silences an advertisement of the theme.
docs: $(VENV)/.installed_docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

bench: install
	$(VENV)/bin/python benchmarks/bench $(BENCH)

soak: install
	$(VENV)/bin/python benchmarks/soak.py $(SOAK)

serve-soak: dev
	$(VENV)/bin/python benchmarks/serve_soak.py $(SERVE_SOAK)

fuzz: install
	$(VENV)/bin/python benchmarks/fuzz.py $(FUZZ)

install: $(VENV)/.installed
dev: $(VENV)/.installed_dev

clean:
	rm -rf $(VENV)

# The stamp file is written last, so that an interrupted installation is repeated.
$(VENV)/.installed: pyproject.toml ci/constraints.txt | $(VENV)/.made
	$(PIP) -e .
	@touch $@

$(VENV)/.installed_dev: pyproject.toml ci/constraints.txt | $(VENV)/.made
	$(PIP) -e ".[dev]"
	@touch $(VENV)/.installed $@

$(VENV)/.installed_docs: pyproject.toml ci/constraints.txt | $(VENV)/.made
	$(PIP) -e ".[docs]"
	@touch $(VENV)/.installed $@

# A working environment without the stamp was made by hand: it may have another torch, so it is neither cleared nor changed.
$(VENV)/.made:
	@if $(VENV)/bin/python -m pip --version > /dev/null 2>&1; then \
	    echo "$(VENV) was not made by make, so make leaves it as it is. Name another folder for make: VENV=.venv-make." \
	         "To let make install into $(VENV), with the tested version of torch: touch $@. To remove it: make clean." >&2; \
	    exit 2; \
	fi; \
	for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python); do \
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
