# flyd: `make demo` shows it, `make test` proves it. Every target installs what it needs.
# Tools come from PyPI into .venv; apt is used only for what no wheel has, and only as root.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PY := .venv/bin/python
STAMP := .venv/.ready

.PHONY: help setup demo test lint proto bench clean unit simulation conformance integration docker

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

test: lint unit simulation conformance integration  ## everything that CI runs

unit: $(STAMP)  ## pure code and tidy rules
	.venv/bin/pytest tests/unit tests/test_tidy.py

simulation: $(STAMP)  ## seeded worlds with faults
	.venv/bin/pytest tests/simulation

conformance: $(STAMP)  ## the same suite against each fake and the real thing
	.venv/bin/pytest tests/conformance

integration: $(STAMP)  ## real etcd, Envoy and Postgres; regions die
	.venv/bin/pytest integration --ignore=integration/docker

docker: $(STAMP)  ## hosts in containers: partitions, lost hosts, images, the mesh (needs a Docker engine)
	.venv/bin/pytest integration/docker

proto: $(STAMP)  ## generate flyd/v1 from proto/
	./scripts/proto.sh

bench: $(STAMP)  ## each bench/NAME prints how it measured and one line of JSON
	for bench in bench/idle.py bench/startup.py bench/failover.py bench/docker_machine.py; do $(PY) $$bench; done

clean:  ## remove what make made (clusters: `fly cluster down`)
	rm -rf .venv .tools build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
