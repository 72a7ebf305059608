# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Every kind of image file, as a person sees it, or refused."""

import io
import os
import random
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from data_loading import formats as formats_module
from data_loading.arrays import to_pixels
from data_loading.augment import Augmentation
from data_loading.dataset import TransformedDataset
from data_loading.decode import BadImage, decode, load_image
from data_loading.formats import describe_file, extensions, formats, how_to_read
from data_loading.sources import DatasetSpec
from data_loading.transforms import (
    create_eval_transform,
    create_pretrain_transform,
    create_train_transform,
)
from datasets import create_dataset
from errors import UserError

PHOTOS = Path(os.environ.get("PHOTOS", "photos.zip"))  # of any *.JPEG
RED, GREEN, BLUE, GRAY, WHITE = (
    (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128), (255, 255, 255),
)  # fmt: skip
CORNERS = [RED, GREEN, BLUE, GRAY]


def quadrants(side: int = 16) -> Image.Image:
    """Red and green above blue and gray."""
    image, half = Image.new("RGB", (2 * side, 2 * side)), (side, side)
    for place, color in zip(((0, 0), (1, 0), (0, 1), (1, 1)), CORNERS, strict=True):
        image.paste(Image.new("RGB", half, color), (place[0] * side, place[1] * side))
    return image


def rows(sample: Image.Image | torch.Tensor, in_chans: int) -> list:
    """The pixels as the network gets them, row by row: numbers if gray, otherwise lists."""
    image = to_pixels(sample, in_chans)
    assert image.dtype == torch.uint8
    return (image[0] if in_chans == 1 else image.permute(1, 2, 0)).tolist()


