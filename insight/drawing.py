# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Pictures with Pillow alone: grids of images with texts, maps of points, and distributions.

python -c "from insight.drawing import class_colors; print(class_colors(3))"
"""

import colorsys
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image, to_tensor

from insight.feature_files import write_output

INK, GRAY, LIGHT, GRID = "#1f2933", "#6b7785", "#9aa5b1", "#e4e7eb"
GOOD, BAD, BLUE = "#2f8f4e", "#c8402f", "#3b6fb6"
# Colors of classes: Tableau 10 by Maureen Stone, and lighter or darker variants.
COLORS = ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#ff9da7"]
COLORS += ["#9c755f", "#8a8d91", "#a0cbe8", "#ffbe7d", "#8cd17d", "#ff8f86", "#d4a6c8", "#499894"]
COLORS += ["#b6992d", "#d37295", "#d7b5a6", "#4a4e54"]
MOST_IN_LEGEND = 20
CELL, WIDE = 112, 160  # pixels of an image in a grid, at least; with long texts
WIDEST_TITLE = 1000  # pixels to which a title may widen a grid
SCALE = 3  # of a map before it is made smaller, for smooth dots


@dataclass
class Cell:
    """An image of a grid, with lines of text and the end of its path below it.

    frame: its color, '' for none. path: of the image, '' to show none.
    """

    image: Image.Image
    lines: Sequence[str] = ()
    frame: str = ""
    path: str = ""


def class_colors(count: int) -> list[str]:
    """Return a color for each class: COLORS, and for more classes hues that are far apart."""
    if count <= len(COLORS):
        return COLORS[:count]
    colors = []
    for number in range(count):
        hue = number * (5**0.5 - 1) / 2 % 1  # the golden ratio
        parts = colorsys.hls_to_rgb(hue, (0.42, 0.58, 0.5)[number % 3], 0.62)
        colors.append("#" + "".join(f"{round(255 * part):02x}" for part in parts))
    return colors


def fit_text(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, room: int) -> str:
    """Return a text, shortened in the middle so that it fits into so many pixels."""
    if draw.textlength(text, font) <= room:
        return text
    for kept in range(len(text) - 1, 1, -1):
        short = f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"
        if draw.textlength(short, font) <= room:
            return short
    return "…"


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Return folder and file of each path, and folders above where two would have one name."""
    whole = {path: PurePath(path).as_posix() for path in paths}
    names, count = {}, 2
    while len({*names.values()}) < len({*whole.values()}):
        names = {path: "/".join(full.split("/")[-count:]) for path, full in whole.items()}
        count += 1
    return names


def wrap_name(name: str, font: ImageFont.FreeTypeFont, room: int) -> list[str]:
    """Break a path into lines of so many pixels, after a `/` if the rest needs a line anyway."""
    lines = []
    while font.getlength(name) > room and len(name) > 1:
        fits = len(name) - 1
        while font.getlength(name[:fits]) > room and fits > 1:
            fits -= 1
        end = name.rfind("/", 0, fits) + 1 or fits
        lines.append(name[:end])
        name = name[end:]
    return [*lines, name]


