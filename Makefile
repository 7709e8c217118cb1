# Two commands matter: `make demo` shows Switchboard at work, `make test` proves it. Each sets up what it needs.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Two for each processor: a good part of a test is waiting. What takes long wants processors of its own.
WORKERS ?= $(if $(LARGE),2,$(shell expr $$(getconf _NPROCESSORS_ONLN) \* 2))

.PHONY: setup demo test faults check bench format lock clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Switchboard needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup ## Start everything, watch one call; ONCE=1 leaves when it has completed, APPROVAL=1 shows the Public API
	$(BIN)/switchboard demo $(if $(ONCE),--once) $(if $(APPROVAL),--approval)

# Which lines run is looked at where changes are judged: it takes a good part of the time.
COVER := $(if $(COVERAGE),-p pytest_cov.plugin --cov --cov-report=term)

# Even where it is not wanted elsewhere: otherwise each worker, and each process that a test starts, compiles all of it.
test: export PYTHONDONTWRITEBYTECODE :=

test: setup ## The tests, in parallel, against real PostgreSQL and Valkey; COVERAGE=1 wants 95 % of the branches, LARGE=1 instead what takes long: millions of rows, a service that is broken on purpose, EXAMPLES=100 with a hundred times the hostile input
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(COVER) $(if $(LARGE),-m large) $(ARGS)

faults: setup ## Break everything at random and see that nothing is lost: MINUTES=20, SEED="1 2" or SEEDS=5, VARIANT= breaks it on purpose
	$(BIN)/python -m tests.faults $(if $(MINUTES),--minutes $(MINUTES)) $(SEED:%=--seed %) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(VARIANT),--variant "$(VARIANT)")

check: setup ## Lint, format, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup ## Measure it beside others and write benchmarks/RESULTS.md; QUICK=1 in two minutes, ONLY="callbacks fanout" a part
	$(BIN)/python -m benchmarks

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-strip-extras

lock: ## Resolve the dependencies anew: all of them, those of the image, and what builds the wheel in it
	$(COMPILE) --upgrade --extra embedded --extra dev --extra otel pyproject.toml -o requirements.lock
	$(COMPILE) --constraints requirements.lock --extra otel pyproject.toml -o requirements.production.lock
	echo hatchling | $(COMPILE) --constraints requirements.lock - -o requirements.build.lock

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* htmlcov dist