def seen(sample: Image.Image | torch.Tensor, in_chans: int = 3) -> list:
    """The colors of its quadrants."""
    pixels = rows(sample, in_chans)
    height, width = len(pixels), len(pixels[0])
    colors = [pixels[height * y // 4][width * x // 4] for x, y in ((1, 1), (3, 1), (1, 3), (3, 3))]
    return colors if in_chans == 1 else [tuple(color) for color in colors]


def reread(image: Image.Image, path: Path, **options) -> Image.Image | torch.Tensor:
    image.save(path, **options)
    return load_image(str(path))


def near(colors: list, expected: list, tolerance: int = 4) -> bool:
    return np.abs(np.array(colors, int) - np.array(expected, int)).max() <= tolerance


# --- kinds of files -------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "ppm", "tif"])
def test_every_format_is_read(tmp_path, suffix):
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    options |= {"lossless": True} if suffix == "webp" else {}
    image = reread(quadrants(), tmp_path / f"a.{suffix}", **options)
    assert near(seen(image), CORNERS)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_is_not_inverted(tmp_path, suffix):
    """In a JPEG all programs write it inverted, as Adobe does; PIL says so and reads it back."""
    options = {"quality": 100} if suffix == "jpg" else {}
    image = reread(quadrants().convert("CMYK"), tmp_path / f"a.{suffix}", **options)
    assert image.mode == "CMYK"
    assert near(seen(image), CORNERS)
    assert near([[value] for value in seen(image, 1)], [[76], [150], [29], [128]])


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    deep = np.array([[0, 256, 0x7FFF], [0x8000, 0xFF00, 0xFFFF]], dtype=np.uint16)
    image = Image.fromarray(deep)
    image = reread(image.convert("I") if suffix == "pgm" else image, tmp_path / f"a.{suffix}")
    assert rows(image, 1) == [[0, 1, 127], [128, 255, 255]]
    assert rows(image, 3)[1][0] == [128] * 3


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, color: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG of rows that PIL itself cannot write."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    body = png_chunk(b"IDAT", zlib.compress(rows))
    parts = [png_chunk(b"IHDR", header), *chunks, body, png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_sixteen_bit_color_keeps_its_high_byte():
    row = b"\x00" + struct.pack(">6H", 0xFF12, 0x8034, 0x0056, 0, 0x01FF, 0xFFFF)
    image = load_image(io.BytesIO(png(2, 1, 16, 2, row)))
    assert rows(image, 3) == [[[255, 128, 0], [0, 1, 255]]]


def test_sixteen_bit_gray_is_white_where_it_is_transparent():
    """Not where the upper byte alone is that of the transparent value."""
    row = b"\x00" + struct.pack(">4H", 0x1234, 0x1235, 0xFF00, 0)
    image = load_image(io.BytesIO(png(4, 1, 16, 0, row, png_chunk(b"tRNS", b"\x12\x34"))))
    assert rows(image, 1) == [[255, 0x12, 0xFF, 0]]


def tiff(bits: int, white_is_zero: bool, format_: int, data: bytes, width: int) -> Image.Image:
    """A gray TIFF of one row that PIL itself cannot write, read."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: 1 - white_is_zero, 273: 8 + 2 + 120 + 4}
    tags |= {277: 1, 278: 1, 279: len(data), 339: format_}
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return load_image(io.BytesIO(head + body + bytes(4) + data))


TIFFS = {  # bits, white is zero, data, width, what is seen
    "16": (16, False, struct.pack("<3H", 0, 0x8000, 0xFFFF), 3, [0, 128, 255]),
    "16, white is zero": (16, True, struct.pack("<3H", 0, 0x8000, 0xFFFF), 3, [255, 127, 0]),
    "8, white is zero": (8, True, bytes([0, 128, 255]), 3, [255, 127, 0]),
    "12": (12, False, bytes([0xFF, 0xF8, 0x00]), 2, [255, 128]),
}


@pytest.mark.parametrize("case", TIFFS)
def test_gray_tiff_is_as_bright_as_a_person_sees_it(case):
    """PIL leaves white black, and 12 bits nearly so."""
    bits, white_is_zero, data, width, expected = TIFFS[case]
    image = tiff(bits, white_is_zero, 1, data, width)
    assert rows(image, 1) == [expected]


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("format_", [1, 2])
def test_tiff_of_unknown_range_is_a_bad_image(bits, format_):
    image = tiff(bits, False, format_, bytes(3 * bits // 8), 3)
    if format_ == 1 and bits < 32:
        assert decode(image, 1).shape == (1, 1, 3)
        return
    with pytest.raises(BadImage, match="of unknown range"):
        decode(image, 1)


def test_palette_and_one_bit_images(tmp_path):
    palette = quadrants().quantize(16)
    assert near(seen(reread(palette, tmp_path / "p.png")), CORNERS)
    bits = Image.new("1", (8, 8), 1)
    bits.paste(0, (0, 0, 4, 8))
    assert seen(reread(bits, tmp_path / "b.png"), 1) == [0, 255, 0, 255]


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "L", "gif", "webp"])
def test_what_is_transparent_is_white_and_not_what_lies_under_it(tmp_path, kind):
    path = tmp_path / f"a.{kind if kind in ('gif', 'webp') else 'png'}"
    if kind in ("P", "gif"):
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.paste(0, (0, 0, 4, 8))
        image = reread(image, path, transparency=0)
    elif kind == "L":
        image = Image.new("L", (8, 8), 54)
        image.paste(0, (0, 0, 4, 8))
        image = reread(image, path, transparency=0)
    else:
        image = Image.new("RGBA", (8, 8), (*RED, 255))
        image.paste((0, 0, 0, 0), (0, 0, 4, 8))
        image = image.convert("LA") if kind == "LA" else image
        image = reread(image, path, **({"lossless": True, "exact": True} if kind == "webp" else {}))
    opaque = {"LA": (76,) * 3, "L": (54,) * 3}.get(kind, RED)
    assert seen(image) == [WHITE, opaque, WHITE, opaque]


def test_half_transparent_is_mixed_with_white():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert near(seen(image), [(127,) * 3] * 4, 1)


def test_gray_image_is_gray_in_color_and_color_is_luma_in_gray(tmp_path):
    image = reread(quadrants().convert("L"), tmp_path / "a.jpg", quality=100)
    assert near(seen(image), [(76,) * 3, (150,) * 3, (29,) * 3, (128,) * 3])


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_is_upright_however_the_camera_was_held(tmp_path, suffix, orientation):
    upright, stored = quadrants().resize((32, 48)), None
    turns = Image.Transpose
    undo = {  # what the camera did to it
        2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE, 6: turns.ROTATE_90, 7: turns.TRANSVERSE, 8: turns.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    options |= {"lossless": True} if suffix == "webp" else {}
    image = reread(stored, tmp_path / f"a.{suffix}", exif=exif, **options)
    assert decode(image, 3).shape == (3, 48, 32)
    assert near(seen(image), CORNERS)


def test_damaged_exif_leaves_the_picture(tmp_path):
    path = tmp_path / "a.jpg"
    for block in (b"Exif\x00\x00junk", b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", b"Exif\x00\x00"):
        quadrants().save(path, exif=block, quality=100, subsampling=0)
        assert near(seen(load_image(str(path))), CORNERS)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animation_is_its_first_picture(tmp_path, suffix):
    other = [Image.new("RGB", (32, 32), color) for color in (BLUE, GREEN)]
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"a.{suffix}"
    image = reread(quadrants(), path, save_all=True, append_images=other, **options)
    with Image.open(path) as file:
        assert file.n_frames == 3
    assert near(seen(image), CORNERS)


# --- sizes ----------------------------------------------------------------------------------

TRANSFORMS = {
    "pre-training": create_pretrain_transform(32),
    "training": create_train_transform(64, Augmentation(aa="rand-m9-mstd0.5-inc1", reprob=1.0)),
    "training, small": create_train_transform(32, Augmentation(color_jitter=0.4)),
    "evaluation": create_eval_transform(64),
    "evaluation, small": create_eval_transform(32),
    "evaluation, squashed": create_eval_transform(384),
    "evaluation, oblong": create_eval_transform((64, 96), 0.9),
}


@pytest.mark.parametrize("size", [(1, 2), (20000, 10), (10, 20000), (20000, 1)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_smallest_and_longest_images_pass_every_transform(tmp_path, name, size):
    path = tmp_path / "a.png"
    Image.new("RGB", size, (10, 200, 30)).save(path)
    data = TransformedDataset([(load_image(str(path)), 0)], TRANSFORMS[name], 0)
    image = data[0, 0][0]
    assert image.shape[0] == 3
    assert min(image.shape[1:]) >= 32
    if "evaluation" in name:
        assert near(image.flatten(1).T.tolist(), [(10, 200, 30)] * image[0].numel(), 1)


def test_long_image_is_cut_before_it_is_enlarged_and_its_center_stays():
    wide = np.random.default_rng(0).integers(0, 256, (4, 400, 3), dtype=np.uint8)
    wide = pil_to_tensor(Image.fromarray(wide).resize((4001, 40)))
    cut, *rest = (steps := create_eval_transform(224)).transforms
    assert cut(wide).shape == (3, 40, 733)  # at most 40 * 16 * 256 / 224, as odd as it was
    whole = wide
    for step in rest:
        whole = step(whole)
    difference = (steps(wide).int() - whole.int()).abs()
    assert difference.float().mean() < 1.5
    ordinary = wide[..., :600]
    assert cut(ordinary) is ordinary


# --- files that are no images ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif"])
def test_a_single_pixel_is_no_image(kind):
    """Placeholders of web pages were trained on, and given a class."""
    Image.new("RGB", (1, 1), "red").save(file := io.BytesIO(), kind)
    with pytest.raises(BadImage, match="single pixel"):
        load_image(file.getvalue())


SIZES = {(20_000, 10_000): False, (2**14, 2**14): False, (2**14, 2**14 + 1): True}
SIZES |= {(40_000, 40_000): True, (2**31 - 1, 2**31 - 1): True}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("size", "refused"), SIZES.items(), ids=str)
def test_bomb_is_refused_by_its_header_and_a_panorama_is_none(size, refused):
    """Forty kilobytes that would take 5 GB; 200 million pixels are a panorama."""
    data = TransformedDataset(Lazy(png(*size, 1, 0, b"")), create_eval_transform(32), 0)
    error = data[0, 0]
    assert isinstance(error, BadImage)
    expected = f"it has {size[0]} x {size[1]} pixels, above the limit of 268435456"
    assert (expected in str(error)) == refused
    assert refused or "truncated" in str(error) or "broken" in str(error)


@pytest.mark.filterwarnings("error")
def test_crop_of_a_panorama_is_no_bomb_either(tmp_path):
    """PIL asks again whenever a part is cut out."""
    image = reread(Image.new("1", (20_000, 10_000), 1), tmp_path / "a.png")
    assert image.crop((1, 1, 20_000, 10_000)).size == (19_999, 9_999)


def test_every_extension_of_the_formats_is_looked_for(tmp_path):
    """Those of torchvision are fewer, and a folder of GIF files was an empty one."""
    Image.init()
    known = {end for end, kind in Image.registered_extensions().items() if kind in formats()}
    assert set(extensions()) == known - {".pfm"} | {".npy"}  # .pfm: floats
    for number, end in enumerate(extensions()):
        name = f"{number:02d}{end.upper() if number % 2 else end}"
        (tmp_path / "a").mkdir(exist_ok=True)
        if end == ".npy":
            with (tmp_path / "a" / name).open("wb") as file:
                np.save(file, np.asarray(quadrants()))
            continue
        quadrants().save(tmp_path / "a" / name, Image.registered_extensions()[end])
    (tmp_path / "a" / "notes.txt").write_text("no image")
    spec = DatasetSpec(str(tmp_path), labeled=False)
    for kind in ("folder", "image_folder"):
        data = create_dataset(kind, spec, train=True)
        assert len(data) == len(extensions())
        assert all(near(seen(image), CORNERS, 40) for image, _ in data)


class Lazy:
    """A data set of one image file."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return load_image(io.BytesIO(self.data)), 0


LONG = 2**21  # bytes: twice PIL's limit for one chunk
CHUNKS = {
    "compressed text": [png_chunk(b"zTXt", b"comment\x00\x00" + zlib.compress(bytes(LONG)))],
    "text of the world": [
        png_chunk(b"iTXt", b"comment\x00\x01\x00\x00\x00" + zlib.compress(bytes(LONG)))
    ],
    "many texts": [png_chunk(b"tEXt", b"a\x00" + bytes(2**20 - 2))] * 65,
    "color profile": [png_chunk(b"iCCP", b"profile\x00\x00" + zlib.compress(bytes(LONG)))],
    "bomb": [png_chunk(b"zTXt", b"comment\x00\x00" + zlib.compress(bytes(2**27)))],
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("after", [False, True])
def test_long_texts_and_profiles_of_a_png_are_ignored(tmp_path, chunks, after):
    """Such images were refused; what the chunks hold is never unpacked."""
    row, orientation = b"\x00" + bytes([10, 20]), png_chunk(b"eXIf", upside_down())
    whole = png(2, 1, 8, 0, row, orientation, *([] if after else chunks))
    if after:  # the pixels
        whole = whole[:-12] + b"".join(chunks) + whole[-12:]
    path = tmp_path / "a.png"
    path.write_bytes(whole)
    tracemalloc.start()
    for file in (str(path), io.BytesIO(whole)):
        assert rows(load_image(file), 1) == [[20, 10]]  # still turned
    assert tracemalloc.get_traced_memory()[1] < 4 * len(whole) + 2**23
    tracemalloc.stop()


def upside_down() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 3
    return exif.tobytes().removeprefix(b"Exif\x00\x00")


def test_wrong_checksum_counts_only_where_the_chunk_is_used():
    """One wrong bit in a gamma that nobody reads made an image unreadable."""

    def spoiled(kind: bytes, data: bytes) -> bytes:
        chunk = png_chunk(kind, data)[:-1] + b"?"
        return png(2, 1, 8, 0, b"\x00" + bytes([10, 20]), chunk)

    for kind in (b"gAMA", b"pHYs", b"tEXt", b"iCCP", b"prVt"):
        assert np.asarray(load_image(io.BytesIO(spoiled(kind, bytes(9))))).tolist() == [[10, 20]]
    for kind, data in ((b"tRNS", bytes(2)), (b"eXIf", upside_down()), (b"PLTE", bytes(3))):
        with pytest.raises(BadImage, match="begins as a PNG image, but it is damaged"):
            load_image(io.BytesIO(spoiled(kind, data)))


def test_damaged_png_with_a_long_text_is_a_bad_image():
    text = CHUNKS["compressed text"][0]
    whole = png(2, 1, 8, 0, b"\x00\x01\x02", text)
    for length in range(8, len(whole) - 30, 7):  # within the text
        result = TransformedDataset(Lazy(whole[:length]), create_eval_transform(32), 0)[0, 0]
        assert isinstance(result, BadImage), length


KINDS = {
    "empty": (b"", "the file is empty", "replace or remove it"),
    "Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "a Git LFS pointer",
        "git lfs pull gets it",
    ),
    "git-annex": (b"/annex/objects/SHA256E-s9--ab.jpg\n", "a git-annex pointer", "git annex get"),
    "HTML": (b"\n<!DOCTYPE html><html>404</html>", "an HTML page, not an image", "download it"),
    "text": (b'{"error": 404, "message": "no"}', "text, not an image", "replace"),
    "zeros": (bytes(9999), "begins with zeros, as after an interrupted copy", "replace"),
    "other": (b"PK\x03\x04\xff\xff", r"expected JPEG, PNG, .*; the file begins with b'PK", ""),
    "damaged PNG": (b"\x89PNG\r\n\x1a\n" + bytes(99), "begins as a PNG image, but", "replace"),
    "damaged JPEG": (b"\xff\xd8\xff\xe0" + bytes(99), "begins as a JPEG image, but", "replace"),
    "damaged GIF": (b"GIF89a\xff", "begins as a GIF image, but it is damaged", "replace"),
    "damaged TIFF": (b"II*\0\x08\0\0\0\xff\xff", "begins as a TIFF image, but", "replace"),
    "damaged AVIF": (b"\x00\x00\x00\x20ftypavif" + bytes(99), "AVIF image", ""),
}


@pytest.mark.parametrize(("content", "kind", "remedy"), KINDS.values(), ids=KINDS)
def test_file_that_is_no_image_is_named_for_what_it_is(tmp_path, content, kind, remedy):
    """All of them were "cannot identify image file"."""
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for file in (str(path), io.BytesIO(content)):
        with pytest.raises(BadImage, match=kind):
            load_image(file)
    error = str(TransformedDataset(Lazy(content), create_eval_transform(32), 0)[0, 0])
    assert remedy in error
    assert "or skip such images: --on_bad_image skip" in error


# The first bytes of a photo of a phone.
HEIC = b"\x00\x00\x00\x24ftypheic\x00\x00\x00\x00mif1heic" + bytes(99)


def test_heic_and_avif_are_read_where_pillow_can_and_named_where_not(monkeypatch):
    monkeypatch.setattr(formats_module, "optional_formats", lambda: {"AVIF": False, "HEIF": False})
    description, remedy = describe_file(HEIC)
    assert description == "the file is a HEIF image, which cannot be read here"
    assert remedy == "pip install pillow-heif"
    assert how_to_read(".heic") == " (not readable here: pip install pillow-heif)"
    assert how_to_read(".avif") == " (not readable here: pip install 'pillow>=11.3')"
    monkeypatch.setattr(formats_module, "optional_formats", lambda: {"AVIF": True, "HEIF": True})
    assert describe_file(HEIC) == ("the file is a damaged HEIF image", "")
    assert {".avif", ".heic"} <= set(extensions.__wrapped__())
    assert {"AVIF", "HEIF"} <= set(formats.__wrapped__())


@pytest.mark.parametrize("name", ["AVIF", "HEIF"])
def test_optional_format_is_read_upright(tmp_path, name):
    if name not in formats():
        pytest.skip(f"{name} cannot be read here")
    image, exif = quadrants().rotate(-90, expand=True), Image.Exif()
    exif[0x0112] = 8
    path = tmp_path / "a.jpg"  # the content decides
    image.save(path, name, quality=100, exif=exif.tobytes())
    assert near(seen(load_image(str(path))), CORNERS, 30)


def test_program_posing_as_an_image_is_not_run(tmp_path, monkeypatch):
    """PIL would give PostScript to Ghostscript, whatever the file is called."""
    from PIL import EpsImagePlugin

    ran = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *words: ran.append(words))
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    assert Image.open(path).format == "EPS"  # the danger is real
    with pytest.raises(BadImage, match="the file is text, not an image: it begins with '%!PS"):
        load_image(str(path))
    assert ran == []
    assert "EPS" not in formats()


def damage(data: bytes, draw: random.Random) -> bytes:
    kind, at = draw.choice(["cut", "zeros", "flips", "junk"]), draw.randrange(1, len(data))
    if kind == "cut":
        return data[:at]
    if kind == "zeros":
        length = draw.randrange(1, 200)
        return data[:at] + bytes(len(data[at : at + length])) + data[at + length :]
    changed = bytearray(data)
    for _ in range(1 if kind == "flips" else 30):
        changed[draw.randrange(len(data) if kind == "junk" else min(len(data), 200))] = (
            draw.randrange(256)
        )
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format_", formats())
def test_damaged_file_is_an_image_or_a_bad_image_and_never_a_traceback(format_):
    image = Image.effect_noise((40, 30), 80).convert("RGB")
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    image.save(file, format_, **({} if format_ in ("GIF", "BMP", "PPM") else {"exif": exif}))
    draw, bad = random.Random(format_), 0
    for _ in range(300):
        data = TransformedDataset(
            Lazy(damage(file.getvalue(), draw)), create_pretrain_transform(16), 0
        )
        result = data[0, 0]
        assert isinstance(result, tuple | BadImage)
        bad += isinstance(result, UserError)
    assert 10 < bad < 300


@pytest.mark.skipif(not PHOTOS.exists(), reason="no photos here; PHOTOS=photos.zip names some")
def test_real_photos_decode_and_halves_of_them_do_not():
    with zipfile.ZipFile(PHOTOS) as archive:
        files = [archive.read(n) for n in archive.namelist() if n.lower().endswith(".jpeg")]
    assert len(files) >= 20
    for data in files[:20]:
        image = decode(load_image(io.BytesIO(data)), 3)
        assert min(image.shape[1:]) > 50
        assert image.float().std() > 5
        with pytest.raises(OSError, match="truncated"):
            load_image(io.BytesIO(data[: len(data) // 2]))


def test_image_of_a_dataset_is_not_turned_in_place():
    """A dataset that caches it would return a turned one in the next epoch."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (4, 2)).save(file, "PNG", exif=exif)
    image = load_image(file)
    for _ in range(2):
        assert decode(image, 3).shape == (3, 4, 2)
        assert image.size == (4, 2)
