# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Images of two classes for the benchmarks that read CIFAR-10 from a zip."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def toy_zip(tmp_path_factory) -> Path:
    """Two classes of 16 x 16 noise, 9 images to train and 5 to evaluate each, and a stray file."""
    path, random = tmp_path_factory.mktemp("zip") / "toy.zip", np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train/README.txt", "no image")
        for split, count in (("train", 9), ("val", 5)):
            for label, name in enumerate(("bird", "car")):
                for number in range(count):
                    pixels = random.integers(0, 156, (16, 16, 3), np.uint8) + np.uint8(99 * label)
                    file = io.BytesIO()
                    Image.fromarray(pixels).save(file, "JPEG")
                    archive.writestr(f"{split}/{name}/{number}.jpg", file.getvalue())
    return path
