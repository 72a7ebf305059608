# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Files in a run's folder that more than one package knows: their names, and lines of log.txt.

python -c "from config import run_files; print(run_files.RECORD)"
"""

import json
import math
from collections.abc import Mapping
from typing import Any

RECORD = "run.json"  # what the run was: see docs/insight.md
LOG = "log.txt"  # a JSON object per epoch
ARGS = "args.yaml"  # its flags
LOCK = ".lock"  # held by a live run, which touches it every few seconds
SILENCE = 60.0  # seconds without a heartbeat after which another run may take over the folder
PLACES = ("epoch", "after_epochs", "step", "n_parameters")  # values of log.txt that are no metrics


def parse_line(line: bytes) -> dict[str, Any]:
    """Return the values of a line of log.txt; {} for half a line, as after a power cut."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def position_of(row: Mapping[str, Any]) -> float:
    """Return the epochs done at a row of log.txt or metrics.csv; inf for a damaged one."""
    within = row.get("after_epochs") not in (None, "")
    try:
        epoch = float(str(row["after_epochs" if within else "epoch"]))  # so True is no number
    except (KeyError, ValueError):
        return math.inf
    return (epoch if within else epoch + 1) if math.isfinite(epoch) else math.inf
