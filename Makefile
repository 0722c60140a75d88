# Needs Python >= 3.10 with venv and pip, and a C++ compiler; CUDA code is built where there is nvcc. Everything else
# goes into .venv, and what is compiled into build/.
PYTHON ?= python3
BIN := .venv/bin
# pip compiles no module: that takes a minute for all that are installed, and Python does it for those that it imports.
unexport PYTHONDONTWRITEBYTECODE
# nvcc takes a minute: CUDA code is compiled where there is a GPU, where SDATTN_FAST_CUDA asks for it, and for the tests.
export SDATTN_FAST_CUDA ?= $(if $(shell command -v nvidia-smi),auto,0)
CUDA_CODE = "CUDA code: $(SDATTN_FAST_CUDA), for $(or $(TORCH_CUDA_ARCH_LIST),all)"

# What pip may install: `make CONSTRAINTS=` takes the newest of everything.
CONSTRAINTS ?= constraints.txt

.PHONY: demo test test-all test-oldest test-aarch64 lint docs bench compile-matrix gpu-bundle hub-package wheel wheels-cu12 wheels-cu13 sdist rehearse clean

demo: .venv/installed
	$(BIN)/sdattn-fast demo

# A file of tests to a core. CUDA code is compiled for one architecture, and of many like cases some are taken.
test test-all: export SDATTN_FAST_CUDA = auto
test: export TORCH_CUDA_ARCH_LIST = 9.0
test test-all: .venv/installed build/triton-3.6.0
	echo $(CUDA_CODE) | cmp -s - .venv/installed || \
	    { $(BIN)/python -m pip install --quiet --no-deps -e . && echo $(CUDA_CODE) >.venv/installed; }
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

# Every case, and CUDA code for every architecture.
test-all: export SDATTN_TEST_ALL = 1

# The lowest versions that the metadata allows, on the oldest Python.
OLDEST_PYTHON ?= python3.10
test-oldest: build/oldest/installed
	build/oldest/bin/pytest -n auto --dist loadfile --no-loadscope-reorder

build/oldest/installed: pyproject.toml lab/pyproject.toml setup.py $(shell find csrc -type f ! -name '*.pyc')
	$(OLDEST_PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install --quiet uv
	build/oldest/bin/uv pip install --quiet --python build/oldest/bin/python --resolution lowest-direct \
	    -e ".[test]" -e ./lab
	touch $@

# The core's own tests for ARM, cross-compiled: needs Debian's g++-aarch64-linux-gnu and qemu-user.
test-aarch64:
	mkdir -p build
	aarch64-linux-gnu-g++ -std=c++17 -O2 -fopenmp -ffp-contract=fast -fno-math-errno -Wno-psabi \
	    csrc/tests/test_cpu_core.cpp $(addprefix csrc/cpu/,attention.cpp backward.cpp isa_portable.cpp) -o build/$@
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/$@

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-actions .github/actions/*/action.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml

# The documentation as a site, in site/, warnings as errors. Not with --quiet, which drops warnings before they count.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/installed
	$(BIN)/pytest --benchmark

# What the tests launch, compiled by every Triton that is allowed, and for every target: 40 minutes on two cores.
TRITONS := 3.2.0 3.3.1 3.4.0 3.5.1 3.6.0 3.7.0 3.8.0
compile-matrix: .venv/installed $(TRITONS:%=build/triton-%)
	$(BIN)/python tests/support/compile_matrix.py $(TRITONS)

build/triton-%: .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==$*

# What benchmarks/on_gpu.sh needs on a bare machine with a GPU: wheels, and the compiled modules for its GPU.
GPU_ARCHITECTURE ?= 9.0
gpu-bundle:
	$(PYTHON) benchmarks/on_gpu/bundle.py --architecture $(GPU_ARCHITECTURE)

# The kernels as a package for the Hugging Face Hub, in build/hub.
hub-package: .venv/installed
	rm -rf build/hub
	$(BIN)/python hub/make.py build/hub

# A wheel for CPython 3.10 and all after it, in dist/, and that of the lab's weights. The tag is what this machine's C
# library allows; manylinux_2_28 comes from below.
wheel: export SDATTN_FAST_CUDA = auto
wheel: .venv/installed
	rm -rf build/wheel lab/build
	$(BIN)/pip wheel --quiet --no-deps -w build/wheel .
	$(BIN)/pip wheel --quiet --no-deps -w dist ./lab
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --exclude libgomp.so.1 -w dist build/wheel/*.whl || \
	    { mkdir -p dist && cp build/wheel/*.whl dist; }
	du -h dist/*.whl

# manylinux_2_28 wheels, in Docker, from a clean clone: cibuildwheel copies the whole folder.
wheels-cu13: build/cibuildwheel
	build/cibuildwheel/bin/cibuildwheel --platform linux --output-dir dist/cu13

wheels-cu12: build/cibuildwheel
	CIBW_MANYLINUX_X86_64_IMAGE=pytorch/manylinux2_28-builder:cuda12.8 CIBW_BEFORE_ALL=true \
	CIBW_ENVIRONMENT="CUDA_HOME=/usr/local/cuda SDATTN_FAST_CPU=1 SDATTN_FAST_CUDA=1 SDATTN_FAST_LOCAL_VERSION=cu12" \
	    build/cibuildwheel/bin/cibuildwheel --platform linux --output-dir dist/cu12

# The source distribution, and both distributions of the lab's weights.
sdist: .venv/installed
	$(BIN)/python -m build --sdist -o dist .
	$(BIN)/python -m build -o dist ./lab

# A release but for its publication: tagged in a clean clone, built, and checked as the workflow does. Half an hour.
rehearse:
	rm -rf build/rehearsal
	git clone --quiet . build/rehearsal
	cd build/rehearsal && sed -i "s/^\(## .*\) (unreleased)$$/\1 ($$(date +%F))/" CHANGELOG.md && \
	    git -c user.name=rehearsal -c user.email=rehearsal@localhost commit --quiet --all --message "A release" && \
	    git tag "v$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' sdattn_fast/_version.py)" && $(MAKE) sdist wheel && \
	    $(PYTHON) release/check.py dist --tag "$$(git describe --tags --exact-match)" --readme

build/cibuildwheel:
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet cibuildwheel==4.3.5

.venv/installed: pyproject.toml lab/pyproject.toml setup.py constraints.txt $(shell find csrc -type f ! -name '*.pyc')
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile $(CONSTRAINTS:%=-c %) -e ".[dev]" -e ./lab
	echo $(CUDA_CODE) >$@

clean:
	rm -rf .venv build dist site *.egg-info sdattn_fast/*.so lab/build lab/src/*.egg-info
