# Everything here sets itself up in .venv; all it needs is Python 3.10 or newer, make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0

.PHONY: demo test lint bench soak gpu clean

demo: $(VENV)/.ready
	$(BIN)/happyhorse generate --preset pony --prompt "a red circle bounces slow on a teal background ." --out happyhorse.mp4

test: $(VENV)/.ready-test
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(PYTEST_ARGS)

bench: $(VENV)/.ready-test
	$(BIN)/python benchmarks/transformer_speed.py
	$(BIN)/python benchmarks/load_memory.py
	$(BIN)/python benchmarks/decode_memory.py

soak: $(VENV)/.ready-test
	$(BIN)/python benchmarks/soak.py

gpu: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m gpu tests/test_gpu.py

clean:
	rm -rf $(VENV)

$(VENV)/.ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq $(TORCH)
	$(BIN)/python -m pip install -qq --editable .
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(BIN)/python -m pip install -qq --editable ".[test]"
	touch $@
