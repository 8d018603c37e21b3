# Needs make and a Python >= 3.11 that can make virtual environments; everything else is installed into .venv.
# Override: make test PYTHON=python3.12 VENV=/elsewhere/venv PYTEST_ARGS="-k clip"
.DEFAULT_GOAL := help
.SHELLFLAGS := -eu -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules --no-print-directory

# The first interpreter that is new enough and brings venv and pip with it.
USABLE := import sys, venv, ensurepip; assert sys.version_info >= (3, 11); print(sys.executable)
ifndef PYTHON
PYTHON := $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell $(name) -c '$(USABLE)' 2>/dev/null)))
endif
VENV ?= .venv
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check --no-input --quiet -c constraints.txt
PYTEST := $(PY) -m pytest
SPREAD := OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile
PROOFS := build/proofs.json
FAST := not slow and not gpu and not network
STAMPS := $(VENV)/stamps
VERSION := $(shell $(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null)
PACKAGES := fonts-noto-color-emoji fonts-symbola unicode-cldr-core libcairo2 \
	fonts-unifont fonts-dejavu-core fonts-freefont-ttf
SIMULATORS := libegl1 libegl-mesa0 libgl1-mesa-dri libgles2 libopengl0 chromium
VOICES := espeak-ng flite libfluidsynth3 timgm6mb-soundfont

say = @echo "== $(1)"

.PHONY: help demo test check test-all bench docs lint format packages clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

demo: $(STAMPS)/demo ## install, index a folder of pictures, find them by words
	$(call say,System packages that the demo draws its pictures from)
	@sh tools/system_packages.sh $(PACKAGES)
	$(call say,polymodal demo)
	@$(VENV)/bin/polymodal demo

check: lint ## format, lint, types and the fast tests: under 3 minutes
	$(call say,Fast tests: units and contracts)
	@$(SPREAD) tests/unit tests/contracts -m "$(FAST)" $(PYTEST_ARGS)

test: lint packages ## what CI runs: everything but the slow proofs, and docs/systems.md against the results
	$(call say,Tests: everything that is not marked slow)
	@rm -f $(PROOFS)
	@$(SPREAD) -m "not slow" --proofs $(PROOFS) $(PYTEST_ARGS)
	$(call say,docs/systems.md says what these tests have shown)
	@$(PY) -m tools.systems_doc --check $(PROOFS)

test-all: lint packages ## the same and the slow proofs: retrains the nano models
	$(call say,Tests: all of them)
	@rm -f $(PROOFS)
	@$(PYTEST) --proofs $(PROOFS) $(PYTEST_ARGS)
	$(call say,docs/systems.md says what these tests have shown)
	@$(PY) -m tools.systems_doc --check $(PROOFS)

docs: $(STAMPS)/dev ## write docs/systems.md from the results of the last `make test` or `make test-all`
	$(call say,docs/systems.md from $(PROOFS))
	@$(PY) -m tools.systems_doc $(PROOFS)

bench: $(STAMPS)/dev packages ## every benchmark: a table here, figures in benchmarks/results/
	@for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(PY) -m benchmarks.$$(basename $$file .py); done

lint: $(STAMPS)/dev
	$(call say,ruff: format and lint)
	@$(PY) -m ruff format --check --quiet .
	@$(PY) -m ruff check --quiet .
	$(call say,mypy)
	@$(PY) -m mypy

format: $(STAMPS)/dev ## let ruff format and fix what it can
	@$(PY) -m ruff check --fix --quiet . || true
	@$(PY) -m ruff format --quiet .

packages: # tests that need a missing package are skipped by name
	$(call say,System packages that tests need)
	@sh tools/system_packages.sh $(PACKAGES) $(SIMULATORS) $(VOICES) || true

clean: ## remove .venv, caches and everything built or run here
	$(call say,Removing $(VENV)$(comma) caches$(comma) build/ dist/ demo/)
	@rm -rf $(VENV) build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for the environment (a new Python makes a new one) and one for each set of packages in it.
$(STAMPS)/python-$(VERSION):
	@if [ -z "$(VERSION)" ]; then \
	  echo "No Python >= 3.11 with the venv and ensurepip modules was found (PYTHON=$(PYTHON))."; \
	  echo "Debian and Ubuntu: apt-get install python3.11-venv. Or name one: make PYTHON=/path/to/python3.11"; exit 1; fi
	$(call say,$(VENV): a virtual environment of Python $(VERSION))
	@if [ "$$($(PY) -c 'import platform$(semicolon) print(platform.python_version())' 2>/dev/null)" != "$(VERSION)" ]; then \
	  "$(PYTHON)" -m venv --clear "$(VENV)"; fi
	@rm -rf $(STAMPS) && mkdir -p $(STAMPS) && touch $@

$(STAMPS)/demo: $(STAMPS)/python-$(VERSION) pyproject.toml constraints.txt
	$(call say,Installing polymodal[search$(comma)worlds]: a few minutes the first time)
	@$(PIP) -e '.[search,worlds]'
	@touch $@

$(STAMPS)/dev: $(STAMPS)/python-$(VERSION) pyproject.toml constraints.txt
	$(call say,Installing polymodal[dev]: a few minutes the first time)
	@$(PIP) -e '.[dev]'
	@# References of the tests, without what they ask for: torchvision and timm; dm-tree.
	@$(PIP) --no-deps open_clip_torch openpi-client
	@touch $@ $(STAMPS)/demo

comma := ,
semicolon := ;
