# Everything a person or a robot does with this project. Plain sh; the same on Linux and macOS.
#
#   make quickstart                    from nothing to a story
#   make test ARGS="tests/test_cli.py" some of the tests
#   make quickstart PYTHON=python3.13  with a Python of your choice (3.11 or later)

VENV := .venv
PY := $(VENV)/bin/python
# Not compiled beforehand: Python does that for the files that it imports, which are a small part of them.
INSTALL := -m pip --disable-pip-version-check install -q --no-compile
PIP := $(PY) $(INSTALL) -c constraints.txt
ARGS :=

.DEFAULT_GOAL := help

.PHONY: help quickstart test check interop bench gpu format docs build wheel-test clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1 @\2/p' $(MAKEFILE_LIST) | awk -F@ '{ printf "%-20s %s\n", $$1, $$2 }'

quickstart: $(VENV)/installed ## install, train a small model, hear three stories
	@$(PY) -m gemlet quickstart $(ARGS)

# A process for each core: each begins with files of its own, so that what a file prepares is mostly prepared once.
PARALLEL := -n auto --dist worksteal

test: $(VENV)/installed-dev ## run the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PARALLEL) --ignore=tests/interop $(ARGS)

check: $(VENV)/installed-dev ## lint, formatting, types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PY) -m pyright

format: $(VENV)/installed-dev ## bring the code into its format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(VENV)/installed-dev ## the documentation as a site, in build/site/ (open build/site/index.html)
	@rm -rf build/site
	$(PY) -m sphinx -W --keep-going -q -E -c docs/site -d build/doctrees docs build/site

# The runtimes live in environments of their own, .envs/NAME, made from tests/interop/NAME.txt; wllama in .envs/browser.
RUNTIMES := transformers-4 llama.cpp mlx browser

interop: $(VENV)/installed-dev $(RUNTIMES:%=.envs/%/installed) ## install other runtimes and hold models against them
	OMP_NUM_THREADS=1 GEMLET_WLLAMA=.envs/browser $(PY) -m pytest $(PARALLEL) -rs tests/interop $(ARGS)

# Peers pin other versions than we do, so gemlet is installed beside them once more.
bench: .envs/peers/installed ## this machine's CPU: training, decoding, lengths, losses, many texts, beside others
	.envs/peers/bin/python -m benchmarks.train --preset tales --batch-size 8 --length 256 --rounds 15
	.envs/peers/bin/python -m benchmarks.train
	.envs/peers/bin/python -m benchmarks.decode --tokenizer gpt2 --peers .envs/peers/bin/python decode prefill
	.envs/peers/bin/python -m benchmarks.decode --tokenizer gpt2 context memory startup
	.envs/peers/bin/python -m benchmarks.length
	.envs/peers/bin/python -m benchmarks.loss --rounds 3
	.envs/peers/bin/python -m benchmarks.engine

.envs/peers/installed: $(VENV)/installed benchmarks/peers.txt
	@echo "Installing the peers into .envs/peers; llama-cpp-python is compiled on the spot ..."
	@$(PY) -m venv --clear .envs/peers
	@.envs/peers/bin/python $(INSTALL) -r benchmarks/peers.txt -e .
	@touch $@

# make gpu ARGS="--data stories.txt"; --device cpu --tiny as ARGS is a dry run of the second half.
gpu: $(VENV)/installed-dev ## with an NVIDIA GPU: the tests of tests/gpu, then all its benchmarks, as JSON
	$(PY) -m pytest -rs tests/gpu
	$(PY) -m benchmarks.gpu $(ARGS)

.envs/browser/installed: gemlet/export/web.py
	@echo "Downloading wllama with npm (Chromium and its chromedriver have to be installed by you) ..."
	@$(PY) -c "from pathlib import Path; from gemlet.export.web import fetch_wllama; fetch_wllama(Path('.envs/browser'))"
	@touch $@

.envs/%/installed: tests/interop/%.txt
	@echo "Installing $* into .envs/$* ..."
	@$(PY) -m venv --clear .envs/$*
	@.envs/$*/bin/python $(INSTALL) -r $<
	@touch $@

build: $(VENV)/installed-dev ## the wheel and the source archive, in dist/
	@rm -rf build dist
	$(PY) -m build --outdir dist

# A clean environment that has the wheel alone, and a quick start from an empty folder: what a user of the wheel meets.
wheel-test: build ## install the wheel somewhere clean and run a very short quick start
	@rm -rf build/wheel && mkdir -p build/wheel/here
	$(PY) -m venv build/wheel/env
	@echo "Installing the wheel and what it needs ..."
	@build/wheel/env/bin/python $(INSTALL) -c constraints.txt dist/*.whl
	cd build/wheel/here && ../env/bin/gemlet quickstart --help > /dev/null
	cd build/wheel/here && ../env/bin/gemlet quickstart --out tales --data.max-documents 5000 --train.max-steps 8 --train.warmup-steps 2
	cd build/wheel/here && ../env/bin/gemlet generate --model tales/checkpoints/best --prompt "Once" --max-new-tokens 20

clean: ## remove the environment and everything built (your runs stay)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

# The stamps make a second call instant, and install again when what is to be installed has changed.
$(VENV)/installed: $(PY) pyproject.toml constraints.txt
	@echo "Installing gemlet and what it needs; torch is large, so the first time takes some minutes ..."
	@$(PIP) -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "Installing what tests and checks need ..."
	@$(PIP) -e '.[dev,docs]'
	@touch $@

$(PY):
	@for python in "$(PYTHON)" python3 python3.14 python3.13 python3.12 python3.11; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then found="$$python"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "gemlet needs Python 3.11 or later and found none; install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 2; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2> /dev/null; then \
	  echo "$$found cannot make virtual environments: its ensurepip is missing (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; \
	fi; \
	echo "Making the environment $(VENV) with $$("$$found" -V) ..."; \
	"$$found" -m venv --clear $(VENV)
