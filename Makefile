# Runs the chain of notebooks on a study. GNU make >= 3.81.

## STUDY=digits       the study: a file in params/
## PYTHON=/path       an existing environment; none is built then
## JOBS=2             worker processes of the sweep (default: one a core)
## SCALE=quarter      of make paper: the studies sized for two CPU cores
## EXECUTOR=dask      where the sweep runs: local, dask (ADDRESS=tcp://host:8786), slurm (OPTIONS="timeout_min=240 ...")
STUDY ?= digits
JOBS ?=
EXECUTOR ?= local
ADDRESS ?=
OPTIONS ?=

# `make lock` holds this pair: torch and torchvision of different builds fail at import.
PAIR := torch==2.14.1 torchvision==0.29.2

# Memory that a process has had is kept by it, in large pages: training on CPUs frees and asks for hundreds of megabytes
# every step, and fresh pages cost more than the arithmetic on some machines (glibc only, ignored elsewhere).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help env existing reproduce sweep paper grid report readme verify pack unpack status test test-slow browser test-browser lint bench lab clean clean-cache clean-runs lock

RUNS := $(if $(GCNET_RUNS),$(GCNET_RUNS),runs)
DONE := $(RUNS)/done/$(STUDY)
REPORT := $(if $(GCNET_RESULTS),$(GCNET_RESULTS),results)/$(STUDY)/report.html
CODE := $(wildcard gcnet/*.py)
NOTEBOOKS := $(sort $(basename $(notdir $(wildcard notebooks/[0-9][0-9]_*.ipynb))))
# A study may name the notebooks it runs: a line such as notebooks: ["01", "07"]
CHOSEN := $(shell sed -n 's/^notebooks: *//p' params/$(STUDY).yaml 2> /dev/null | tr -c '0-9\n' ' ')
ifneq ($(strip $(CHOSEN)),)
NOTEBOOKS := $(filter $(CHOSEN:%=%_%),$(NOTEBOOKS))
endif

RECENT := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
FIND_PYTHON := for python in python3 python3.13 python3.12 python3.11; do \
	$$python $(RECENT) 2> /dev/null && echo $$python && break; done
NEEDED := torch torchvision numpy pandas sklearn pydantic yaml safetensors PIL matplotlib seaborn papermill ipykernel
ifneq ($(and $(filter reproduce sweep verify,$(MAKECMDGOALS)),$(filter 10_%,$(NOTEBOOKS))),)
NEEDED += torch_pruning
endif
LACKING := -c 'import sys, importlib.util as u; lack = [n for n in sys.argv[1:] if not u.find_spec(n)]; \
	sys.exit(bool(lack) and "python lacks: " + ", ".join(lack))' $(NEEDED)
IMPORTABLE := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"

ifdef PYTHON
PY := $(PYTHON)
ENV := existing
else
PY := .venv/bin/python
ENV := .venv/installed
endif

# Said while the file is read, before anything is installed or run.
ifneq ($(filter reproduce sweep status clean verify report pack unpack,$(MAKECMDGOALS)),)
STUDIES := $(sort $(basename $(notdir $(shell grep -l '^study:' params/*.yaml))))
ifeq ($(filter $(STUDY),$(STUDIES)),)
NEAREST := $(shell python3 -c 'import sys, difflib; name, *known = sys.argv[1:]; \
	print(*([k for k in known if k.startswith(name)] or difflib.get_close_matches(name, known, 1, 0.3))[:1])' \
	'$(STUDY)' $(STUDIES) 2> /dev/null)
$(error unknown study '$(STUDY)';$(if $(NEAREST), did you mean '$(NEAREST)'?) known: $(STUDIES))
endif
endif

help:
	@echo "Ghost Connect-Net and its peers. Targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo "Variables, as in make reproduce STUDY=smoke:"
	@sed -n 's/^## /  /p' Makefile

# --- environment ----------------------------------------------------------------------------------------------------

env: $(ENV)  ## build .venv from requirements.lock (about 6 GB)
	@$(PY) -c 'import sys; print("environment:", sys.prefix)'

.venv/installed: requirements.lock pyproject.toml
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then \
		echo "python >= 3.11 is needed to build .venv, found: $$(python3 --version 2>&1); or give an environment:" \
			"make ... PYTHON=/path/to/python" >&2; exit 1; fi; \
	echo "building .venv from requirements.lock: about 6 GB, a minute or more"; \
	$$python -m venv .venv
	@.venv/bin/python -m pip install -qq --disable-pip-version-check --requirement requirements.lock
	@.venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

existing:
	@$(PY) $(RECENT) || { echo "PYTHON=$(PY) does not run or is older than python 3.11" >&2; exit 1; }
	@$(PY) $(LACKING) || { echo "PYTHON=$(PY) needs the packages of pyproject.toml" >&2; exit 1; }

# --- the chain: a stage is done when its marker is newer than all it was made from ----------------------------------

reproduce: $(REPORT)  ## run a study: every notebook that is not done yet, and its report
	@echo "study $(STUDY): done, see $(REPORT)"

$(REPORT): $(NOTEBOOKS:%=$(DONE)/%.json)
	@$(PY) -m gcnet report --study $(STUDY)

sweep: $(DONE)/sweep.json  ## only compute the study's cells, on all cores (reproduce does it first)

$(DONE)/sweep.json: params/$(STUDY).yaml $(CODE) | $(ENV)
	@$(PY) -m gcnet sweep --study $(STUDY) $(if $(JOBS),--jobs $(JOBS)) --executor $(EXECUTOR) \
		$(if $(ADDRESS),--address $(ADDRESS)) $(OPTIONS:%=--option %)

$(DONE)/%.json: notebooks/%.ipynb params/$(STUDY).yaml $(wildcard params/claims.yaml) $(CODE) | $(ENV)
	@$(if $(filter $(FREE),$@),$(HALVED)) $(PY) -m gcnet run $< --study $(STUDY)

# A notebook needs nothing but the sweep, the quick start not even that. Those that measure times (06, 07, 10) run when
# nothing else does, one after the other; 09 reads what the others conclude.
done_of = $(patsubst %,$(DONE)/%.json,$(filter $(1),$(NOTEBOOKS)))
FREE := $(call done_of,$(filter-out 06_% 07_% 09_% 10_%,$(NOTEBOOKS)))
$(call done_of,$(filter-out 00_%,$(NOTEBOOKS))): $(DONE)/sweep.json
define after
ifneq ($(call done_of,$(1)),)
$(call done_of,$(1)): | $(FREE) $(call done_of,$(2))
endif
endef
$(eval $(call after,06_%,))
$(eval $(call after,07_%,06_%))
$(eval $(call after,10_%,06_% 07_%))
ifneq ($(call done_of,09_%),)
$(call done_of,09_%): $(call done_of,$(filter-out 00_% 09_%,$(NOTEBOOKS)))
endif

# Two notebooks at a time, where the command line does not say -jN: drawing keeps one core busy. Each gets half of the
# cores: more threads than cores take several times as long.
HALVED := OMP_NUM_THREADS=$$((($$(nproc) + 1) / 2))
ifneq ($(filter reproduce paper,$(MAKECMDGOALS)),)
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j2
endif
endif

PAPER := cifar10_vgg16_bn cifar10_resnet18 fashion_mnist_vgg16_bn fashion_mnist_resnet18 tiny_imagenet_vgg16_bn \
	tiny_imagenet_resnet18
ifeq ($(SCALE),quarter)
PAPER := $(PAPER:%=%_quarter)
endif

# One study after the other; one that fails does not stop the rest, and is named at the end.
paper: | $(ENV)  ## run every study of the paper's grid (SCALE=quarter: those for two CPU cores) and build its tables
	@failed=; for study in $(PAPER); do $(MAKE) --no-print-directory reproduce STUDY=$$study || failed="$$failed $$study"; \
	done; $(MAKE) --no-print-directory grid SCALE=$(SCALE) && \
	if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

grid: | $(ENV)  ## build the tables across studies from the results that there are
	@$(PY) -m gcnet grid paper$(if $(filter quarter,$(SCALE)),_quarter) $(PAPER)

readme: | $(ENV)  ## fill in README.md's answer, verdicts, systems, times, speed and zoo from results/
	@$(PY) -m gcnet readme

report: | $(ENV)  ## write results/STUDY/report.html, one page to read or mail of all that the notebooks wrote
	@$(PY) -m gcnet report --study $(STUDY)

verify: | $(ENV)  ## compute the study again in a folder of its own and compare its tables with the committed ones
	@$(PY) -m gcnet verify --study $(STUDY) $(if $(JOBS),--jobs $(JOBS))

pack: | $(ENV)  ## write what the study computed to results/STUDY/store.zip, without the large files
	@$(PY) -m gcnet pack --study $(STUDY)

unpack: | $(ENV)  ## start from the packed results of the study instead of computing them
	@$(PY) -m gcnet unpack --study $(STUDY)

status:  ## which stages of the study are done or stale, and why
	@if command -v "$(PY)" > /dev/null; then $(PY) -m gcnet status --study $(STUDY); \
	else echo "nothing has run yet: $(PY) is not there (make reproduce builds it)"; fi

# --- development ----------------------------------------------------------------------------------------------------

test: | $(ENV)  ## run the tests, but the slow ones
	@$(IMPORTABLE) OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 -m "not slow and not browser"

test-slow: | $(ENV)  ## run the slow tests
	@$(IMPORTABLE) $(PY) -m pytest -q -m slow

browser:
	@command -v chromium > /dev/null && command -v chromedriver > /dev/null || { \
		echo "installing chromium and its driver from Debian's packages"; \
		as=; [ "$$(id -u)" = 0 ] || as=sudo; \
		$$as apt-get update -qq && $$as apt-get install -y -qq chromium chromium-driver > /dev/null; } \
		|| { echo "chromium and chromium-driver could not be installed: install them by hand, then again" >&2; exit 1; }

test-browser: browser | $(ENV)  ## drive JupyterLab and the report in headless Chromium (installed from Debian's packages)
	@$(IMPORTABLE) $(PY) -m pytest -q -m browser

lint: | $(ENV)  ## check the style of code and notebooks
	@$(PY) -m ruff check .

bench: | $(ENV)  ## measure speed against peers, into results/benchmarks/
	@$(PY) -m benchmarks

lab: | $(ENV)  ## open the notebooks in JupyterLab
	@$(IMPORTABLE) $(PY) -m jupyterlab notebooks/00_quickstart.ipynb

clean:  ## remove the study's results and python's caches; what was computed stays, and draws them again
	rm -rf "$(dir $(REPORT))" "$(DONE)"
	rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	@echo "kept: data/, .venv/ and all that was computed in $(RUNS)/; git restores results that were committed"

clean-cache:  ## remove decoded and corrupted images, which are made again in seconds
	rm -rf "$(RUNS)"/cache "$(RUNS)"/corrupted-*

clean-runs:  ## remove all that was computed, of every study; asks for YES=1
ifeq ($(YES),1)
	rm -rf "$(RUNS)"
else
	@du -sh "$(RUNS)" 2> /dev/null || echo "nothing in $(RUNS)"
	@echo "this can be days of computing; to remove it: make clean-runs YES=1"
endif

lock:  ## resolve requirements.lock anew from pyproject.toml
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && python=$$($(FIND_PYTHON)) \
	&& $$python -m venv "$$scratch/uv" && "$$scratch/uv/bin/python" -m pip install --quiet uv \
	&& printf '%s\n' $(PAIR) > "$$scratch/pair.txt" \
	&& "$$scratch/uv/bin/uv" pip compile pyproject.toml --extra dev --universal --python-version 3.11 --upgrade \
		--constraint "$$scratch/pair.txt" --no-emit-index-url --no-emit-find-links --no-annotate --quiet \
		--cache-dir "$$scratch/cache" --custom-compile-command "make lock" --output-file requirements.lock
