# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Names of the files in a run's folder that more than one package knows.

python -c "from config import run_files; print(run_files.RECORD)"
"""

RECORD = "run.json"  # what the run was: see docs/insight.md
LOG = "log.txt"  # a JSON object per epoch
ARGS = "args.yaml"  # its flags
LOCK = ".lock"  # held by a live run, which touches it every few seconds
SILENCE = 60.0  # seconds without a heartbeat after which another run may take over the folder
