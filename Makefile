PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
TRITON := triton==3.6.0
NEWEST := triton==3.9.0
# For its microscope image alone.
IMAGE := stardist==0.9.2
PYTEST = $(BIN)/python -m pytest --numprocesses auto --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help bench test check slow newest fuzz mutants capabilities drawn regression lint package lock train gpu clean
.NOTPARALLEL:

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

bench: .venv/bench  ## Run the main job: reference and fused module on a real image (ARGS="--help": its options)
	$(BIN)/python -m benchmarks $(ARGS)

test: .venv/test  ## Run the tests: parity with the official module, gradients, errors (ARGS="-k NAME": some of them)
	$(PYTEST) -m "not slow" $(ARGS)

check: test slow newest drawn regression lint package  ## Run all that there is: `make test` and what takes longer

train: .venv/train  ## Train a U-Net with DCA on a real image (ARGS="--help": its options, your own data)
	$(BIN)/python -m examples.train $(ARGS)

gpu:  ## On a machine with a GPU: right or wrong, times, a report, in 8 minutes (ARGS="--help": its steps; "--dry-run": on a CPU)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks gpu $(ARGS)

slow: .venv/third-party  ## Run the tests that take longer: compilers, training, segmentation_models_pytorch, MONAI, nnU-Net
	$(PYTEST) -m slow $(ARGS)

# Of the GPUs, the one with the fewest sources: those of another differ by their blocks, and `slow` has all.
newest: .venv/newest  ## Run some tests of the kernels with the newest Triton
	PYTHONPATH=.venv/newest $(PYTEST) tests/tools/test_interpreter.py tests/module/test_triton.py tests/tools/test_launch.py \
		-k "test_interpreter or test_shapes or test_number_of_launches or (triton_ir and sm_80) or tiny" $(ARGS)

fuzz: .venv/test  ## Draw calls of any modules for 10 minutes, and compare them with float64 (ARGS="--help": its options)
	$(BIN)/python -m tests.fuzz $(ARGS)

mutants: .venv/test  ## Put mistakes into a copy of the package, and see that the tests notice them, two hours (ARGS="--help")
	$(BIN)/python -m tests.mutants $(ARGS)

capabilities: .venv/test  ## Run `make test` at every instruction set of this CPU, with one thread and two: an hour
	$(BIN)/python -m tests.capabilities $(ARGS)

# Others each time, whose seeds are printed. Both at a time, on a core each.
drawn: .venv/test
	$(BIN)/python -m tests.mutants --draw 5 & mutants=$$!; \
		$(BIN)/python -m tests.fuzz --minutes 1 --processes 1; fuzz=$$?; wait $$mutants && exit $$fuzz

regression: .venv/test  ## Check speed and memory against the committed ratios, and the documents' tables
	$(BIN)/python -m pytest benchmarks
	$(BIN)/python -m benchmarks report --check
	$(BIN)/python -m tests.reliability --check

lint: .venv/test  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

package: .venv/test  ## Build the source archive, of it the wheel, and check what they hold
	rm -rf build dist
	$(BIN)/python -m build --no-isolation --outdir dist > /dev/null
	tar -tzf dist/*.tar.gz | sed -e 's|^[^/]*/||' | sort > dist/files
	git ls-files | grep -vE '^(\.ci/|\.gitignore)' | sort | comm -23 - dist/files | sed -e 's|^|not in the archive: |' | tee dist/missing
	! test -s dist/missing
	$(BIN)/python -m zipfile --list dist/*.whl
	! $(BIN)/python -m zipfile --list dist/*.whl | tail -n +2 | grep -vE '^dca_kernels(-[0-9.]+\.dist-info)?/'

lock: .venv/third-party  ## Write the hashes of what continuous integration installs, and the table of licences
	$(BIN)/python lock/write.py --triton $(TRITON) --newest $(NEWEST) --image $(IMAGE)

clean:  ## Remove what the other commands made
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# One stamp file for each extra that is installed. Continuous integration installs the same by hash.
ifeq ($(CI),true)
LOCKED = $(BIN)/python -m pip install --quiet --require-hashes --no-deps --only-binary :all: --requirement lock/$(@F).txt

.venv/bench: pyproject.toml lock/bench.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(LOCKED)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

.venv/train .venv/test: .venv/bench
.venv/third-party: .venv/test
.venv/train .venv/test .venv/third-party: .venv/%: lock/%.txt
	$(LOCKED)
	touch $@

.venv/newest: .venv/test lock/newest.txt
	$(LOCKED) --target $@

else
.venv/bench: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	touch $@

.venv/train: .venv/bench
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[examples]"
	$(BIN)/python -m pip install --quiet --no-deps $(IMAGE)
	touch $@

# A GPU build of torch has brought the triton that belongs to it; beside any other one, the tests' own is installed.
.venv/test: .venv/bench
	$(BIN)/python -c "import triton" 2> /dev/null || $(BIN)/python -m pip install --quiet $(TRITON)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	$(BIN)/python -m pip install --quiet --no-deps $(IMAGE)
	touch $@

.venv/newest: .venv/test
	$(BIN)/python -m pip install --quiet --no-deps --target $@ $(NEWEST)

.venv/third-party: .venv/test
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[third-party]"
	touch $@

endif
