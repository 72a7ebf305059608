# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A grid of images with lines of text above each of them.

python visualize.py explain runs/finetune --images photos
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image, to_tensor

from training.pictures import INK, MIN_WIDTH

WIDTH = 160  # of an image in pixels, at least, so that its texts fit


def draw_grid(
    images: Sequence[Tensor], texts: Sequence[str], columns: int, caption: str = ""
) -> Tensor:
    """Draw images (3, H, W) in 0 to 1 with lines of text above them: (3, height, width) in 0 to 1.

    All images have one size. Texts are cut where they are too long. caption: below all.
    """
    scale = math.ceil(max(WIDTH, MIN_WIDTH) / images[0].shape[2])
    height, width = (side * scale for side in images[0].shape[1:])
    size = max(12, min(width, 2 * WIDTH) // 12)  # of the font
    font, gap, line = ImageFont.load_default(size), size // 2, round(1.4 * size)
    above = line * max(len(text.splitlines()) for text in texts) + gap // 2
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    bottom = gap + rows * (above + height + gap)
    below = line * len(caption.splitlines())
    canvas = Image.new("RGB", (gap + columns * (width + gap), bottom + below + gap), "white")
    pen = ImageDraw.Draw(canvas)

    def write(text: str, x: int, y: int, room: int) -> None:
        while pen.textlength(text, font) > room and len(text) > 2:
            text = f"{text.rstrip('…')[:-1]}…"
        pen.text((x, y), text, INK, font)

    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        left = gap + number % columns * (width + gap)
        top = gap + number // columns * (above + height + gap)
        for place, words in enumerate(text.splitlines()):
            write(words, left, top + place * line, width)
        pixels = F.interpolate(image[None].cpu().float(), scale_factor=scale)[0]
        canvas.paste(to_pil_image(pixels.clamp(0, 1)), (left, top + above))
    for place, words in enumerate(caption.splitlines()):
        write(words, gap, bottom + place * line, canvas.width - 2 * gap)
    return to_tensor(canvas)
