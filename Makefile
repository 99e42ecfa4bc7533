# Two commands:
#   make demo    train a small DeepSeek of your own and talk to it       make demo ARGS=--no-serve
#   make test    the whole test suite                                    make test TESTS=tests/model
# Also: make check ROOM=train (ruff and the tests of one room), make lint, make clean (keeps runs/). Everything is
# installed into .venv, once.
# Tests run two at a time, a thread each: most of them start processes of their own. What is costly to make is made once
# for both (`once` in tests/conftest.py), so that tests are dealt one by one and no long file is left at the end.
# PYTHON=... chooses the interpreter, PIP_ARGS=... is handed to pip (say, the index of another PyTorch build).

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt $(PIP_ARGS)
PYTHONS := $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11 python3 python)
PAGES := $(shell find web -name node_modules -prune -o -type f -print)
KERNELS := $(wildcard src/motley/model/native/*.cpp src/motley/model/native/*.h src/motley/model/native/build.py)
ROOMS := $(filter-out __pycache__,$(notdir $(patsubst %/,%,$(wildcard tests/*/))))
INPUTS := Makefile pyproject.toml constraints.txt hatch_build.py $(PAGES) $(KERNELS)

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test check lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	@$(BIN)/motley demo $(ARGS)

test: $(VENV)/installed-test
	@$(PYTEST) $(TESTS) $(ARGS); status=$$?; \
	command -v chromium >/dev/null || printf '\n%s\n%s\n%s\n' \
	  '*******************************************************************************' \
	  '*** The browser tests did NOT run: there is no Chromium. apt-get install chromium' \
	  '*******************************************************************************'; \
	exit $$status

check: $(VENV)/installed-test
	@[ -n "$(ROOM)" ] && [ -d "tests/$(ROOM)" ] || { echo "make check ROOM=one of: $(ROOMS)" >&2; exit 2; }
	@$(BIN)/ruff check -q $(wildcard src/motley/$(ROOM)) tests/$(ROOM)
	@$(BIN)/ruff format -q --check $(wildcard src/motley/$(ROOM)) tests/$(ROOM)
	@$(PYTEST) tests/$(ROOM) $(ARGS)

lint: $(VENV)/installed-test
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
	find src tests benchmarks stand_ins -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment: the first interpreter that is new enough and can make one.
$(VENV)/created:
	@for python in $(PYTHONS); do \
	  command -v "$$python" >/dev/null || continue; \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  new_enough="$$python"; \
	  "$$python" -c 'import ensurepip, venv' 2>/dev/null || continue; \
	  echo "making $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv --clear $(VENV) && touch $@ && exit 0; \
	done; \
	if [ -n "$$new_enough" ]; then \
	  echo "$$new_enough cannot make virtual environments: install its venv package (Debian: apt-get install python3-venv)"; \
	else \
	  echo "motley needs Python 3.11 or newer; found none of: $(PYTHONS). Install one, or name it: make demo PYTHON=/path/to/python3"; \
	fi >&2; exit 1

# reasoning-gym needs pycosat, which is published as C source only.
$(VENV)/pycosat: $(VENV)/created
	@if ! $(BIN)/python stand_ins/can_compile.py; then \
	  echo "no C compiler or no Python headers here: installing a pure-Python stand-in for pycosat"; \
	  $(PIP) ./stand_ins/pycosat; \
	fi
	@touch $@

$(VENV)/installed: $(VENV)/pycosat $(INPUTS)
	@echo "installing motley into $(VENV) (once; PyTorch is large, this takes minutes)"
	@$(PIP) -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed $(INPUTS)
	@echo "installing what the tests need"
	@$(PIP) -e '.[test]'
	@touch $@
