# make demo, make test, make lint: each sets up what it needs. PYTHON=python3.12 picks another interpreter (3.10 to 3.12),
# VENV=.venv-3.12 another folder for it; TESTS=tests/test_router.py some of the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint

demo: $(VENV)/installed
	$(BIN)/python sample.py --ckpt ckpt/fashion_mnist --num-sampling-steps 20 --ddim-sample \
		--accelerate-method dynamiclayer --path ckpt/fashion_mnist/DDIM20_router.pt --thres 0.1 --compare

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/pip check --disable-pip-version-check

$(VENV)/installed: requirements.txt requirements-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else "Python %d.%d: 3.10 to 3.12 is needed; name one with make PYTHON=..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt
	touch $@
