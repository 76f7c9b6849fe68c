# make demo      draw demo.png with the weights that ship in the repository
# make test      run the tests
# make install   only make the environment: .venv/bin/t2i, .venv/bin/python
# make clean     remove the environment and what the build left
#
# The environment is made once, and installed into again only where its inputs changed. T2I_BUILD is
# passed on to setup.py, which describes it.
#
# TORCH is what pip is asked for. On Linux that is the CUDA build, which serves machines with and
# without a GPU; without one, the CPU build does the same and is much smaller:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
THREADS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
INPUTS := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: demo test install clean

demo: $(VENV)/installed
	$(VENV)/bin/t2i demo

test: $(VENV)/installed-test
	OMP_NUM_THREADS=$(THREADS) $(VENV)/bin/python -m pytest

install: $(VENV)/installed

$(VENV)/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than Python 3.10; choose one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "no venv module; on Debian, Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PIP) install $(TORCH)
	touch $@

# torch is there before the build, which reads its headers.
$(VENV)/installed: $(VENV)/torch $(INPUTS)
	$(PIP) install --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) install --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
	rm -f kernels/t2i_kernels/libt2i_kernels.so kernels/t2i_kernels/_build_info.json
	find kernels t2i tests -name __pycache__ -prune -exec rm -rf {} +
