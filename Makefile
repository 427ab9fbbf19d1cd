# `make help` lists all verbs.
#
# Dependencies (torch alone takes 4.7 GB) are installed outside the checkout, into one virtual environment per Python version
# and content of constraints.txt. The .venv of the checkout only points there, so clones share the download. Hashes are in
# requirements/development.lock and no part of the key: they say which files are those versions, and change none of them.

SHELL := /bin/bash -o pipefail
.DEFAULT_GOAL := help
# The newest Python that works. A command may exist and fail: pyenv has one for every version, also for unselected ones.
ifndef PYTHON
PYTHON := $(shell for name in python3.13 python3.12 python3.11; do $$name -c "import ensurepip" 2>/dev/null && echo $$name && break; done)
endif
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/updraft
KEY := $(shell { cat constraints.txt; $(PYTHON) -c 'import sys; print(sys.version, sys.prefix)' 2>/dev/null; } | sha256sum | cut -c1-16)
DEPS := $(CACHE)/deps-$(KEY)
PY := .venv/bin/python
# Tests run on two workers: each file on one of them, and one torch thread per worker. Use ARGS="-n 0" with a debugger.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --dist loadfile --no-loadscope-reorder -n 2
SOURCES := proto libs services operator cli tests tools bench hatch_build.py
KERNELS := hatch_build.py $(wildcard services/inference/updraft_kernels/*.cpp services/inference/updraft_kernels/*.h)
# A file beside the libraries that hatch_build.py has npm install for the console's pages.
LIBRARIES := cli/updraft_cli/ui/static/vendor/lock.sha256
ARGS ?=
CHECK_PYTHON = $(or $(PYTHON),false) -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || { \
	  echo "Updraft needs Python 3.11, 3.12 or 3.13 with its venv module. Install one, or run: make PYTHON=/path/to/python3"; exit 1; }
# The documentation site is built in an environment of its own, one for each content of the list.
SITE_PINS := requirements/docs.lock
SITE := $(CACHE)/site-$(notdir $(PYTHON))-$(shell cat $(SITE_PINS) 2>/dev/null | sha256sum | cut -c1-16)

.PHONY: help
help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  \033[1m%-22s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: install
install: .venv/ready ## Install everything (once; about 3 minutes, 6 GB in ~/.cache/updraft)

$(DEPS)/ready: constraints.txt
	@$(CHECK_PYTHON)
	@mkdir -p $(CACHE)
	@exec 9>$(DEPS).lock; flock 9; test -f $@ || { \
	  echo "Installing pinned dependencies into $(DEPS) (once; mostly torch) ..."; \
	  rm -rf $(DEPS) && $(PYTHON) -m venv $(DEPS) \
	  && $(DEPS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/development.lock \
	  && touch $@; }

.venv/$(KEY): $(DEPS)/ready
	@rm -rf .venv && $(PYTHON) -m venv .venv
	@deps=$$($(DEPS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	 here=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	 echo "import site; site.addsitedir('$$deps')" > $$here/updraft-dependencies.pth
	@touch $@

# These verbs install again if there is an npm by now, but no libraries. Other verbs do without, so an npm that fails costs once.
ifneq ($(filter install browser,$(MAKECMDGOALS)),)
.venv/ready: $(if $(shell command -v npm),$(LIBRARIES))
$(LIBRARIES): ;
endif

.venv/ready: .venv/$(KEY) pyproject.toml $(KERNELS) cli/package-lock.json
	@command -v g++ >/dev/null || echo "g++ is not installed, so the engine will have no C++ kernels and be slower on a CPU."
	@command -v npm >/dev/null || echo "npm is not installed, so the pages of 'updraft ui' will not change by themselves."
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@test -e $(LIBRARIES) || ! command -v npm >/dev/null || { \
	  echo "npm did not install the libraries of the pages of 'updraft ui', so these will not change by themselves."; \
	  echo "'make install' tries again; '$(PY) -m pip install -v --no-deps --no-build-isolation -e .' prints why."; }
	@touch $@

.PHONY: demo
demo: export UPDRAFT_DEMO_STARTED := $(shell date +%s)
demo: install ## Run the loop on this machine and write a report (about 10 minutes)
	$(PY) -m updraft_cli demo $(ARGS)

.PHONY: up
up: install ## Start Redis, registry, trainer, inference and console here; Ctrl-C stops them
	$(PY) -m updraft_cli up $(ARGS)

.PHONY: test
test: check docs test-integration test-cluster test-browser ## All tests except those on real SGLang and vLLM servers, which CI runs afterwards

.PHONY: check
check: install ## Format, lint, types, architecture, generated files, unit tests
	@$(MAKE) --no-print-directory --jobs=2 test-unit fmt-check lint type arch gen-check

.PHONY: fmt
fmt: install ## Format the code and the protos
	$(PY) -m ruff format -q $(SOURCES) && $(PY) -m ruff check -q --fix-only $(SOURCES); $(DEPS)/bin/buf format -w proto

.PHONY: fmt-check
fmt-check: install ## Check the format
	$(PY) -m ruff format -q --check $(SOURCES) && $(DEPS)/bin/buf format --diff --exit-code proto

.PHONY: lint
lint: install ## Run ruff and buf, find unused or undeclared dependencies
	$(PY) -m ruff check -q $(SOURCES)
	$(DEPS)/bin/buf lint
	$(PY) -m deptry . 2>&1 | { grep -v -e "^Scanning" -e Success || true; }

.PHONY: type
type: install ## Run mypy --strict on packages and tests
	$(PY) -m mypy

.PHONY: arch
arch: install ## Check the import rules in pyproject.toml
	$(PY) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()' | tail -n 4

.PHONY: gen
gen: install ## Regenerate protobuf code and reference pages
	$(PY) -m tools.generated

.PHONY: gen-check
gen-check: install ## Check that generated files are up to date
	@$(PY) -m tools.generated --check

.PHONY: docs docs-serve
docs: $(SITE)/ready ## Build the documentation site into site/html; needs no `make install` (once: 140 MB; 20 seconds)
	@$(SITE)/bin/python -m tools.docsite

docs-serve: $(SITE)/ready ## Show the site on 127.0.0.1:8765 and follow changes of the pages
	@$(SITE)/bin/python -m tools.docsite serve

$(SITE)/ready: $(SITE_PINS)
	@$(CHECK_PYTHON)
	@mkdir -p $(CACHE)
	@exec 9>$(SITE).lock; flock 9; test -f $@ || { \
	  rm -rf $(SITE) && $(PYTHON) -m venv $(SITE) \
	  && { timeout 240 $(SITE)/bin/python -m pip install --quiet --disable-pip-version-check --retries 1 --no-deps \
	    --require-hashes -r $(SITE_PINS) 2> $(SITE).log || { \
	    echo "pip could not install the packages of the documentation site within 4 minutes: $$(tail -n 1 $(SITE).log)"; exit 1; }; } \
	  && touch $@; }

.PHONY: pictures
pictures: install ## Draw the pictures and charts of the docs
	$(PY) -m tools.pictures

.PHONY: lock
lock: install ## Write requirements/*.lock: pins with the hashes of their files
	$(PY) -m tools.locks

.PHONY: sbom
sbom: install ## Write a CycloneDX bill of materials of each image to dist/sbom
	$(PY) -m tools.sbom $(ARGS)

.PHONY: test-unit
test-unit: install ## Fast tests
	$(PYTEST) tests/unit $(ARGS)

.PHONY: fuzz
fuzz: install ## Run the property tests with new examples (15 minutes; other runs always use the same ones)
	$(PY) -m pytest tests/unit tests/integration/inference --hypothesis-profile=explore --timeout=3600 -m hypothesis $(ARGS)

.PHONY: bucket-server
bucket-server: install ## Build the S3 server that tests start (once, with Go; 2 minutes, 45 MB in ~/.cache/updraft)
	@$(PY) -m tools.s3_server

.PHONY: test-integration
test-integration: install bucket-server ## Real Redis, real gRPC, a real bucket, the real model, whole processes
	$(PYTEST) tests/contract tests/integration tests/e2e $(ARGS)

.PHONY: cluster-build cluster-up cluster-down
cluster-build: install ## Build a real Kubernetes, a Prometheus and other projects' controllers for tests (once; 25 to 40 minutes)
	$(PY) -m tests.cluster build
	$(PY) -m tests.chart.go_program
cluster-up: install ## Start a node here (needs root; once 10 to 20 minutes for Kubernetes) and print how to reach it
	$(PY) -m tests.cluster build
	$(PY) -m tests.cluster up
cluster-down: install ## Stop that node and remove its files
	$(PY) -m tests.cluster down

.PHONY: test-cluster
test-cluster: cluster-build ## CRDs, operator, chart, images and the tour on a real Kubernetes (without root: what needs no node)
	$(PYTEST) tests/chart tests/cluster $(ARGS)

.PHONY: sglang-build test-sglang
sglang-build: install ## Build a stock SGLang for tests into the cache (once; 1 to 3 minutes, 0.5 GB)
	@$(PY) -m tests.sglang.build
test-sglang: sglang-build ## The adapter and its plugin on a real SGLang server on this CPU (15 minutes)
	$(PYTEST) tests/sglang $(ARGS)

.PHONY: vllm-build test-vllm
vllm-build: install ## Install stock vLLM for a CPU into the cache (once; 3 to 7 minutes, 6 GB)
	@$(PY) -m tests.vllm.build
test-vllm: vllm-build ## The plugin and published drafts in a real vLLM server on this CPU (10 minutes)
	$(PYTEST) tests/vllm $(ARGS)

.PHONY: browser test-browser screenshots
browser: install ## Install Chromium, Selenium and axe-core for tests of the console (once; as root on Debian; about 400 MB)
	@$(PY) -m tests.browser.build
test-browser: install ## The console in a real Chromium; tests are skipped, with the reason, where there is none (3 minutes)
	@$(PY) -m tests.browser.build --for-tests
	$(PYTEST) tests/browser $(ARGS)
screenshots: browser ## Take the pictures of the console for the docs (2 minutes)
	$(PY) -m tests.browser.screenshots $(ARGS)

BENCHES := swap capture memory gate fleet delta width kill console serving learning learning-mixture trainer sglang tap \
  operator faults trust
.PHONY: $(BENCHES:%=bench-%)
bench-swap: install ## Measure what a hot swap costs (5 minutes)
	$(PY) -W ignore -m bench.swap.swap $(ARGS)
bench-trust: install ## Measure what Redis users and TLS cost on the way of traces (3 minutes)
	$(PY) -m bench.trust.trust $(ARGS)
bench-rotation: install ## Renew certificates and tokens every ten seconds under load, and count what fails (6 minutes)
	$(PY) -m bench.trust.rotation $(ARGS)
bench-capture: install ## Measure what capture costs (5 minutes)
	$(PY) -m bench.capture.capture $(ARGS)
bench-memory: install ## Measure resident memory over 1,000 requests (40 minutes; ARGS=--requests=100 for a shorter run)
	$(PY) -m bench.memory.memory $(ARGS)
bench-gate: install ## Simulate how often the live gate errs (12 minutes; ARGS=--quick: one)
	$(PY) -m bench.gate.gate $(ARGS)
bench-fleet: install ## Measure what 10, 100 and 1,000 pods cost a registry (6 minutes)
	$(PY) -m bench.fleet.fleet $(ARGS)
bench-delta: install ## Measure how many bytes a new version costs (12 minutes)
	$(PY) -m bench.delta.delta $(ARGS)
bench-width: install ## Measure versions and the data path at the width of an 8B target (hours; bench/width/README.md)
	$(PY) -W ignore -m bench.width.width $(ARGS)
bench-kill: install ## Kill the registry 200 times under pods and a publisher (10 minutes)
	$(PY) -m bench.kill.kill $(ARGS)
bench-console: browser ## Measure the console with 1,000 pods and 200 versions in a real Chromium (5 minutes)
	$(PY) -m bench.console.console $(ARGS)
bench-serving: install ## Compare the built-in engine with transformers, vLLM and itself without drafts (1 hour; ARGS=--quick: 5)
	$(PY) -W ignore -m bench.serving $(ARGS)
bench-learning: install ## Compare how drafts learn from recorded traffic (hours; see bench/learning/README.md)
	$(PY) -m bench.learning.learning $(ARGS)
bench-learning-mixture: install ## Measure what draft and n-gram lookup are worth in one chain (10 minutes)
	$(PY) -m bench.learning.mixture $(ARGS)
bench-trainer: install ## Measure memory, speed and exactness of a training step (30 minutes; ARGS=--only=speed: 3)
	$(PY) -W ignore -m bench.trainer.trainer $(ARGS)
bench-sglang: sglang-build ## Measure what the plugin and swaps cost a stock SGLang server on this CPU (35 minutes)
	$(PY) -m bench.sglang.sglang $(ARGS)
bench-tap: vllm-build ## Measure what the plugin and swaps cost a stock vLLM server on this CPU, and the loop (55 minutes)
	$(PY) -m bench.tap.tap $(ARGS)
bench-operator: cluster-build ## Measure the operator with 1,000 resources and 4,000 pods (10 minutes)
	$(PY) -m bench.operator.operator $(ARGS)
bench-faults: cluster-build ## Run the operator through ten minutes of faults (12 minutes)
	$(PY) -m bench.faults.faults $(ARGS)

.PHONY: clean
clean: ## Remove build output from the checkout, but not the cache
	rm -rf services/inference/updraft_kernels/*.so cli/updraft_cli/ui/static/vendor .venv .mypy_cache .ruff_cache .pytest_cache bench/results site
