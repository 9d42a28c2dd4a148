# make demo, test, test-slow and lint each install what they need into $(VENV).
# PYTHON=python3.12 picks the interpreter (3.10 to 3.12), VENV=.venv-3.12 the folder, TESTS=tests/test_router.py the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-slow lint

demo: $(VENV)/run.stamp
	$(BIN)/python sample.py --ckpt ckpt/fashion_mnist --num-sampling-steps 20 --ddim-sample \
		--accelerate-method dynamiclayer --path ckpt/fashion_mnist/DDIM20_router.pt --thres 0.1 --compare

test: $(VENV)/test.stamp
	$(PYTEST) -m "not slow" $(TESTS)

test-slow: $(VENV)/test.stamp
	$(PYTEST) -m slow $(TESTS)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/pip check --disable-pip-version-check

# What running needs. The .pth file makes the repository importable from any folder, also with PYTHONSAFEPATH=1.
$(VENV)/run.stamp: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else "Python %d.%d: 3.10 to 3.12 is needed; name one with make PYTHON=..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.txt
	pwd > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/learning_to_cache.pth"
	touch $@

# What the tests and lint need besides.
$(VENV)/test.stamp: $(VENV)/run.stamp requirements-dev.txt
	$(INSTALL) -r requirements-dev.txt
	touch $@
