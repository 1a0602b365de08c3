# Everything runs in .venv, which is made from nothing but Python 3.11 or newer and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
CALLER := $(PWD)
TIMES ?= 20

export DATA
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# What belongs to another environment must not reach into this one.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test notebooks fuzz lint docs lock clean

define CHECK_PYTHON
@command -v "$(PYTHON)" > /dev/null || \
{ echo 'No $(PYTHON) found: install Python 3.11 or newer, or name one with make PYTHON=/path/to/python3' >&2; exit 1; }
@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
{ echo "router-ml needs Python 3.11 or newer, and $(PYTHON) is $$("$(PYTHON)" -V 2>&1): name a newer one with" \
  'make PYTHON=/path/to/python3' >&2; exit 1; }
endef

help: ## this list
	@awk -F ' *## *' '/^[a-z-]+:.*## / { sub(":.*", "", $$1); printf "  make %-9s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## make .venv and install router-ml[train,serve,notebooks,dev] at the versions of requirements.lock

demo: $(STAMP) ## the whole path: a log, training, MLflow, the service, routed requests [DATA=outcomes.parquet]
	@if [ -n "$$DATA" ] && [ ! -e "$$DATA" ] && [ -e "$(CALLER)/$$DATA" ]; then DATA="$(CALLER)/$$DATA"; fi; \
	$(BIN)/router-ml demo $${DATA:+--data "$$DATA"}

test: $(STAMP) ## the whole test suite [ARGS="-k name"]
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

notebooks: $(STAMP) ## the notebooks for data scientists, in Jupyter [ARGS=--no-browser]
	@$(BIN)/jupyter lab --ServerApp.root_dir=notebooks $(ARGS)

fuzz: $(STAMP) ## the fuzzers at length: TIMES the examples that make test tries [TIMES=20]
	@ROUTER_ML_FUZZ="$(TIMES)" nice $(BIN)/python -m pytest --timeout 0 tests/test_fuzz.py tests/test_fuzz_policy.py $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

docs: $(STAMP) ## write docs/api.md and docs/cli.md anew from the code
	$(BIN)/python docs/reference.py

lock: ## resolve the newest versions afresh and write them to requirements.lock
	$(CHECK_PYTHON)
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && \
	"$(PYTHON)" -m venv "$$tmp/venv" && \
	"$$tmp/venv/bin/python" -m pip install '.[train,serve,notebooks,dev]' && \
	"$$tmp/venv/bin/python" -m pip freeze --exclude router-ml > "$$tmp/freeze" && \
	{ echo '# The versions that router-ml is tested with, for pip -c. Written by `make lock`.'; \
	  sed -E '/ @ |^-e /d; s/\+[A-Za-z0-9.]+$$//' "$$tmp/freeze"; } > requirements.lock.new && \
	mv requirements.lock.new requirements.lock

clean: ## remove .venv and the tools' caches (logs, bundles and registries stay)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp holds the folder that .venv was made in: an environment that was moved, or has lost its interpreter, is stale.
ifneq ($(shell cat $(STAMP) 2>/dev/null)|$(shell test -x $(BIN)/python && echo ok),$(CURDIR)|ok)
.PHONY: $(STAMP)
endif

$(STAMP): pyproject.toml requirements.lock
	@if [ -e $@ ] && [ "$$(cat $@)" != "$(CURDIR)" ]; then rm -rf $(VENV); fi; rm -f $@
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || rm -rf $(VENV)
	$(CHECK_PYTHON)
	@test -d $(VENV) || "$(PYTHON)" -m venv $(VENV) || \
	{ rm -rf $(VENV); echo 'Python could not make .venv; on Debian and Ubuntu it needs: apt-get install python3-venv' >&2; exit 1; }
	@echo 'Installing router-ml and its libraries into $(VENV): one to four minutes, about 2.7 GB with torch ...'
	@install() { $(BIN)/python -m pip install -c requirements.lock -e '.[train,serve,notebooks,dev]' || rm -f $@.new; }; \
	printf '%s' "$(CURDIR)" > $@.new; \
	if [ -t 1 ]; then install; else install | awk \
	  '/^Collecting / && ++n % 25 == 0 { print "  " n " packages found"; fflush() } \
	   /^Installing collected/ { print "  installing"; fflush() }'; fi; \
	mv $@.new $@ 2> /dev/null || \
	{ echo 'The installation failed (see above); the same command tries again, make clean starts afresh.' >&2; exit 1; }
	@echo 'Installed.'
