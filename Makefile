# make demo      draw demo.png with the weights that ship in the repository
# make test      run the tests; make -j2 test THREADS=1 runs both halves at once
# make weights   make the shipped weights again: data, the trainings, evaluation. Hours; it can be
#                interrupted, and goes on where it stopped
# make fuzz      check ten million vectors of random problems for vq_nearest against fp64
# make sanitize  run the kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer
# make bench     measure the kernels beside their peers, half an hour: benchmarks/results/README.md
# make bench-avx2   the same, all of them restricted to AVX2, as on machines without AVX-512
# make gpu-check  on a machine with a GPU: the kernels' tests, and the kernels beside their peers
# make cuda      install with the CUDA kernels: needs nvcc, but no GPU. T2I_BUILD=cuda keeps them
#                when others of these commands follow
# make cuda-static  compile the CUDA kernels, no GPU either: benchmarks/results/cuda_static.md
# make gpu-static   compile the Triton kernels without a GPU: benchmarks/results/gpu_static.md
# make bench-decode   measure decoding beside other engines, hours: benchmarks/results/decode.md;
#                what such a processor has measured already only with BENCH_DECODE=--again
# make install   only make the environment: .venv/bin/t2i, .venv/bin/python
# make clean     remove the environment and what the build left
#
# The environment is made once, and installed into again only where its inputs changed: the native
# sources, or what is asked for by TORCH, T2I_BUILD, CXX, NVCC and T2I_CUDA_ARCHITECTURES (setup.py).
#
# TORCH is what pip is asked for. On Linux that is the CUDA build, which serves machines with and
# without a GPU; without one, the CPU build does the same and is much smaller:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV := .venv
TORCH ?= torch==2.13.0
THREADS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
INPUTS := pyproject.toml setup.py $(shell find csrc -type f)
COMPILERS := $(foreach name,c++ g++ clang++,$(shell command -v $(name)))
ASKED := torch $(TORCH), build $(T2I_BUILD), compilers $(CXX) $(COMPILERS), \
	cuda $(NVCC) $(T2I_CUDA_ARCHITECTURES)

T2I := $(VENV)/bin/t2i
NAME := emoji64
MODEL := t2i/pretrained/$(NAME)

.PHONY: demo test test-cpu test-gpu fuzz sanitize weights bench bench-avx2 bench-decode cuda cuda-static gpu-check gpu-static install clean FORCE

BENCH_THREADS ?= 1 2

demo: $(VENV)/installed
	$(T2I) demo

test: test-cpu test-gpu

test-cpu: $(VENV)/installed-test
	OMP_NUM_THREADS=$(THREADS) $(VENV)/bin/python -m pytest --ignore tests/simt --ignore tests/ptx

# GPU code without a GPU: Triton's in its interpreter, CUDA's on csrc/simt, and the PTX of both.
test-gpu: $(VENV)/installed-test
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/kernels tests/t2i/test_tune.py -k triton
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/simt tests/ptx

fuzz: $(VENV)/installed-test
	$(VENV)/bin/python tests/kernels/fuzz_vq_nearest.py

# The instrumented library takes the other's place, and the next make builds that again.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
sanitize: $(VENV)/installed-test
	rm -f $(VENV)/installed
	CXXFLAGS="$(SANITIZE) -O1 -g" LDFLAGS="$(SANITIZE)" $(PIP) install --editable .
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 OMP_NUM_THREADS=2 \
		$(VENV)/bin/python -m pytest tests/kernels -k "(cpu or native) and not mutation"

weights: $(VENV)/installed-weights
	$(T2I) data emoji
	$(T2I) train tokenizer configs/$(NAME)-tokenizer.toml --resume
	$(T2I) tokenize data/emoji --tokenizer runs/$(NAME)-tokenizer -o data/emoji-tokens
	$(T2I) train lm configs/$(NAME)-lm.toml --resume
	$(T2I) train tokenizer configs/$(NAME)-decoder.toml --resume
	$(T2I) train lm configs/$(NAME)-lm-first-view.toml --resume
	$(T2I) export --tokenizer runs/$(NAME)-decoder --lm runs/$(NAME)-lm-first-view \
		--cfg 1.25 --temperature 0.3 -o $(MODEL)
	$(T2I) eval $(MODEL) --prompts 6000 --card

bench: $(VENV)/installed-bench
	mkdir -p benchmarks/results
	for n in $(BENCH_THREADS); do for op in vq_nearest flash_attention; do \
		OMP_NUM_THREADS=$$n $(BENCH_ENV) $(VENV)/bin/python -m pytest -q benchmarks/test_$$op.py \
			$(BENCH_TESTS) --benchmark-json=benchmarks/results/$$op$(BENCH_NAME)-$$n.json || exit 1; \
	done; done
	$(VENV)/bin/python benchmarks/report.py

# Every library has a switch of its own.
bench-avx2: BENCH_NAME := -avx2
bench-avx2: BENCH_TESTS := -k test_shapes
bench-avx2: BENCH_ENV := T2I_CPU_CAPABILITY=AVX2 ATEN_CPU_CAPABILITY=avx2 \
	MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 FAISS_SIMD_LEVEL=AVX2 \
	OPENBLAS_CORETYPE=Haswell TORCHINDUCTOR_CACHE_DIR=$(abspath $(VENV))/inductor-avx2 \
	BENCH_COMMAND="make bench-avx2"
bench-avx2: bench

gpu-check: $(VENV)/installed-test
	$(VENV)/bin/python benchmarks/gpu_check.py

cuda:  # again, because ASKED has T2I_BUILD
	T2I_BUILD=cuda $(MAKE) install

cuda-static: $(VENV)/installed-test
	$(VENV)/bin/python benchmarks/cuda_static.py

gpu-static: $(VENV)/installed-test
	$(VENV)/bin/python benchmarks/gpu_static.py

bench-decode: $(VENV)/installed-bench
	mkdir -p benchmarks/results
	$(VENV)/bin/python benchmarks/decode/run.py $(BENCH_DECODE)
	$(VENV)/bin/python benchmarks/decode/report.py

install: $(VENV)/installed

$(VENV)/torch: $(VENV)/asked
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than Python 3.10; choose one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || \
		{ echo "no venv module; on Debian, Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PIP) install $(TORCH)
	touch $@

# Written anew only where it differs.
$(VENV)/asked: FORCE
	@mkdir -p $(VENV)
	@echo '$(ASKED)' | cmp -s - $@ || echo '$(ASKED)' > $@

# torch is there before the build, which reads its headers.
$(VENV)/installed: $(VENV)/torch $(INPUTS)
	$(PIP) install --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) install --editable ".[test]"
	touch $@

$(VENV)/installed-weights: $(VENV)/installed
	$(PIP) install --editable ".[train,data,hf]"
	touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(PIP) install --editable ".[bench]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
	rm -f kernels/t2i_kernels/libt2i_kernels*.so kernels/t2i_kernels/_build_info.json
	find kernels t2i tests -name __pycache__ -prune -exec rm -rf {} +
