# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""JPEG files: the pixels, the orientation and the errors of PIL, whichever decodes them."""

import io
import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_loading import decode as decode_module
from data_loading import jpeg
from data_loading.decode import BadImage, decode, load_image

PHOTOS = Path(os.environ.get("PHOTOS", "photos.zip"))  # of any *.JPEG
needs_photos = pytest.mark.skipif(
    not PHOTOS.exists(), reason="no photos here; PHOTOS=photos.zip names some"
)
needs_simplejpeg = pytest.mark.skipif(jpeg.simplejpeg is None, reason="needs simplejpeg")
SAVED = {  # options of PIL
    "4:4:4": {"subsampling": "4:4:4"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:2:0": {"subsampling": "4:2:0"},
    "4:1:1": {"subsampling": "4:1:1"},
    "progressive": {"progressive": True},
    "progressive, 4:4:4": {"progressive": True, "subsampling": "4:4:4"},
    "RGB": {"keep_rgb": True},
    "restarts": {"restart_marker_rows": 1},
    "optimized": {"optimize": True, "quality": 30},
    "profile and comment": {"icc_profile": bytes(9999), "comment": b"a comment"},
}
SIZES = [(1, 2), (7, 5), (16, 16), (97, 61), (130, 200)]


def noise(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Smooth colors and some noise, as a photo has."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size)
    pixels = np.asarray(coarse).astype(int) + generator.integers(-20, 21, (*size[::-1], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def encode(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def decode_both(data: bytes, in_chans: int, monkeypatch) -> tuple[Tensor, Tensor]:
    """Decode with simplejpeg, and with PIL alone."""
    fast = load_image(data)
    assert isinstance(fast, Tensor)  # not PIL's
    with monkeypatch.context() as patch:
        patch.setattr(jpeg, "simplejpeg", None)
        slow = load_image(data)
        assert isinstance(slow, Image.Image)
        return decode(fast, in_chans), decode(slow, in_chans)


@needs_simplejpeg
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("options", SAVED.values(), ids=SAVED)
def test_pixels_are_those_of_pil(options, in_chans, size, monkeypatch):
    """A fast DCT or plain upsampling would be other pixels on machines with simplejpeg."""
    for mode in ("RGB",) if "keep_rgb" in options else ("RGB", "L"):
        fast, slow = decode_both(encode(noise(size, mode), **options), in_chans, monkeypatch)
        assert fast.shape == slow.shape == (in_chans, *size[::-1])
        assert torch.equal(fast, slow)


@needs_simplejpeg
@needs_photos
def test_pixels_of_photos_are_those_of_pil(monkeypatch):
    with zipfile.ZipFile(PHOTOS) as archive:
        files = [archive.read(n) for n in archive.namelist() if n.lower().endswith(".jpeg")]
    assert len(files) >= 20
    for data in files:
        for in_chans in (1, 3):
            assert torch.equal(*decode_both(data, in_chans, monkeypatch))


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


@needs_simplejpeg
@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 have no meaning
@pytest.mark.parametrize("kind", ["exif", "xmp", "exif behind a profile"])
def test_orientation_is_that_of_pil(kind, orientation, monkeypatch):
    options = {"exif": exif(orientation)} if "exif" in kind else {"xmp": XMP % orientation}
    if "profile" in kind:
        options["icc_profile"] = bytes(70_000)  # of two segments
    data = encode(noise((24, 10)), **options)
    fast, slow = decode_both(data, 3, monkeypatch)
    assert fast.shape == ((3, 24, 10) if 5 <= orientation <= 8 else (3, 10, 24))
    assert torch.equal(fast, slow)


def test_damaged_exif_is_no_orientation():
    for block in (b"Exif\0\0junk", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0"):
        data = encode(noise((24, 10)), exif=block)
        assert decode(load_image(data), 3).shape == (3, 10, 24)


@needs_simplejpeg
def test_file_without_metadata_is_not_read_twice(monkeypatch):
    monkeypatch.setattr(decode_module, "_open", lambda file: pytest.fail("PIL read it"))
    assert load_image(encode(noise((24, 10)), comment=b"a", icc_profile=bytes(99))).ndim == 3


@pytest.mark.parametrize("make", [bytes, io.BytesIO, "path"])
@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
def test_bytes_paths_and_files_are_the_same_image(make, format_, tmp_path):
    file, expected = io.BytesIO(), noise((9, 5), "L")
    expected.save(file, format_, **({"quality": 100} if format_ == "JPEG" else {}))
    path = tmp_path / "a.bin"  # the content decides
    path.write_bytes(file.getvalue())
    given = str(path) if make == "path" else make(file.getvalue())
    pixels = decode(load_image(given), 1)
    assert (pixels[0].int() - torch.from_numpy(np.array(expected)).int()).abs().max() <= 2


@pytest.mark.parametrize(("mode", "in_chans"), [("CMYK", 3), ("CMYK", 1), ("L", 3)])
def test_other_color_spaces_become_what_the_network_takes(mode, in_chans):
    data = encode(noise((40, 30), mode))
    expected = np.array(Image.open(io.BytesIO(data)).convert("L" if in_chans == 1 else "RGB"))
    image = decode(load_image(data), in_chans)
    assert image.permute(1, 2, 0).squeeze(2).tolist() == expected.tolist()


def bomb(size: tuple[int, int]) -> bytes:
    """A small JPEG with another size in its header."""
    data = bytearray(encode(noise((16, 16))))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = size[1].to_bytes(2, "big") + size[0].to_bytes(2, "big")
    return bytes(data)


@pytest.mark.filterwarnings("error")
def test_bomb_is_refused_by_its_header():
    with pytest.raises(BadImage, match="60000 x 65500 pixels, above the limit of 268435456"):
        load_image(bomb((60_000, 65_500)))


def outcome(data: bytes) -> str | bytes:
    """The pixels, or the error."""
    try:
        return decode(load_image(data), 3).numpy().tobytes()
    except (BadImage, OSError, SyntaxError) as error:
        return f"{type(error).__name__}: {error}"


def damage(data: bytes, draw: random.Random) -> bytes:
    kind, at = (
        draw.choice(["cut", "zeros", "flip in the header", "flip"]),
        draw.randrange(len(data)),
    )
    if kind == "cut":
        return data[:at]
    changed = bytearray(data)
    if kind == "zeros":
        changed[at : at + 50] = bytes(len(changed[at : at + 50]))
    else:
        at = draw.randrange(400) if "header" in kind else at
        changed[at] ^= 1 << draw.randrange(8)
    return bytes(changed)


@needs_simplejpeg
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": exif(6)}], ids=" ".join)
def test_damaged_file_gives_the_pixels_or_the_error_of_pil(options, monkeypatch):
    """Otherwise a run would skip other images on a machine without simplejpeg."""
    whole, draw, kinds = encode(noise((70, 50)), **options), random.Random(0), set()
    for _ in range(200):
        data = damage(whole, draw)
        fast = outcome(data)
        with monkeypatch.context() as patch:
            patch.setattr(jpeg, "simplejpeg", None)
            assert outcome(data) == fast
        kinds.add(type(fast))
    assert kinds == {str, bytes}


def test_truncated_file_keeps_its_message():
    data = encode(noise((70, 50)))
    with pytest.raises(OSError, match="truncated"):
        load_image(data[: len(data) // 2])
