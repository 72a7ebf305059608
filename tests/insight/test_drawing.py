# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Pictures: colors say the class, texts fit, values are at their places."""

import pytest
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

from insight.drawing import (
    BAD,
    BLUE,
    Cell,
    class_colors,
    draw_grid,
    draw_histograms,
    draw_images,
    draw_map,
    fit_text,
    short_names,
    wrap_name,
)


def colors_of(picture: Image.Image) -> set:
    return {color for _, color in picture.convert("RGB").getcolors(1 << 24)}


@pytest.mark.parametrize("count", [2, 20, 100])
def test_classes_have_different_colors(count):
    assert len(set(class_colors(count))) == count


def test_long_names_are_shortened_in_the_middle():
    font = ImageFont.load_default(13)
    draw = ImageDraw.Draw(Image.new("RGB", (9, 9)))
    text = fit_text(draw, "n01440764_a_very_long_name_of_a_file.jpeg", font, 120)
    assert draw.textlength(text, font) <= 120
    assert text.startswith("n01440")
    assert text.endswith(".jpeg")
    assert fit_text(draw, "short", font, 120) == "short"
    assert fit_text(draw, "any", font, 1) == "…"


def test_names_of_different_images_differ():
    """With class folders four of eight captions were the same."""
    paths = ["photos/cat/0.jpg", "photos/dog/0.jpg", "photos/cat/1.jpg", "photos/cat/0.jpg"]
    assert [*short_names(paths).values()] == ["cat/0.jpg", "dog/0.jpg", "cat/1.jpg"]
    deep = ["photos/cat/old/0.jpg", "photos/dog/old/0.jpg"]
    assert [*short_names(deep).values()] == ["cat/old/0.jpg", "dog/old/0.jpg"]
    assert short_names(["number 7", "/1.jpg", "a//b/1.jpg", "a/b/1.jpg"]) == {
        "number 7": "number 7",
        "/1.jpg": "/1.jpg",
        "a//b/1.jpg": "b/1.jpg",
        "a/b/1.jpg": "b/1.jpg",
    }
    assert short_names([]) == {}


def test_no_letter_of_a_long_name_is_lost():
    """Shortened in the middle, names that differ only there looked the same."""
    font = ImageFont.load_default(13)
    names = [f"n03045698/n03045698_{n}_n03045698_cloak.JPEG" for n in range(1201, 1204)]
    for name in names:
        lines = wrap_name(name, font, 112)
        assert "".join(lines) == name
        assert lines[0] == "n03045698/"
        assert all(font.getlength(line) <= 112 for line in lines)
    assert wrap_name("cat/1.jpg", font, 112) == ["cat/1.jpg"]
    assert wrap_name("abc", font, 1) == ["a", "b", "c"]


def test_grid_has_room_for_names():
    image = Image.new("RGB", (112, 8))
    cells = [Cell(image, ["a"]), Cell(image, ["a"], path="photos/cat/1.jpg")]
    cells.append(Cell(image, ["a"], path=f"photos/{30 * 'm'}/1.jpg"))
    heights = [draw_grid([[cell]], "title").height for cell in cells]
    assert heights[1] - heights[0] == 18  # a line
    assert heights[2] > heights[1] + 18


def test_grid_shows_each_image_enlarged_with_its_frame():
    shades = [10, 90, 200]
    cells = [Cell(Image.new("RGB", (8, 4), (shade,) * 3), ["a", "b"]) for shade in shades]
    cells[2].frame = BAD
    picture = draw_grid([cells[:2], cells[2:]], "title", ["one", "two"])
    found = colors_of(picture)
    assert {(shade,) * 3 for shade in shades} <= found
    assert ImageColor.getrgb(BAD) in found
    assert picture.width >= 2 * 112
    narrow = draw_grid([[Cell(Image.new("RGB", (3, 200)))]], "a title that is longer than the rest")
    assert narrow.width >= 240  # room for the title
    assert draw_grid([cells], 30 * "long title ").width == 1000


def test_points_are_at_their_places_in_the_color_of_their_class():
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    labels = torch.tensor([0, 1, 1])
    picture = draw_map(points, labels, ["x", "y", "z"], "map", ["one", "two"], side=200)
    plot = picture.crop((40, 52, 240, 252)).convert("RGB")

    def nearest_class(x: int, y: int) -> int:
        color = plot.getpixel((x, y))
        known = [ImageColor.getrgb(each) for each in class_colors(3)]
        gaps = [sum(abs(a - b) for a, b in zip(color, each, strict=True)) for each in known]
        return gaps.index(min(gaps))

    low, high = round(200 * (1 - 1 / 1.06) / 2), round(200 * (1 + 1 / 1.06) / 2)
    assert nearest_class(low, high) == 0  # (0, 0) is at the bottom left
    assert nearest_class(high, low) == nearest_class(high, high) == 1
    assert plot.getpixel((100, 100)) == (255, 255, 255)
    assert draw_map(points, None, [], "map", ["", ""], side=200).width < picture.width  # no legend


def test_map_of_equal_points_and_of_many_classes_is_drawn():
    labels = torch.arange(60) % 50
    picture = draw_map(torch.zeros(60, 2), labels, list(map(str, range(50))), "", ["", ""])
    assert picture.width > 560


def test_histogram_shows_values_where_they_are():
    values = torch.tensor([0.26, 0.27, 0.26, 0.9])
    layers = [("one", values, "mean"), ("silent", torch.empty(0), "silent")]
    picture = draw_histograms(layers, "title", "axis")
    blue = ImageColor.getrgb(BLUE)
    box = picture.crop((20, 76, 210, 178)).convert("RGB")
    columns = [
        sum(box.getpixel((x, y)) == blue for y in range(box.height)) for x in range(box.width)
    ]
    places = [round(x / box.width, 1) for x, height in enumerate(columns) if height]
    assert {*places} <= {0.2, 0.3, 0.9}
    assert max(columns) == max(columns[40:60]) > 2 * max(columns[165:]) > 0


def test_images_as_tensors_have_their_texts_below_in_rows():
    images = [torch.full((3, 80, 160), value) for value in (0.0, 0.5, 1.0)]
    texts = ["first\nline", "a word that is too long " * 9, ""]
    picture = draw_images(images, texts, ["", "", "cat/1.png"], 2, "title")
    assert picture.shape[0] == 3
    assert picture.shape[2] < 2 * 160 + 60  # long texts are cut
    assert (picture.sum(0) == 0).sum() >= 80 * 160  # the black one, as it is
