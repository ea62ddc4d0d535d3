# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CACHE := .cache
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH):/usr/sbin:/sbin

.NOTPARALLEL:

.PHONY: help
help:
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: controller images ## a fleet of three vanishes, opens and vanishes again
	@demo/demo.sh

.PHONY: demo-clean
demo-clean: ## remove the demo's containers, network and files
	@python3 scripts/fleet.py down demo

.PHONY: test
test: tools images ## everything that can fail: unit, lint, sanity, network namespaces, Molecule, faults
	@python3 scripts/check.py unit lint sanity netns access molecule faults

.PHONY: unit lint sanity
unit: tools ## unit tests
	@python3 scripts/check.py $@
lint: tools ## ansible-lint, yamllint, ruff, mypy
	@python3 scripts/check.py $@
sanity: tools ## ansible-test sanity
	@python3 scripts/check.py $@

.PHONY: netns access molecule
netns: tools images ## the gate in network namespaces
	@python3 scripts/check.py $@
access: tools images ## the connection and the knock against real sshds
	@python3 scripts/check.py $@
molecule: tools images ## every scenario, or one: make molecule SCENARIO=default
	@python3 scripts/check.py $(if $(SCENARIO),molecule:$(SCENARIO),molecule)

.PHONY: faults
faults: tools images ## break the protection of a gate at every step of a run (takes more than an hour)
	@python3 scripts/check.py faults:full

.PHONY: bench bench-backends
bench: tools images ## what a run costs, as a ratio to Ansible's own floor, and bench-backends
	@python3 bench/bench.py
	@PYTHONPATH=$(CACHE):tests/netns python3 bench/backends.py
bench-backends: tools ## how soon, for how many and in what flood each back end opens
	@PYTHONPATH=$(CACHE):tests/netns python3 bench/backends.py

.PHONY: images
images: engine ## the test fleet's images
	@scripts/images.sh

.PHONY: clean
clean: ## remove every test fleet, the environment and the caches; images stay
	@! docker info >/dev/null 2>&1 || python3 scripts/fleet.py down
	@rm -rf .venv $(CACHE) .mypy_cache .pytest_cache .ruff_cache

.PHONY: clean-images
clean-images: ## remove the test fleet's images
	@scripts/images.sh clean

# What the targets above stand on.

.PHONY: packages packages-test
packages:
	@scripts/packages.sh demo
packages-test:
	@scripts/packages.sh test

.PHONY: engine
engine:
	@scripts/engine.sh

.PHONY: controller
controller: packages $(BIN)/.demo link
.PHONY: tools
tools: packages-test $(BIN)/.test link

.PHONY: link
link:
	@mkdir -p $(CACHE)/ansible_collections/fleet
	@ln -sfn ../../.. $(CACHE)/ansible_collections/fleet/portknock

$(BIN)/.demo $(BIN)/.test: $(BIN)/.%: requirements/%.txt requirements/demo.txt
	@scripts/venv.sh $*
	@touch $@
