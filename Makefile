# Everything runs in $(VENV), which the first target that needs it makes. A fresh machine needs Python 3.10 or later
# with venv, git, make, and a C++ compiler for Detectron2.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
IN_VENV := . $(VENV)/bin/activate &&

# One worker a core, each on one thread: see tests/conftest.py. A file stays with one worker, and so do its fixtures.
JOBS ?= auto
CODE := d2_mgd classification tools examples benchmarks tests
TYPED := d2_mgd classification tools examples benchmarks

export PIP_CONSTRAINT := constraints.txt
export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export GIT_TERMINAL_PROMPT := 0

.PHONY: help install detectron2 demo demo-classification test lint format types docs bench soak fuzz audit clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name what; do printf '  make %-22s%s\n' "$$name" "$$what"; done

install: $(VENV)/.installed  ## the environment, with Detectron2 where it can be built; a moment when nothing changed

$(PY):
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed; make PYTHON=... names another one.") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py constraints.txt d2_mgd/_install.py | $(PY)
	$(IN_VENV) pip install --quiet 'setuptools<82' wheel ninja
	$(IN_VENV) pip install --quiet torch torchvision
	$(IN_VENV) pip install --quiet --no-build-isolation --editable '.[test,dev,docs]'
	@$(MAKE) --no-print-directory detectron2
	@touch $@

# Fails for nobody: without git access or a compiler everything but d2_mgd.detection still works.
detectron2: | $(PY)  ## try (again) to install Detectron2
	@if $(PY) -c 'import detectron2' 2>/dev/null; then \
	    echo "Detectron2 is installed."; \
	elif echo "Installing Detectron2 (some minutes; log: $(VENV)/detectron2.log) ..."; \
	    $(IN_VENV) pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git@02b5c4e295e990042a714712c21dc79b731e8833' >$(VENV)/detectron2.log 2>&1 \
	    && $(PY) -c 'import detectron2' >>$(VENV)/detectron2.log 2>&1; then \
	    echo "Detectron2 is installed."; \
	else \
	    echo "Detectron2 could not be installed, so its tests are skipped and the demo uses torchvision; $(VENV)/detectron2.log says why, make detectron2 tries again."; \
	fi

demo: install  ## teacher, student alone and distilled student on rendered scenes, with a report: minutes on two cores
	@if $(PY) -c 'import detectron2' 2>/dev/null; then \
	    $(PY) tools/demos/detection_demo.py --output demo_output; \
	else \
	    echo "Detectron2 is not installed, so this demo distils torchvision's RetinaNet; $(VENV)/detectron2.log says why."; \
	    OMP_WAIT_POLICY=PASSIVE $(PY) examples/torchvision_detection.py --demo --output demo_output; \
	fi

demo-classification: install  ## the classification pipeline on generated images: minutes on two cores
	$(PY) tools/demos/classification_demo.py

test: install lint types docs  ## lint, types, documentation and tests; the last lines say what was skipped and why
	$(PY) -m pytest --numprocesses $(JOBS) --maxprocesses 8 --dist loadfile

lint: install  ## ruff's rules and formatting
	$(PY) -m ruff check $(CODE)
	$(PY) -m ruff format --check $(CODE)

types: install  ## mypy
	$(PY) -m mypy $(TYPED)

# Not --quiet: what it does not say, --strict does not count.
docs: install  ## the documentation as a site, build/docs/index.html; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

format: install  ## let ruff mend what it can
	$(PY) -m ruff check --fix-only $(CODE)
	$(PY) -m ruff format $(CODE)

bench: install  ## speed and memory beside the alternatives: a quarter of an hour on two cores
	$(PY) -m benchmarks.run

soak: install  ## trainings killed at 20 moments must end as the undisturbed one: minutes
	$(PY) -m tests.soak --kills 20
	CLASSIFICATION_KILLS=20 $(PY) -m pytest tests/classification/test_kills.py

fuzz: install  ## random input of every kind, for some minutes: what fails is shown with the smallest input that does
	$(PY) -m tests.fuzz --minutes 4

# --strict: a version that the service does not know is a failure. Packages that are not from an index are left out.
AUDIT_SERVICE ?= pypi
audit: install  ## known vulnerabilities of what is installed; AUDIT_SERVICE=osv asks OSV instead of PyPI
	@mkdir -p build
	@$(PY) -m pip freeze --exclude-editable | grep == >build/installed.txt
	$(PY) -m pip_audit --strict --disable-pip --no-deps --requirement build/installed.txt --vulnerability-service $(AUDIT_SERVICE)

clean:  ## remove the environment, caches, and what the demos wrote
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo_output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
