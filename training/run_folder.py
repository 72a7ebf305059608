# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The folder of a run that was given none, and the words that tell how to continue in it.

python main_pretrain.py --data_set DIGITS --model convnextv2_atto --device cpu --max_minutes 0.1
"""

import atexit
import contextlib
import itertools
import re
import time
from pathlib import Path
from typing import Any

from config.flags import is_pretraining
from errors import UserError
from parallel import console
from parallel.process_group import from_main_process, recall, remember

PARENT = Path("runs")
KEY = "output_dir"  # in the launcher's store


def folder_name(args: Any, model: str, now: float) -> Path:
    """Return `runs/pretrain-convnextv2_atto-20261129-1530` for a run that starts now."""
    script = "pretrain" if is_pretraining(vars(args)) else "finetune"
    model = model.partition("(")[0]  # of name(arguments)
    model = re.sub(r"[^\w.-]+", "-", model).strip(".-")  # package.module:function
    return PARENT / f"{script}-{model}-{time.strftime('%Y%m%d-%H%M', time.localtime(now))}"


def create_run_folder(args: Any, model: str) -> str:
    """Create a new folder, the same for all ranks; every rank must call it.

    Processes that torchrun starts again continue in the folder of those before.
    """
    return from_main_process(lambda: recall(KEY) or _create(folder_name(args, model, time.time())))


def _create(wanted: Path) -> str:
    try:
        PARENT.mkdir(exist_ok=True)
        for number in itertools.count(1):
            folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                break
    except OSError as error:
        raise UserError(
            f"cannot create {wanted} ({error.strerror}); give --output_dir FOLDER, or "
            "--output_dir none to write nothing"
        ) from error
    remember(KEY, str(folder))
    atexit.register(remove_if_unused, folder)  # runs after the lock is released
    return str(folder)


def remove_if_unused(folder: Path) -> None:
    """Remove a folder of which a run has used nothing, since it failed before it began."""
    with contextlib.suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {console.NAME}:
            (folder / console.NAME).unlink(missing_ok=True)
            folder.rmdir()
            folder.parent.rmdir()  # if it is empty too


def how_to_continue(args: Any) -> str:
    """Return the words `rerun the same command`, with the folder if the command did not name it."""
    if "output_dir" in args.given:
        return "rerun the same command"
    return f"rerun the command with --output_dir {args.output_dir}"
