# From nothing but python3, make and a package index:
#   make quickstart   environment, sample text, a small energy-based world model trained on it, a report
#   make quickstart-video    the same for video, on three short real clips
#   make quickstart-reasoning    the same for mazes, made here: a model that thinks, and whether it pays
#   make quickstart-world    the same for a world, recorded here: imagined under what is done, and planned in
#   make lint         environment and every check that reads code: format, lint, types, import rule, spelling
#   make lock         requirements/test.lock, the versions of a whole test environment
#   make docs         the documentation and its reference, as pages in site/
#   make test         environment and every test that this machine can run, in WORKERS processes of one thread each
#                     (one more than two cores: some wait for Slurm, for a signal or for a disk); what fails runs once more, alone
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUNS   ?= runs
DATA   ?= data
WORKERS ?= 3
# What failed beside other tests runs once more, alone. A machine that stalls can fail tests of several
# processes, signals and time-outs; a defect fails twice. Both summaries stay in the output.
ALONE   = echo "make test: once more, alone, what failed beside other tests"; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(HANGS) --last-failed --last-failed-no-failures none -v
# A test that hangs fails after so many seconds. The longest takes about two minutes.
HANGS   = --timeout 600
# The versions to install; another file for another PyTorch.
CONSTRAINTS ?= constraints.txt

.PHONY: quickstart quickstart-video quickstart-reasoning quickstart-world lint docs test soak lock clean
.DEFAULT_GOAL := quickstart

quickstart: $(VENV)/.installed
	@$(BIN)/python tools/quickstart.py text --runs "$(RUNS)" --data "$(DATA)"

quickstart-video: $(VENV)/.installed-video
	@$(BIN)/python tools/quickstart.py video --runs "$(RUNS)" --data "$(DATA)"

quickstart-reasoning: $(VENV)/.installed
	@$(BIN)/python tools/quickstart.py reasoning --runs "$(RUNS)" --data "$(DATA)"

quickstart-world: $(VENV)/.installed-world
	@$(BIN)/python tools/quickstart.py world --runs "$(RUNS)" --data "$(DATA)"

lint: $(VENV)/.installed-lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/codespell
	@$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.installed-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "site/index.html"

test: $(VENV)/.installed-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(HANGS) -n $(WORKERS) --dist loadscope --no-loadscope-reorder || \
		{ code=$$?; test $$code -eq 1 || exit $$code; $(ALONE); }

soak: $(VENV)/.installed-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder -m "soak or not soak"

# The versions of a whole test environment, made anew: requirements/test.lock
lock:
	@rm -rf $(VENV).lock
	@$(MAKE) --no-print-directory VENV=$(VENV).lock $(VENV).lock/.installed-test
	@sed -n '/^#/p' requirements/test.lock > requirements/.test.lock
	@$(VENV).lock/bin/python -m pip freeze --exclude-editable | sed -e '/^#/d' -e 's/+cpu$$//' >> requirements/.test.lock
	@mv requirements/.test.lock requirements/test.lock
	@rm -rf $(VENV).lock

$(VENV)/.installed: setup.py $(CONSTRAINTS)
	@echo "ebwm_scale: installing PyTorch, DeepSpeed and the rest into $(VENV) (1 to 3 minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c "$(CONSTRAINTS)" setuptools wheel torch numpy ninja
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c "$(CONSTRAINTS)" --editable .
	@touch $@

$(VENV)/.installed-video: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c "$(CONSTRAINTS)" --editable ".[video]"
	@touch $@

$(VENV)/.installed-world: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c "$(CONSTRAINTS)" --editable ".[world]"
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed-test
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c "$(CONSTRAINTS)" --editable ".[lint]"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c "$(CONSTRAINTS)" --editable ".[docs]"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c "$(CONSTRAINTS)" --editable ".[test,tracking,video,cluster]"
	@touch $@

clean:
	rm -rf $(VENV) build site *.egg-info
