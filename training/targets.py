# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Kinds of targets that losses and metrics take.

python -c "from training.targets import KINDS; print(*KINDS)"
"""

# (N,) integers; (N, K) that sum to 1; (N, K) of zeros and ones; (N, D), or (N,) for one.
KINDS = {
    "class": "one class per image",
    "soft": "mixed labels (of --mixup or --cutmix)",
    "multi": "several classes per image",
    "number": "numbers",
}
