# make run, make test: each from a fresh clone, with Python 3.11, pip and a package registry.
PYTHON ?= python3
VENV ?= .venv
PY ?= $(VENV)/bin/python
PIP = $(PY) -m pip
RUN = $(PY) run.py
export OMP_NUM_THREADS ?= 1

.PHONY: setup detectron2 run test test-quick lint bench gpu ray

run: setup  ## train the smoke sweep (what is done already is left out) and write its report
	$(RUN) -m sweep=smoke
	$(RUN) mode=report

test: setup lint  ## all that a 2-core machine without a GPU can run
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-quick: setup lint
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: setup  ## overheads: the scheduler, the adapters, checkpoints
	$(PY) -m benchmarks.speed

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-detectron2.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -r requirements.txt
	$(MAKE) detectron2
	touch $@

detectron2:
	$(PIP) install -q --no-deps --only-binary=:all: --python-version 3.10 --implementation cp --upgrade \
	  --target "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  --require-hashes -r requirements-detectron2.txt

gpu: setup  ## CIFAR-10 at the full recipe on a GPU: step and linear, 1%, 5%, 10%, three seeds, fp32 and bf16
	$(RUN) -m task=cifar10 schedule=step,linear budget=1%,5%,10% 'seed=range(3)' precision=fp32,bf16 device=cuda \
	  data.root=$(DATA) out=runs/gpu
	$(RUN) mode=report out=runs/gpu

ray: setup  ## what hydra/launcher=ray needs besides
	$(PIP) install -q --no-deps -r requirements-ray.txt
