# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Peak speeds of GPUs, for the model FLOPs utilization (MFU).

python -c "from training.mfu import peak_flops; print(peak_flops('NVIDIA H200', 'bf16'))"
"""

import re

PRECISIONS = ("none", "tf32", "fp16", "bf16")
# TFLOP/s of dense products as NVIDIA publishes them: in float32, in TF32, and in fp16 and bf16 with
# sums in float32; None: the GPU has no unit for it. Sources: the data sheets of the products on
# nvidia.com, those that print figures with sparsity halved; the whitepapers of Turing and Ada.
PEAKS: dict[str, tuple[float, float | None, float | None, float | None]] = {
    r"B200": (75, 1125, 2250, 2250),
    r"H[12]00 NVL": (60, 417.5, 835.5, 835.5),
    r"H100 PCIe": (51, 378, 756, 756),
    r"(H100|H200|GH200)": (67, 494.5, 989.5, 989.5),
    r"A100": (19.5, 156, 312, 312),
    r"A30": (10.3, 82, 165, 165),
    r"A40": (37.4, 74.8, 149.7, 149.7),
    r"A10": (31.2, 62.5, 125, 125),
    r"RTX A6000": (38.7, 77.4, 154.8, 154.8),
    r"L40S": (91.6, 183, 362, 362),
    r"L40": (90.5, 90.5, 181, 181),
    r"L4": (30.3, 60, 121, 121),
    r"RTX 6000 Ada Generation": (91.1, 182.1, 364.2, 364.2),
    r"V100S": (16.4, None, 130, None),
    r"V100-PCIE": (14, None, 112, None),
    r"V100": (15.7, None, 125, None),
    r"T4": (8.1, None, 65, None),
    r"RTX 2080 Ti": (13.4, None, 53.8, None),
}
# TFLOP/s in float32 of GeForce RTX 30, 40 and 50: as fast in TF32, twice as fast in fp16 and bf16,
# in the whitepapers of Ampere GA102, Ada and RTX Blackwell.
GEFORCE = {
    "3060": 12.7, "3060 Ti": 16.2, "3070": 20.3, "3080": 29.8, "3090": 35.6, "3090 Ti": 40.0,
    "4060": 15.1, "4060 Ti": 22.1, "4070": 29.1, "4070 Ti": 40.1, "4080": 48.7, "4090": 82.6,
    "5070": 30.9, "5070 Ti": 43.9, "5080": 56.3, "5090": 104.8,
}  # fmt: skip
PEAKS |= {f"RTX {name}": (x, x, 2 * x, 2 * x) for name, x in GEFORCE.items()}
# Around the name of a product, such as A100 in `NVIDIA A100-SXM4-80GB`. Others are another product:
# laptops, `4090 D`, or a part of one by MIG.
_BEFORE = r"(NVIDIA |Tesla |Quadro |GeForce )*"
_AFTER = r"([- ](SXM|PCIe|PCIE)\d?)?([- ]\d+GB)?( PCIe| HBM\d\w?)*"


def peak_flops(device: str, precision: str) -> float | None:
    """Return the FLOP/s that a GPU reaches at most, None for one that is not in the table.

    device: as torch.cuda.get_device_name returns it. precision: none, tf32, fp16 or bf16.
    """
    for pattern, speeds in PEAKS.items():
        if re.fullmatch(f"{_BEFORE}{pattern}{_AFTER}", device):
            speed = speeds[PRECISIONS.index(precision)]
            return None if speed is None else speed * 1e12
    return None
