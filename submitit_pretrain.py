# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Submit main_pretrain.py to a SLURM cluster.

python submitit_pretrain.py --nodes 4 --ngpus 8 --model convnextv2_base --data_path /data/imagenet
"""

from functools import partial

from config import parser as options
from parallel import slurm, submit

Trainer = partial(slurm.Trainer, "main_pretrain")

if __name__ == "__main__":
    submit.run("main_pretrain", options.pretrain_parser())
