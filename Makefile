# On a fresh machine with Python and make, run `make demo` or `make test`. `make check` is the quick part of `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
TOOLS := .venv-tools
LOCKED := 3 11 linux x86_64

.PHONY: demo check test lint lock audit sbom clean

# install(environment, lock file, further commands, packages to install if there is no lock for this Python)
# With a lock, every file is checked against its hash before any of its code runs.
define install
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@found=$$($(1)/bin/python -c 'import platform, sys; print(*sys.version_info[:2], sys.platform, platform.machine())'); \
	pip="$(1)/bin/python -m pip --quiet --disable-pip-version-check install"; \
	if [ "$$found" = "$(LOCKED)" ]; then echo "installing what $(2) locks"; $$pip --require-hashes --requirement $(2) $(3); \
	else echo "note: $(2) is for Python $(LOCKED), this is $$found: installing without lock" >&2; $$pip $(4); fi
	touch $(1)/installed
endef

$(STAMP): pyproject.toml requirements/ci.lock
	$(call install,$(VENV),requirements/ci.lock,&& $$pip --no-deps --no-build-isolation --editable .,--editable '.[dev]')

$(TOOLS)/installed: requirements/tools.lock
	$(call install,$(TOOLS),requirements/tools.lock,,--requirement requirements/tools.in)

demo: $(STAMP)  ## trains on real textures that come with scikit-image, evaluates, writes demo/report.html
	$(BIN)/unflaw demo --out demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

check: lint  ## for daily work: lint, types, import rules and the fast tests
	$(BIN)/pytest -n logical --dist worksteal -m "not slow"

test: lint  ## everything that CI runs
	$(BIN)/pytest -n logical --dist worksteal

COMPILE := $(TOOLS)/bin/uv pip compile --quiet --system-certs --generate-hashes --no-header --python-version 3.11 \
	--python-platform x86_64-manylinux_2_28 $(if $(UPGRADE),--upgrade)

lock: $(TOOLS)/installed  ## run after a change of dependencies; UPGRADE=1 takes the newest versions, otherwise locked ones stay
	$(COMPILE) pyproject.toml requirements/ci.in --extra dev --output-file requirements/ci.lock
	$(COMPILE) requirements/tools.in --output-file requirements/tools.lock
	touch $(TOOLS)/installed

audit: $(TOOLS)/installed  ## checks every locked release with the advisory service of PyPI; --strict: no answer is a failure
	@$(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes --requirement requirements/ci.lock || \
	{ echo "audit: not passed. Above: known vulnerabilities, or releases of which the service says nothing," >&2; \
	echo "as where it cannot be reached; then run this on a machine that reaches it" >&2; exit 1; }

sbom: $(TOOLS)/installed $(STAMP)  ## writes the bill of materials of the environment, as CycloneDX: sbom.json
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file sbom.json $(BIN)/python

clean:
	rm -rf $(VENV) $(TOOLS) demo sbom.json .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
