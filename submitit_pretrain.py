# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Send main_pretrain.py to a cluster.

python submitit_pretrain.py --nodes 8 --ngpus 8 --model convnextv2_base --data_path /data/imagenet
"""

from __future__ import annotations

from functools import partial

import options
import slurm

Trainer = partial(slurm.Trainer, "main_pretrain")

if __name__ == "__main__":
    parser = options.pretrain_parser()
    options.add_submitit_args(parser)
    slurm.submit("main_pretrain", options.parse(parser))
