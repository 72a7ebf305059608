# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Console commands that run the scripts of the package.

convnextv2-pretrain --recipe digits_pretrain --output_dir runs/digits
"""

import runpy
from functools import partial


def _run(script: str) -> None:
    """Run a script of the package as if by `python -m`."""
    runpy.run_module(f"{__package__}.{script}", run_name="__main__", alter_sys=True)


pretrain = partial(_run, "main_pretrain")
finetune = partial(_run, "main_finetune")
submit_pretrain = partial(_run, "submitit_pretrain")
submit_finetune = partial(_run, "submitit_finetune")
export = partial(_run, "export")
visualize = partial(_run, "visualize")
pack = partial(_run, "pack")
predict = partial(_run, "predict")
probe = partial(_run, "probe")
