# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Submit main_finetune.py to a SLURM cluster.

python submitit_finetune.py --nodes 4 --ngpus 8 --model convnextv2_base --data_path /data/imagenet
"""

from functools import partial

from config import parser as options
from parallel import slurm, submit

Trainer = partial(slurm.Trainer, "main_finetune")

if __name__ == "__main__":
    submit.run("main_finetune", options.finetune_parser())
