# Everything a newcomer needs: `make demo`, `make test`. Every target makes its own environment first.
# PYTHON: the interpreter that makes the environment. ENV: where it lies. Set ENV_PYTHON to use an environment of your own.
PYTHON ?= python3
ENV ?= .venv
ENV_PYTHON ?= $(ENV)/bin/python
RUN = PYTHONPATH=src $(ENV_PYTHON)

.PHONY: demo test check soak bench bench-engine bench-gpu bench-page bench-ctas kill-rounds sanitize fuzz test-gpu test-ring setup corpus hook-cost kernel-limits start-cost clean

setup:
	@$(if $(filter $(ENV)/bin/python,$(ENV_PYTHON)),sh scripts/setup.sh $(PYTHON) $(ENV),true)

demo: setup
	$(RUN) demo/demo.py $(ARGS)

check: setup
	$(RUN) -m ruff check src tests demo benchmarks examples
	$(RUN) -m mypy
	PYTHONPATH=src $(dir $(ENV_PYTHON))lint-imports

test: check
	$(RUN) -m pytest -q $(ARGS)

# make soak N=100 SECONDS=3600: at least N faults or SECONDS of them, whichever comes first
N ?= 100
SECONDS ?= 3600
soak: setup
	$(RUN) benchmarks/soak.py --faults $(N) --seconds $(SECONDS) $(ARGS)

bench: setup
	$(RUN) benchmarks/cost.py $(ARGS)

# ARGS="--only delta append": these parts alone
bench-gpu: setup
	$(RUN) benchmarks/device_runtime.py $(ARGS)
ifeq ($(filter --only%,$(ARGS)),)
	$(RUN) benchmarks/residency.py
	$(RUN) benchmarks/swap_storm.py --device cuda:0 --output benchmarks/results/device_runtime_h200.json
endif
	-$(RUN) benchmarks/plot.py
	$(RUN) benchmarks/table.py

# pictures and table of docs/benchmarks.md, from the committed results; needs no GPU
bench-page: setup
	$(RUN) benchmarks/plot.py
	$(RUN) benchmarks/table.py

# rates by number of CTAs, parking: ARGS="--ctas 1 4 8"
bench-ctas: setup
	$(RUN) benchmarks/gpu.py $(ARGS)

# needs vLLM for GPUs; ARGS="--only slope peer driver" for the other parts, ARGS="-- FLAGS" go to vLLM
bench-engine: setup
	$(RUN) benchmarks/engine.py --only cost recovery $(ARGS)

# make kill-rounds N=1000: writers killed during append, on the first GPU, else on the CPU device
kill-rounds: setup
	$(RUN) benchmarks/kill_rounds.py --rounds $(N) --seconds $(SECONDS) $(ARGS)

# all kernels under compute-sanitizer, which comes with CUDA's toolkit
sanitize: setup
	$(RUN) benchmarks/sanitize.py $(ARGS)

# parsers of GPU images, cache files and requests: make fuzz SECONDS=1800
fuzz: setup
	$(RUN) benchmarks/fuzz_images.py --seconds $(SECONDS) $(ARGS)

# hooks in all kernels for sm_90 of libraries, without a GPU: ARGS="WHEEL LIBRARY CUBIN ...", else of what is installed
corpus: setup
	$(RUN) benchmarks/instrument_corpus.py $(ARGS)

# what a hook adds to a small kernel, on the first GPU
hook-cost: setup
	$(RUN) benchmarks/hook_cost.py $(ARGS)

# what plain kernels read, hash and store, beside which the runtime's figures stand, on the first GPU
kernel-limits: setup
	$(RUN) benchmarks/kernel_limits.py $(ARGS)

# what `concordia run` adds to a start, without a GPU
start-cost: setup
	$(RUN) benchmarks/start_cost.py $(ARGS)

test-gpu: setup
	$(RUN) -m pytest -q -m gpu $(ARGS)

# Ten million tasks per build; a build has ten minutes. RESULTS: a file that is told what ran.
test-ring: setup
	CONCORDIA_STRESS_TASKS=10000000 CONCORDIA_STRESS_RESULTS=$(RESULTS) $(RUN) -m pytest -q tests/test_ring_native.py -k flooded $(ARGS)

clean:
	rm -rf $(ENV) demo-output soak-output .pytest_cache .mypy_cache .ruff_cache
