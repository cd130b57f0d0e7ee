# make demo            install, train the default model on real digits, sample, check: a few minutes
# make test            install and run the tests
# make test-slow       those that take minutes: the GPU benchmark from end to end, on tiny shapes
# make test-kernels    install triton and NATTEN too, and test their backends
# make test-trackers   test training.track with trackio and wandb, in an environment of their own
# make lint            ruff and mypy
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := runs/demo

.PHONY: demo test test-slow test-kernels test-trackers lint format clean

# clean-fid asks for torchvision, of which nothing is used
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("hdit needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps clean-fid
	touch $@

demo: $(VENV)/.installed
	$(BIN)/hdit train configs/digits-hdit.toml --run $(DEMO)
	$(BIN)/hdit sample $(DEMO) -n 100 --overwrite --out $(DEMO)/images
	$(BIN)/python scripts/check_digits.py $(DEMO)
	@echo "The images: $(DEMO)/images/grid.png, and one PNG for each image beside it."

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow" -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

test-kernels: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[triton]' setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation natten
	$(BIN)/python -m pytest tests/kernels/test_triton.py tests/kernels/test_philox.py tests/kernels/test_natten.py

# An environment over the other one: trackio needs an older pillow than the tests have.
TRACKERS := $(VENV)-trackers
test-trackers: $(VENV)/.installed
	$(PYTHON) -m venv $(TRACKERS)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(TRACKERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	grep -v '^pillow==' constraints.txt > $(TRACKERS)/constraints.txt
	$(TRACKERS)/bin/python -m pip install -q --no-warn-conflicts -c $(TRACKERS)/constraints.txt trackio wandb
	$(TRACKERS)/bin/python -m pytest tests/training/test_tracking.py -k "trackio or wandb"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(TRACKERS) .pytest_cache .mypy_cache .ruff_cache .hypothesis
