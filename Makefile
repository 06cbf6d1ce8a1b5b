# What a person does here: `make demo`, `make test`. Everything that they need is installed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test property check soak bench chaos guard kills fuzz ring level5 cities region published proto lock sbom audit system clean

demo: $(INSTALLED)  ## the whole story: an earthquake through four cities' systems and a report
	$(BIN)/multitwin demo --out runs/demo

test: $(INSTALLED) system  ## the default tests, under ten minutes on two cores
	$(BIN)/pytest -n 2 --dist loadfile

published: $(INSTALLED)  ## the longer comparisons with published values
	$(BIN)/pytest -m published

property: $(INSTALLED)  ## at least 2,000 random federations against the sequential reference
	$(BIN)/pytest -m property --hypothesis-profile=thorough

check: $(INSTALLED) system  ## format, lint, types, import rules, contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf breaking --against protos/released.binpb
	$(BIN)/python -m tests.generated
	$(BIN)/hadolint k8s/Containerfile

region: $(INSTALLED)  ## the loop of level 5 over the region, live and in processes: two minutes
	$(BIN)/pytest -m long

soak: $(INSTALLED)  ## half an hour at 200 twins: memory, tasks, threads and sockets stay as they are
	$(BIN)/python -m tests.soak

ring: $(INSTALLED)  ## ten minutes of three cities in a ring whose lines fail at random; one JSON line
	$(BIN)/python -m tests.ring

bench: $(INSTALLED)  ## the federation beside HELICS and mosaik on the same work, 15 minutes on two idle cores
	$(BIN)/python -m benchmarks.federation

chaos: $(INSTALLED)  ## break a federation in 500 ways; one JSON line says how it took them
	$(BIN)/python -m tests.chaos

kills: $(INSTALLED)  ## kill who brings a bundle to four twins 200 times, after every message
	$(BIN)/python -m tests.kills

guard: $(INSTALLED)  ## 10,000 hostile plans and 200 kills against what acts; one JSON line says what got through
	$(BIN)/python -m tests.hostile

fuzz: $(INSTALLED)  ## a million odd inputs for every decoder, 100,000 odd RPCs; one JSON line
	$(BIN)/python -m tests.fuzz

level5: $(INSTALLED)  ## the closed loop beside an open plan and plain rules, 200 paired runs a scenario
	$(BIN)/python -m benchmarks.level5

cities: $(INSTALLED)  ## an earthquake in one city, aid from the other, over a line that is cut or not: ten minutes
	$(BIN)/python -m benchmarks.cities

PROTOS := $(wildcard protos/federation/v1/*.proto)

proto: $(INSTALLED)  ## generate federation/v1 from the protos
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -I protos --python_out=. --grpc_python_out=. \
		--mypy_out=. --mypy_grpc_out=. $(PROTOS)

lock:  ## resolve the dependencies anew and lock them with hashes
	uv pip compile --universal --python-version 3.11 --all-extras --group dev --generate-hashes \
		--no-emit-index-url --no-header --quiet pyproject.toml -o requirements.txt

$(INSTALLED): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --require-hashes -r requirements.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

sbom: $(INSTALLED)  ## what all of it is made of, with hashes, as CycloneDX in build/sbom.json
	mkdir -p build
	$(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible -o build/sbom.json requirements.txt

audit: $(INSTALLED)  ## ask the public data base of vulnerabilities about every locked package
	$(BIN)/pip-audit --require-hashes --disable-pip -r requirements.txt

system:  ## Debian packages that the tests use: a browser, its driver, kubectl and PostgreSQL
	@missing=""; \
	command -v chromium >/dev/null || missing="$$missing chromium"; \
	command -v chromedriver >/dev/null || missing="$$missing chromium-driver"; \
	command -v kubectl >/dev/null || missing="$$missing kubernetes-client"; \
	ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="$$missing postgresql"; \
	if [ -n "$$missing" ]; then apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; fi

clean:
	rm -rf .venv runs build *.egg-info
