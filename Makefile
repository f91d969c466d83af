# SPDX-License-Identifier: Apache-2.0
# Entry points for work on the project. The build itself is CMakeLists.txt; `pip install` runs it.
PYTHON ?= python3
PRESETS = release debug clang asan ubsan tsan
QEMU = qemu-aarch64 -L /usr/aarch64-linux-gnu
C_FILES = git ls-files -z --cached --others --exclude-standard 'csrc/*.c' 'csrc/*.h'
PY_DIRS = gemma4 tests tools benchmarks

.DEFAULT_GOAL := help
.PHONY: help dev test lint format docs notebooks bench wheel ci clean neon simde $(PRESETS)

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  make release | debug | clang | asan | ubsan | tsan     build csrc/ without Python, run its C tests"

dev: ## editable install with test and lint tools (to rebuild, run it again)
	$(PYTHON) -m pip install -e ".[test,dev,plot]"

test: ## run all tests (make test ARGS="-k sampling -x")
	$(PYTHON) -P -m pytest $(ARGS)

lint: ## check with ruff, pyright, clang-format and check_layers.py; changes nothing
	$(PYTHON) -m ruff check $(PY_DIRS)
	$(PYTHON) -m ruff format --check $(PY_DIRS)
	$(PYTHON) -m pyright --pythonpath "$$(command -v $(PYTHON))"
	$(C_FILES) | xargs -0 clang-format --dry-run --Werror
	$(PYTHON) tools/check_layers.py
	$(PYTHON) tools/check_words.py

format: ## format the sources with ruff and clang-format
	$(PYTHON) -m ruff check --fix $(PY_DIRS)
	$(PYTHON) -m ruff format $(PY_DIRS)
	$(C_FILES) | xargs -0 clang-format -i

$(PRESETS):
	cmake --preset $@
	cmake --build --preset $@ --parallel
	ctest --preset $@

neon: ## build csrc/ for 64-bit Arm and test it under qemu-user, with and without the extensions
	@command -v aarch64-linux-gnu-gcc >/dev/null || { echo "skipped: no aarch64 compiler"; exit 0; }; \
	command -v qemu-aarch64 >/dev/null || { echo "skipped: no qemu-aarch64"; exit 0; }; \
	set -e; cmake --preset aarch64; cmake --build --preset aarch64 --parallel; \
	for isa in scalar neon neon_dotprod neon_i8mm; do GEMMA4_ISA=$$isa $(QEMU) -cpu max build/aarch64/csrc_test; done; \
	$(QEMU) -cpu max build/aarch64/kernels_test neon neon_dotprod neon_i8mm; \
	$(QEMU) -cpu neoverse-n1 build/aarch64/kernels_test neon neon_dotprod; \
	$(QEMU) -cpu cortex-a57 build/aarch64/kernels_test neon

simde: ## test the AVX-512 and VNNI kernels on a processor with AVX2 only (SIMDe emulation)
	@test -e /usr/include/simde/x86/avx512.h || { echo "skipped: no SIMDe (libsimde-dev)"; exit 0; }; \
	grep -qw avx2 /proc/cpuinfo || { echo "skipped: no AVX2"; exit 0; }; \
	set -e; cmake --preset simde; cmake --build --preset simde --parallel; \
	for isa in avx_vnni avx512 avx512_vnni avx512_bf16 amx; do GEMMA4_ISA=$$isa build/simde/csrc_test; done; \
	build/simde/kernels_test avx2 avx_vnni avx512 avx512_vnni avx512_bf16 amx

# OpenBLAS stays a dependency (scipy-openblas32): 25 MB that other packages share and that pip updates separately.
wheel: ## build one wheel for this machine type and Python 3.11 or later, in dist/ (Linux: manylinux)
	rm -rf build/wheel dist
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	@if [ "$$(uname)" = Linux ]; then set -e; \
	PATH="$$(dirname "$$(command -v $(PYTHON))"):$$PATH" \
	$(PYTHON) -m auditwheel repair --exclude 'libscipy_openblas*' --wheel-dir dist build/wheel/*.whl; \
	else mkdir -p dist && cp build/wheel/*.whl dist/; fi
	@ls -l dist

docs: ## build the documentation as a site in build/site, which opens without a network (needs the extra docs)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build
	$(PYTHON) tools/docs_site/check.py

notebooks: ## execute every notebook in place
	$(PYTHON) -P tools/run_notebooks.py

bench: ## compare speed and memory with other engines (make bench ARGS="--model DIR --transformers")
	$(PYTHON) benchmarks/run.py $(ARGS)

ci: ## run continuous integration, from nothing
	.ci/run

clean: ## remove build products
	rm -rf build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
