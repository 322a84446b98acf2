# On a machine with Python 3.11 to 3.13 and pip, each target below does everything it needs by itself.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
DEMO := .venv/.installed-demo
DEV := .venv/.installed-dev

.PHONY: demo demo-slurm test test-fast test-long test-cluster check format

demo: $(DEMO)  ## train a small image-to-image model on the CPU, and judge its pictures
	$(BIN)/python -m benchmarks.learning

SHORT := optim.steps=60 optim.warmup_steps=10 validate.every=null checkpoint.every=30 wandb.mode=off

demo-slurm: $(DEMO)  ## two nodes of a real Slurm on this machine (needs root, and Debian's slurm-wlm and munge)
	export SYNTHOS_PRACTICE=/tmp/synthos-demo-$$$$; trap "slurm/practice.sh down" EXIT; \
		line="$$(slurm/practice.sh up)" && eval "$$line" && $(BIN)/python launch/submit.py recipe=i2i \
		experiment=i2i_photos cluster=practice nodes=2 gpus_per_node=2 batch.micro=8 $(SHORT) follow=true

# A process per core; each does one file's tests after another, in the order in which they are found.
# One thread each: threads of several processes that wait for each other's cores take many times as long.
test test-fast test-long: export OMP_NUM_THREADS := 1
SPREAD := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(DEV)
	$(BIN)/python -m pytest $(SPREAD) -m "not cluster and not long"

test-long: $(DEV)  ## the same on other ranks, nodes, meshes and back ends
	$(BIN)/python -m pytest $(SPREAD) -m long

test-cluster: $(DEV)  ## every way in which a cluster interrupts a run, on the practice Slurm
	$(BIN)/python -m pytest -m cluster

test-fast: $(DEV)
	$(BIN)/python -m pytest $(SPREAD) -m "not slow and not long"

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A stamp is newer than what it was installed from, so nothing is installed twice.
$(DEMO): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[demo]'
	touch $@

$(DEV): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[demo,dev]'
	touch $(DEMO) $@
