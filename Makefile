# make demo    the main job: pretrain, train, evaluate, sample (two cores, six to ten minutes after the installation)
# make test    lint, types and all tests
# make lint    ruff and mypy
# make matrix  tests with the versions of matrix/cells.yaml, oldest to newest (keeps 25 GB of virtual environments)
# make gpu     measurements that need an NVIDIA GPU, with the installed Python (under ten minutes; toy size without a GPU)
# make results list the kept figures of benchmarks, and which files they depend on have changed since
# make clean   remove the virtual environments and runs/
# demo, test, lint and matrix create .venv and install the tested versions of constraints.txt when they are missing.

# Waiting threads spin briefly, then yield the processor (README.md, "A busy CPU").
export GOMP_SPINCOUNT ?= 4000

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv

.PHONY: demo test matrix gpu results lint clean

demo: $(VENV)/demo.installed
	$(VENV)/bin/python scripts/train.py recipes/demo.yaml

# Two test processes share two cores.
test: export OMP_NUM_THREADS = 1
test: lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "slow or not slow" --durations 5

matrix: $(VENV)/demo.installed
	$(VENV)/bin/python matrix/run.py

gpu:
	$(PYTHON) benchmarks/gpu.py

results:
	@$(PYTHON) benchmarks/results.py

lint: $(VENV)/dev.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/demo.installed: EXTRAS = [plot]
$(VENV)/dev.installed: EXTRAS = [dev]
$(VENV)/%.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.$(EXTRAS)'
	touch $@

clean:
	rm -rf $(VENV) .matrix runs
