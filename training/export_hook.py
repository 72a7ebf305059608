# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Export of the best checkpoint at the end of a run.

python main_finetune.py --recipe digits_finetune --output_dir runs/digits --hook "export(to=timm)"
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from config.flags import is_pretraining
from config.tool_flags import FOR_ANY_NETWORK, TARGETS
from errors import UserError, resolve_for
from models.heads import is_plain
from parallel.process_group import get_logger
from training.hooks import Hook, Run
from training.log_files import needs_folder
from weights.files import BEST

ROOT = Path(__file__).resolve().parents[1]


class ExportHook(Hook):
    """Export the best checkpoint, or else the newest, at the end of a complete run.

    to: format of export.py, which runs as a process of its own and checks the file.
    """

    def __init__(self, to: str = "safetensors") -> None:
        resolve_for("--hook export(to)", to, list(TARGETS), "format")
        self.to = to

    def check(self, args: Any) -> None:
        needs_folder(args, "export")
        if not args.save_ckpt:
            raise UserError("--hook export: --save_ckpt false leaves nothing to export; drop one")
        flags = vars(args)
        is_convnext = args.model.removeprefix("fcmae_").startswith("convnext")
        own = "" if is_convnext else f"--model {args.model}"
        if own and is_pretraining(flags):
            raise UserError(
                f"--hook export: {own} has no classifier in pre-training, and only a ConvNeXt is "
                "exported without one; drop it"
            )
        if not own and (flags.get("heads") or not is_plain(flags.get("head") or "")):
            own = f"--heads {args.heads}" if args.heads else f"--head {args.head}"
        if own and self.to not in FOR_ANY_NETWORK:
            raise UserError(
                f"--hook export(to={self.to}) is for a ConvNeXt with a linear classifier, not for "
                f"{own}; use one of {', '.join(FOR_ANY_NETWORK)}"
            )

    def on_end(self, run: Run) -> None:
        if not run.is_complete:
            return
        best = run.folder / BEST
        source = best if best.exists() else run.folder
        output = run.folder / f"exported{TARGETS[self.to] or '-' + self.to}"
        package = __name__.removesuffix("training.export_hook")  # '' unless pip has installed it
        script = ["-m", f"{package}export"] if package else [ROOT / "export.py"]
        words = [*script, source, "--to", self.to, "--output", output, "--overwrite", "true"]
        for name in ("model", "head", "heads"):  # of which no checkpoint may choose code
            value = vars(run.args).get(name, "")
            words += [f"--{name}", value] * (":" in value)
        words = [sys.executable, *map(str, words)]
        result = subprocess.run(words, capture_output=True, text=True)
        if result.returncode:
            said = [line for line in result.stderr.splitlines() if line and line[0] not in "( "]
            reason = said[-1] if said else "no message"
            raise UserError(f"export.py ended with code {result.returncode}: {reason}")
        get_logger().info("%s", result.stdout.strip().splitlines()[-1])
