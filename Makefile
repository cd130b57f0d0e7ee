# make demo            install, train the default model on real digits, sample, check: a few minutes
# make test            install and run the tests
# make test-slow       those that take minutes: the GPU benchmark from end to end, on tiny shapes
# make test-kernels    install triton and NATTEN too, and test their backends
# make lint            ruff and mypy
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := runs/demo

.PHONY: demo test test-slow test-kernels lint format clean

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

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
