# make demo        pre-train, fine-tune and evaluate on real images: minutes on a laptop
# make test        lint and the tests that prove every module and number: minutes on two cores
# make test-all    every test that needs no SLURM
# make test-slurm  jobs in a real SLURM of two nodes, started on this machine; as root
#
# Without an active virtual environment they make .venv, with the versions of constraints.txt.
# In an active one (venv or conda) only missing packages are installed.

PYTHON ?= python3
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
BIN := $(if $(ACTIVE),$(ACTIVE)/bin,.venv/bin)
DEMO ?= runs/demo

.PHONY: demo test test-rest test-all test-slurm lint install clean

install: $(if $(ACTIVE),active,.venv/installed)

.PHONY: active
active:
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt

.venv/installed: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv
	@echo "installing PyTorch and friends into .venv: a few minutes, some gigabytes, once"
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	@touch $@

demo: install
	$(BIN)/python main_pretrain.py --recipe digits_pretrain --output_dir $(DEMO)/pretrain
	$(BIN)/python main_finetune.py --recipe digits_finetune \
		--finetune $(DEMO)/pretrain --output_dir $(DEMO)/finetune
	$(BIN)/python main_finetune.py --recipe digits_finetune \
		--eval --resume $(DEMO)/finetune
	$(BIN)/python visualize.py --checkpoint $(DEMO)/pretrain \
		--split val --output $(DEMO)/reconstructions.png
	$(BIN)/python visualize.py report $(DEMO)/pretrain $(DEMO)/finetune --output $(DEMO)/report.html
	@echo
	@echo "accuracy          the line above with top-1, top-5 and loss"
	@echo "reconstructions   $(DEMO)/reconstructions.png (input, visible patches, reconstruction)"
	@echo "an epoch a line   $(DEMO)/pretrain/log.txt and $(DEMO)/finetune/log.txt"
	@echo "curves            $(BIN)/tensorboard --logdir $(DEMO)"
	@echo "report            $(DEMO)/report.html: open it in a browser"

test: install lint
	$(BIN)/python tests/run.py -m "not slow"

test-rest: install
	$(BIN)/python tests/run.py -m slow

test-all: test test-rest

test-slurm: install
	TEST_SLURM=1 $(BIN)/python tests/run.py -n 0 tests/slurm

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv runs
