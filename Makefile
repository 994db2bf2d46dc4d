# Everything here sets itself up: in .venv, and for the tests on ComfyUI in .venv-host.
# All it needs is Python 3.10 or newer, GNU make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# $COMFYUI_PATH, else the ComfyUI whose custom_nodes/ holds this folder, else ~/comfy/ComfyUI, else nothing
COMFYUI := $(shell $(PYTHON) tests/nodes/launch_host.py where 2>/dev/null)
HOST := .venv-host
HOST_PIP := $(HOST)/bin/python -m pip install -qq
SUMMARY := $(CURDIR)/$(VENV)/summary.txt
PYTEST := -m pytest -n auto
PONY := $(BIN)/happyhorse generate --preset pony
TALKS := A head with brown hair and a blue shirt talks slow in a low voice on a grey background: "bonjour".
TESTING := TEST_SUMMARY=$(SUMMARY) OMP_NUM_THREADS=1

.PHONY: demo test test-core test-host lint bench soak gpu pony clean

demo: $(VENV)/.ready
	mkdir -p demo
	$(PONY) --prompt "A red circle bounces slow on a teal background." --out demo/bounce.mp4
	$(PONY) --prompt '$(TALKS)' --out demo/head.mp4
	$(PONY) --prompt '$(TALKS)' --image docs/pony_head.png --out demo/image.mp4

test:
	@where=$$($(PYTHON) tests/nodes/launch_host.py where) && echo "ComfyUI to test on: $${where:-none found}"
	@$(MAKE) --no-print-directory -j2 $(VENV)/.ready-test $(COMFYUI:%=$(HOST)/.ready)
	@$(MAKE) --no-print-directory lint
	@rm -f $(SUMMARY)
	@$(MAKE) --no-print-directory -k test-core $(COMFYUI:%=test-host); result=$$?; echo; cat $(SUMMARY); exit $$result

# Without a ComfyUI its tests are collected here, to be counted as skipped.
test-core: $(VENV)/.ready-test
	$(TESTING) $(BIN)/python $(PYTEST) -m 'not gpu$(COMFYUI:%= and not host)' $(PYTEST_ARGS)

test-host: $(HOST)/.ready
	$(TESTING) $(HOST)/bin/python $(PYTEST) -m 'host and not gpu' tests/nodes $(PYTEST_ARGS)

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .

bench: $(VENV)/.ready-test $(COMFYUI:%=$(HOST)/.ready)
	$(BIN)/python benchmarks/transformer_speed.py
	$(BIN)/python benchmarks/load_memory.py
	$(BIN)/python benchmarks/decode_memory.py
	$(BIN)/python benchmarks/small_films.py
	$(if $(COMFYUI),$(HOST)/bin/python benchmarks/host_overhead.py,@echo "no ComfyUI: the nodes' overhead is not measured")

# Trains the built-in miniature again, in ten core-hours, more without a C++ compiler; goes on where it was stopped.
pony: $(VENV)/.ready-test
	$(BIN)/happyhorse train pony $(if $(shell command -v "$${CXX:-g++}" 2>/dev/null),--compile)

soak: $(VENV)/.ready-test $(COMFYUI:%=$(HOST)/.ready)
	$(BIN)/python benchmarks/soak.py
	$(if $(COMFYUI),$(HOST)/bin/python benchmarks/host_soak.py,@echo "no ComfyUI: its server is not tried")

gpu: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m gpu tests/test_gpu.py

clean:
	rm -rf $(VENV) $(HOST)

$(VENV)/.ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq $(TORCH)
	$(BIN)/python -m pip install -qq --editable .
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(BIN)/python -m pip install -qq --editable ".[test]"
	touch $@

# torchvision and torchaudio for the host's imports only: their native libraries may be built for another PyTorch
# (tests/nodes/launch_host.py does without torchvision's, torchaudio is pure Python without its own).
$(HOST)/.comfyui: $(COMFYUI:%=%/requirements.txt)
	$(PYTHON) -m venv $(HOST)
	$(HOST_PIP) --upgrade pip
	$(HOST_PIP) $(TORCH)
	$(HOST_PIP) --no-deps torchvision==0.28.0 torchaudio==2.11.0
	rm -f $(HOST)/lib/python3*/site-packages/torchaudio/lib/*.so
	grep -vxE '(torch|torchvision|torchaudio)([^a-z].*)?' $(COMFYUI)/requirements.txt > $(HOST)/requirements.txt
	$(HOST_PIP) -r $(HOST)/requirements.txt
	touch $@

# After the other environment: two builds at once would write the same metadata folder.
$(HOST)/.ready: $(HOST)/.comfyui $(VENV)/.ready-test
	$(HOST_PIP) --editable ".[host]"
	touch $@
