# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Pictures of runs, scaled and re-encoded so that all of them fit into a page.

python visualize.py report runs/demo/pretrain
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, features

from errors import first_line
from insight.report_data import ReportData, evenly

MOST = 24  # pictures in a page
OF_A_RUN = 8  # at most, of one name
WIDTH, LEAST_WIDTH = 1120, 200  # pixels of a picture in the page
QUALITY = 80
MOST_PIXELS = 50_000_000  # of a file; larger ones are left out
FEWEST_BYTES = 4_000  # that are worth a picture


@dataclass(frozen=True)
class Picture:
    """A picture as a data URL, after so many epochs of a run (its number)."""

    run: int
    name: str
    epoch: int
    url: str
    width: int
    height: int


def collect_pictures(runs: Sequence[ReportData], room: int) -> tuple[list[Picture], list[str]]:
    """Return pictures of all runs in at most `room` bytes of text, and sentences on those left out.

    Of many epochs some are chosen evenly, the first and the last among them.
    """
    sets = [(i, name, files) for i, run in enumerate(runs) for name, files in run.pictures.items()]
    if not sets:
        return [], []
    each = max(min(OF_A_RUN, MOST // len(sets)), 1)
    chosen = [
        (index, name, epoch, files[epoch])
        for index, name, files in sets[:MOST]
        for epoch in evenly(files, each)
    ]
    limit = room // len(chosen)
    if limit < FEWEST_BYTES:
        return [], [f"There is no room for the {len(chosen)} pictures; name fewer runs."]
    found, problems = [], []
    for index, name, epoch, path in chosen:
        try:
            found.append(Picture(index, name, epoch, *encode(path, limit)))
        except Exception as error:  # Pillow raises many kinds for damaged files
            reason = first_line(error)
            problems.append(f"{name}/{path.name} of {runs[index].name} is left out: {reason}.")
    return found, problems


def encode(path: Path, limit: int) -> tuple[str, int, int]:
    """Return a picture as a data URL of at most `limit` characters, its width and its height.

    Raises ValueError if it is too large for that, or OSError if it cannot be read.
    """
    kind = "WEBP" if features.check("webp") else "JPEG"
    with Image.open(path, formats=["PNG"]) as file:
        if file.width * file.height > MOST_PIXELS:
            raise ValueError(f"{file.width} x {file.height} pixels are too many")
        image = file.convert("RGB")
    width = min(image.width, WIDTH)
    while width >= min(LEAST_WIDTH, image.width):
        height = max(round(image.height * width / image.width), 1)
        small = image.resize((width, height), Image.Resampling.LANCZOS)  # itself if of that size
        content = io.BytesIO()
        small.save(content, kind, quality=QUALITY, method=2)  # method: speed of WebP
        url = f"data:image/{kind.lower()};base64,"
        url += base64.b64encode(content.getbuffer()).decode()
        if len(url) <= limit:
            return url, *small.size
        width = int(width * min(0.9 * math.sqrt(limit / len(url)), 0.8))
    raise ValueError(f"it needs more than {limit} bytes")