def draw_grid(
    rows: Sequence[Sequence[Cell]], title: str, heads: Sequence[str] = (), least: int = CELL
) -> Image.Image:
    """Draw rows of images of equal width, with a title, and perhaps names of the columns.

    least: pixels of the width, at least; smaller images are enlarged by a whole factor.
    """
    width = max(cell.image.width for row in rows for cell in row)
    width *= -(-least // width)
    gap, line, columns = 12, 18, max(map(len, rows))
    text, bold = ImageFont.load_default(13), ImageFont.load_default(16)
    rows = _with_names(rows, text, width)
    needed = min(round(bold.getlength(title)) + 2 * gap, WIDEST_TITLE)
    total = max(2 * gap + columns * (width + gap) - gap, needed)
    top = gap + 28 + (line + 2) * bool(heads)
    heights = [max(_height(cell, width) + line * len(cell.lines) for cell in row) for row in rows]
    canvas = Image.new("RGB", (total, top + sum(heights) + (gap + 4) * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, gap), fit_text(draw, title, bold, total - 2 * gap), INK, bold)
    for column, head in enumerate(heads):
        draw.text((gap + column * (width + gap), top - line - 2), head, GRAY, text)
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            left = gap + column * (width + gap)
            _paste(canvas, draw, cell, (left, top), width)
            below = top + _height(cell, width) + 3
            for number, words in enumerate(cell.lines):
                color = INK if number == 0 else GRAY
                place = left, below + number * line - 1
                draw.text(place, fit_text(draw, words, text, width), color, text)
        top += height + gap + 4
    return canvas


def draw_images(
    images: Sequence[Tensor], texts: Sequence[str], paths: Sequence[str], columns: int, title: str
) -> Tensor:
    """Draw images (3, H, W) in 0 to 1 with texts and names below: (3, height, width) in 0 to 1.

    texts: of one or several lines. paths: of the images, '' for those without a name.
    """
    cells = [
        Cell(to_pil_image(x.cpu().float().clamp(0, 1)), text.splitlines(), path=path)
        for x, text, path in zip(images, texts, paths, strict=True)
    ]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    return to_tensor(draw_grid(rows, title, least=WIDE))


def _with_names(
    rows: Sequence[Sequence[Cell]], font: ImageFont.FreeTypeFont, width: int
) -> list[list[Cell]]:
    """Return the cells with the names of their images as further lines."""
    names = short_names([cell.path for row in rows for cell in row if cell.path])
    return [
        [
            replace(cell, lines=[*cell.lines, *wrap_name(names[cell.path], font, width)])
            if cell.path
            else cell
            for cell in row
        ]
        for row in rows
    ]


def _height(cell: Cell, width: int) -> int:
    return round(cell.image.height * width / cell.image.width)


def _paste(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, place: tuple[int, int], width: int
) -> None:
    size = width, _height(cell, width)
    how = Image.Resampling.NEAREST if cell.image.width < width else Image.Resampling.LANCZOS
    canvas.paste(cell.image.convert("RGB").resize(size, how), place)
    if cell.frame:
        left, top = place
        box = left - 3, top - 3, left + size[0] + 2, top + size[1] + 2
        draw.rectangle(box, outline=cell.frame, width=3)


def draw_map(
    points: Tensor,
    labels: Tensor | None,
    names: Sequence[str],
    title: str,
    axes: Sequence[str],
    side: int = 560,
) -> Image.Image:
    """Draw points (N, 2), colored by class, with a legend of the classes.

    labels: (N,) or None; names: of the classes, () without labels.
    """
    plot, counts = _draw_points(points, labels, len(names), side), []
    if labels is not None:
        counts = np.bincount(labels.numpy(), minlength=len(names)).tolist()
    shown = [number for number in range(len(names)) if counts[number]]
    shown = sorted(shown, key=lambda number: -counts[number])[:MOST_IN_LEGEND]
    more = sum(count > 0 for count in counts) - len(shown)
    shown.sort()
    edge, top, bottom = 40, 52, 38
    legend = 190 if shown else 0
    canvas = Image.new("RGB", (edge + side + 16 + legend, top + side + bottom), "white")
    canvas.paste(plot, (edge, top))
    draw, text, bold = ImageDraw.Draw(canvas), *map(ImageFont.load_default, (13, 17))
    draw.text((edge, 16), fit_text(draw, title, bold, canvas.width - 2 * edge), INK, bold)
    draw.rectangle((edge, top, edge + side, top + side), outline=GRID)
    draw.text((edge + side / 2, top + side + 10), axes[0], GRAY, text, "mt")
    canvas.paste(_upright(axes[1], text, side), (12, top))
    colors, left = class_colors(len(names)), edge + side + 18
    for row, number in enumerate(shown):
        y = top + 6 + 22 * row
        draw.ellipse((left, y + 2, left + 11, y + 13), fill=colors[number])
        words = f"{names[number]} ({counts[number]:,})"
        draw.text((left + 20, y), fit_text(draw, words, text, legend - 30), INK, text)
    if more:
        draw.text((left, top + 8 + 22 * len(shown)), f"and {more} more classes", GRAY, text)
    return canvas


def _draw_points(points: Tensor, labels: Tensor | None, classes: int, side: int) -> Image.Image:
    """Draw dots at a larger scale, made smaller afterwards, in an order that favors no class."""
    values = points.double().numpy()
    low, high = values.min(0), values.max(0)
    half = max((high - low).max() / 2, 1e-12) * 1.06  # one scale for both axes
    places = ((values - (low + high) / 2) / half + 1) / 2 * side * SCALE
    radius = SCALE * min(5.0, max(1.4, 90 / math.sqrt(len(values))))
    canvas = Image.new("RGB", (side * SCALE,) * 2, "white")
    draw, colors = ImageDraw.Draw(canvas, "RGBA"), class_colors(max(classes, 1))
    for number in np.random.default_rng(0).permutation(len(values)).tolist():
        color = BLUE if labels is None else colors[int(labels[number])]
        x, y = places[number][0], side * SCALE - places[number][1]
        box = x - radius, y - radius, x + radius, y + radius
        draw.ellipse(box, fill=f"{color}c8", outline="#ffffffa0", width=SCALE // 2)
    return canvas.resize((side, side), Image.Resampling.LANCZOS)


def _upright(words: str, font: ImageFont.FreeTypeFont, length: int) -> Image.Image:
    """Draw a text that reads from bottom to top, in the middle of a strip."""
    strip = Image.new("RGB", (length, 20), "white")
    ImageDraw.Draw(strip).text((length / 2, 2), words, GRAY, font, "mt")
    return strip.transpose(Image.Transpose.ROTATE_90)


def draw_histograms(
    layers: Sequence[tuple[str, Tensor, str]], title: str, axis: str, columns: int = 4
) -> Image.Image:
    """Draw the distribution of values in 0 to 1 of each layer: (name, values, note)."""
    width, height, gap, left = 190, 118, 22, 20
    columns = min(columns, len(layers))
    rows = -(-len(layers) // columns)
    top = 56
    size = left + columns * (width + gap), top + rows * (height + 46) + 24
    canvas = Image.new("RGB", (max(size[0], 420), size[1]), "white")
    draw, text, bold = ImageDraw.Draw(canvas), *map(ImageFont.load_default, (12, 17))
    draw.text((left, 16), fit_text(draw, title, bold, canvas.width - 2 * left), INK, bold)
    for number, (name, values, note) in enumerate(layers):
        x, y = left + number % columns * (width + gap), top + number // columns * (height + 46)
        draw.text((x, y), fit_text(draw, name, text, width - 74), INK, text)
        draw.text((x + width, y), note, GRAY, text, "ra")
        _draw_histogram(draw, values, (x, y + 20, x + width, y + 20 + height - 16))
        for tick, anchor in ((0, "lt"), (0.5, "mt"), (1, "rt")):
            draw.text((x + tick * width, y + height + 7), f"{tick:g}", LIGHT, text, anchor)
    draw.text((left, canvas.height - 20), axis, GRAY, text)
    return canvas


def _draw_histogram(draw: ImageDraw.ImageDraw, values: Tensor, box: Sequence[int]) -> None:
    """Draw 40 bars, the highest as high as the box, and the mean as a line."""
    left, top, right, bottom = box
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = left + tick * (right - left)
        draw.line((x, top, x, bottom), fill=GRID)
    if len(values):
        counts, _ = np.histogram(values.numpy(), bins=40, range=(0, 1))
        step = (right - left) / len(counts)
        for number, count in enumerate(counts.tolist()):
            y = bottom - (bottom - top - 2) * count / counts.max()
            if count:
                x = left + number * step
                draw.rectangle((x + 0.5, min(y, bottom - 1), x + step - 0.5, bottom), fill=BLUE)
        x = left + float(values.mean()) * (right - left)
        draw.line((x, top, x, bottom), fill=BAD, width=2)
    draw.line((left, bottom, right, bottom), fill=LIGHT)


def write_picture(picture: Image.Image, path: str | Path, drawn: bool = False) -> None:
    """Write a PNG file, and its folder if there is none.

    drawn: the picture shows no images, and 256 colors are enough.
    """
    content = io.BytesIO()
    picture = picture.quantize(256, dither=Image.Dither.NONE) if drawn else picture
    picture.save(content, "PNG", optimize=True)
    write_output(content.getvalue(), Path(path))
