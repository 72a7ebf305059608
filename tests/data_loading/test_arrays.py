# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Images of any number of channels and depth: .npy, TIFF, arrays and tensors, and what is wrong."""

import io
import random
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_loading import tiff
from data_loading.arrays import from_array, load_file, read_npy, to_pixels
from data_loading.dataset import TransformedDataset
from data_loading.decode import BadImage, WithBox
from data_loading.encode import EncodedImages, Encoding
from data_loading.sources import DatasetSpec
from data_loading.transforms import create_pretrain_transform
from datasets import create_dataset
from errors import UserError

HEIGHT, WIDTH = 20, 30


def values(channels: int, dtype: Any = np.uint16, most: int = 65_000) -> np.ndarray:
    """(C, H, W) of 0 to `most`, no two alike."""
    size = channels * HEIGHT * WIDTH
    return np.linspace(0, most, size).astype(dtype).reshape(channels, HEIGHT, WIDTH)


def npy(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def as_tiff(array: np.ndarray, **options: Any) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def read(data: bytes, in_chans: int, value_range: Any = None) -> torch.Tensor:
    return to_pixels(load_file(data), in_chans, value_range)


# --- ways to store the same pixels --------------------------------------------------------------

CONTIG = {"photometric": "minisblack", "planarconfig": "contig"}
STORED = {
    ".npy": npy,
    ".npy, channels last": lambda a: npy(a.transpose(1, 2, 0)),
    ".npy, Fortran order": lambda a: npy(np.asfortranarray(a)),
    ".npy, big-endian": lambda a: npy(a.astype(a.dtype.newbyteorder(">"))),
    "pages": lambda a: as_tiff(a, photometric="minisblack"),
    "planes": lambda a: as_tiff(a, photometric="minisblack", planarconfig="separate"),
    "samples": lambda a: as_tiff(a.transpose(1, 2, 0).copy(), **CONTIG),
    "pages of a row": lambda a: as_tiff(a.transpose(1, 2, 0).copy(), photometric="minisblack"),
    "ImageJ": lambda a: as_tiff(a, imagej=True, metadata={"axes": "CYX"}),
    "OME": lambda a: as_tiff(a, ome=True, photometric="minisblack", metadata={"axes": "CYX"}),
    "Deflate": lambda a: as_tiff(a.transpose(1, 2, 0).copy(), compression="zlib", **CONTIG),
    "tiles": lambda a: as_tiff(
        a, tile=(16, 16), compression="zlib", predictor=True, photometric="minisblack"
    ),
    "big": lambda a: as_tiff(a, bigtiff=True, byteorder=">", photometric="minisblack"),
}
WAYS = [(way, channels) for way in STORED for channels in (1, 4, 12)]
ORDERED = ("samples", "planes", "Deflate")  # which one channel is not


@pytest.mark.parametrize(("way", "channels"), [w for w in WAYS if w[1] > 1 or w[0] not in ORDERED])
def test_same_pixels_however_they_are_stored(way, channels):
    array = values(channels)
    image = read(STORED[way](array), channels, (0, 65_535))
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, torch.from_numpy(array / 65_535).float())


@pytest.mark.parametrize("channels", [1, 4, 12])
def test_eight_bits_stay_eight_bits(channels):
    array = values(channels, np.uint8, 255)
    for data in (npy(array), as_tiff(array, photometric="minisblack")):
        for value_range in (None, (0, 255)):
            image = read(data, channels, value_range)
            assert image.dtype == torch.uint8
            assert np.array_equal(image, array)


def test_depth_without_a_value_range():
    """16 bits of a gray TIFF are 8 bits, as before; those of an array or of 4 channels are not."""
    gray, deep = values(1), values(4)
    assert read(as_tiff(gray[0]), 1).dtype == torch.uint8
    torch.testing.assert_close(read(npy(deep), 4), torch.from_numpy(deep / 65_535).float())
    torch.testing.assert_close(
        read(as_tiff(deep, photometric="minisblack"), 4), torch.from_numpy(deep / 65_535).float()
    )
    floats = values(3, np.float64, 1)
    for data in (npy(floats), as_tiff(floats, photometric="minisblack")):
        torch.testing.assert_close(read(data, 3), torch.from_numpy(floats).float())
    one = values(1, np.float32, 1)[0]
    torch.testing.assert_close(read(as_tiff(one), 1)[0], torch.from_numpy(one))


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float16])
def test_value_range_maps_linearly_and_clips(dtype):
    array = np.array([[-2000, -1000, -500, 0, 1000]], dtype)
    expected = [[[0.0, 0.0, 0.5, 1.0, 1.0]]]
    for sample in (array, load_file(npy(array)), torch.from_numpy(array)[None]):
        assert to_pixels(sample, 1, (-1000, 0)).tolist() == expected


def test_sixteen_bit_png_keeps_its_depth_with_a_value_range():
    deep = np.array([[0, 1, 256, 65_535]], np.uint16)
    found = read(png(Image.fromarray(deep)), 1, (0, 65_535))
    torch.testing.assert_close(found[0], torch.from_numpy(deep / 65_535).float())
    color = Image.new("RGB", (2, 1), (255, 51, 0))
    assert read(png(color), 3, (0, 510))[:, 0, 0].tolist() == pytest.approx([0.5, 0.1, 0])


def test_color_of_sixteen_bits_that_pillow_cuts_is_refused_in_full_depth():
    """Pillow would give the upper byte, and 255 of 65,535 is nearly black."""
    row = 2 * struct.pack(">3H", 0xFF12, 0x8034, 0x0056)
    head = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(b"\0" + row))
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in (*parts, (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body
        data += struct.pack(">I", zlib.crc32(kind + body))
    pnm = b"P6 # deep\n2 1\n65535\n" + row
    for file in (data, pnm):
        assert read(file, 3).dtype == torch.uint8
        with pytest.raises(BadImage, match="16 bits and several channels, of which Pillow reads 8"):
            read(file, 3, (0, 65_535))


def test_alpha_is_the_fourth_channel_and_white_without_it():
    image = Image.new("RGBA", (3, 2), (10, 20, 30, 0))
    assert read(png(image), 4)[:, 0, 0].tolist() == [10, 20, 30, 0]
    assert read(png(image), 3)[:, 0, 0].tolist() == [255] * 3
    assert read(png(Image.new("LA", (3, 2), (7, 9))), 2)[:, 0, 0].tolist() == [7, 9]
    for mode, count in (("RGB", 3), ("CMYK", 4), ("L", 1)):
        file = io.BytesIO()
        Image.new(mode, (3, 2)).save(file, "JPEG")
        with pytest.raises(UserError, match=rf"{count} channel|tensor \({count}, 2, 3\)"):
            read(file.getvalue(), 4)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_gray_array_becomes_rgb_and_rgb_gray(dtype):
    color = np.zeros((2, 4, 3), dtype)
    color[..., 1] = 200 if dtype == np.uint8 else 200 / 255
    gray = from_array(color, 1)
    assert gray.shape == (1, 2, 4)
    luma = gray.float().mean() / (255 if dtype == np.uint8 else 1)
    assert luma.item() == pytest.approx(0.587 * 200 / 255, 0.01)
    assert from_array(color[..., 1], 3).shape == (3, 2, 4)
    assert torch.equal(from_array(color[..., 1:2], 3), from_array(color[..., 1], 3))


def test_tiff_is_turned_and_white_is_zero_is_inverted():
    array = values(4)
    turned = as_tiff(array, photometric="minisblack", extratags=[(274, "H", 1, 6, True)])
    image = read(turned, 4)
    assert image.shape == (4, WIDTH, HEIGHT)
    expected = torch.from_numpy(array / 65_535).float().transpose(1, 2).flip(2)
    torch.testing.assert_close(image, expected)
    white = as_tiff(values(1)[0], photometric="miniswhite")
    torch.testing.assert_close(
        read(white, 1, (0, 65_535))[0], torch.from_numpy(1 - values(1)[0] / 65_535).float()
    )


# --- what is wrong ------------------------------------------------------------------------------

WRONG = {  # array, in_chans, message
    "channels": (values(5), 4, r"shape is \(5, 20, 30\), expected \(H, W, 4\) or \(4, H, W\)"),
    "flat": (values(1)[0], 4, r"shape is \(20, 30\)"),
    "dimensions": (values(2)[None], 2, r"shape is \(1, 2, 20, 30\)"),
    "either way": (np.zeros((4, 9, 4)), 4, r"may be \(C, H, W\) or \(H, W, C\)"),
    "floats": (values(1, np.float32, 255), 1, "float32 values from 0 to 255, expected 0 to 1"),
    "signed": (values(1, np.int16, 99) - 7, 1, "int16 values from -7 to 92, expected 8 or 16 bits"),
    "NaN": (np.full((4, 4), np.nan), 1, "NaN or Inf"),
    "complex": (np.zeros((4, 4), complex), 1, "complex128 values, expected integers or floats"),
    "text": (np.full((4, 4), "a"), 1, "<U1 values"),
}


@pytest.mark.parametrize(("array", "in_chans", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arrays_are_refused(array, in_chans, message):
    for sample in (array, load_file(npy(array))):
        with pytest.raises(UserError, match=message):
            to_pixels(sample, in_chans)


def test_errors_of_other_channels_say_how_to_give_them():
    scene = as_tiff(values(12), photometric="minisblack", planarconfig="separate")
    gray = png(Image.new("L", (4, 4)))
    for file, in_chans, fix in (
        (scene, 3, "it has 12 channels, expected --in_chans 3; give --in_chans 12"),
        (gray, 4, r"1 channel \(mode L\), expected --in_chans 4; give --in_chans 1"),
        (npy(values(12)), 3, "for --in_chans 3; give its number of channels by --in_chans"),
    ):
        with pytest.raises(UserError, match=fix):
            read(file, in_chans)


def test_error_says_how_to_give_the_range():
    data = TransformedDataset([(values(1, np.float32, 255), 0)], torch.clone, 0, in_chans=1)
    assert "give the values that become 0 and 1: --value_range LOW HIGH" in str(data[0, 0])
    assert isinstance(data.map_values((0, 255))[0, 0], tuple)


def header(text: str, version: bytes = b"\x01\0") -> bytes:
    """A .npy file of a header and no values."""
    size = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return b"\x93NUMPY" + version + size + text.encode()


SHAPE = "{'descr': '<u2', 'fortran_order': False, 'shape': (%s), }\n"
DAMAGED = {
    "pickled": (
        npy(np.array([{}, print]), allow_pickle=True),
        "pickled objects, which can run code",
    ),
    "huge": (header(SHAPE % "1000000, 1000000, 12"), "takes 24000000000000 bytes, but 0 follow"),
    "overflow": (header(SHAPE % f"{2**40}, {2**40}"), "but 0 follow"),
    "negative": (header(SHAPE % "-4, 4"), "header"),
    "empty": (header(SHAPE % "0, 4"), "it is empty: its header says shape"),
    "cut": (npy(values(4))[:-1], "but 4799 follow"),
    "longer": (npy(values(4)) + b"x", "but 4801 follow"),
    "long header": (header(SHAPE % ("1, " * 99_999), b"\x02\0"), "header is damaged"),
    "code": (header("__import__('os').abort()"), "header is damaged"),
    "version": (header(SHAPE % "1, 1", b"\x03\0"), "another version"),
    "no header": (b"\x93NUMPY", "header is damaged"),
}


@pytest.mark.parametrize(("data", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_or_dangerous_npy_is_refused(data, message):
    with pytest.raises(BadImage, match=message):
        read_npy(data)


def test_tiff_cannot_unpack_to_any_size(monkeypatch):
    """A strip of Deflate may hold a thousand times what the header says."""
    array = values(4)
    data = as_tiff(array, photometric="minisblack")
    monkeypatch.setattr(tiff, "MAX_BYTES", array.nbytes - 1)
    with pytest.raises(BadImage, match=r"4 x 20 x 30 values, above the limit of 4799 bytes"):
        read(data, 4)
    bomb = zlib.compress(bytes(10_000))
    honest = as_tiff(np.zeros((4, 6, 5), np.uint8), photometric="minisblack", compression="zlib")
    with pytest.raises(BadImage, match="a part of it unpacks to more than 4799 bytes"):
        read(_with_strip(honest, bomb), 4)
    assert read(honest, 4).shape == (4, 6, 5)


def _with_strip(data: bytes, strip: bytes) -> bytes:
    """The TIFF file with another first strip."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        offsets, counts = (file.pages[0].tags[name] for name in (273, 279))
        places = [(tag.valueoffset, int(tag.dtype)) for tag in (offsets, counts)]
    new = bytearray(data + strip)
    for (place, kind), value in zip(places, (len(data), len(strip)), strict=True):
        form = {3: "<H", 4: "<I", 16: "<Q"}[kind]
        struct.pack_into(form, new, place, value)
    return bytes(new)


def test_cut_and_odd_tiff_files_are_bad_images():
    data = as_tiff(values(4), photometric="minisblack")
    with pytest.raises(BadImage):
        read(data[: len(data) // 2], 4)
    cut = as_tiff(values(4).transpose(1, 2, 0).copy(), **CONTIG)
    with pytest.raises(BadImage, match="truncated"):
        read(cut[:-100], 4)
    file = io.BytesIO()
    Image.new("CMYK", (4, 4)).save(file, "TIFF")
    with pytest.raises(BadImage, match="colors are SEPARATED, expected gray or RGB"):
        read(file.getvalue(), 4)
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "TIFF", compression="jpeg")
    assert read(file.getvalue(), 3).shape == (3, 16, 16)
    with pytest.raises(BadImage, match="compression is JPEG"):
        read(file.getvalue(), 3, (0, 255))


def test_file_of_a_set_of_ome_files_is_an_image_of_its_own(tmp_path, monkeypatch):
    """No other file is opened, although any name can stand there."""
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "secret.tif", values(1)[0])
    part = '<TiffData FirstC="{}" IFD="0"><UUID FileName="{}">urn:uuid:{}</UUID></TiffData>'
    parts = part.format(0, "a.tif", 1) + part.format(1, tmp_path / "secret.tif", 2)
    text = f"""<?xml version="1.0"?>
        <OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels
        ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" SizeX="{WIDTH}" SizeY="{HEIGHT}"
        SizeC="2" SizeZ="1" SizeT="1">{parts}</Pixels></Image></OME>"""
    data = as_tiff(values(1)[0], photometric="minisblack", description=text, metadata=None)
    opened = []
    monkeypatch.setattr("builtins.open", lambda *words, **more: opened.append(words))
    assert read(data, 1, (0, 65_535)).shape == (1, HEIGHT, WIDTH)
    assert opened == []


def test_tiff_without_tifffile_names_the_package(monkeypatch):
    data = as_tiff(values(12), photometric="minisblack")
    color = io.BytesIO()
    Image.new("RGB", (4, 4)).save(color, "TIFF")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    monkeypatch.setattr(tiff, "is_installed", lambda: False)
    with pytest.raises(UserError, match="needs tifffile: pip install tifffile"):
        read(data, 12)
    assert read(color.getvalue(), 3).shape == (3, 4, 4)


@pytest.mark.parametrize("way", [".npy", "Deflate", "tiles"])
def test_damaged_file_is_an_image_or_a_bad_image(way):
    """Any other exception would be taken for a bug and show a traceback."""
    data = STORED[way](np.random.default_rng(0).integers(0, 9, (4, 16, 18)).astype(np.uint16))
    draw, bad = random.Random(way), 0
    for _ in range(200):
        changed = bytearray(data)
        for _ in range(3):
            changed[draw.randrange(min(len(data), 400))] = draw.randrange(256)
        changed = bytes(changed[: draw.choice([len(data), draw.randrange(1, len(data))])])
        try:
            assert read(changed, 4, (0, 9)).shape[0] == 4
        except (UserError, OSError):
            bad += 1
    assert 20 < bad < 200


# --- in every source ----------------------------------------------------------------------------


def _folder(root: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        path = root / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(root / "set")


def _zip(root: Path, files: dict[str, bytes]) -> str:
    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return str(root / "set.zip")


def _tar(root: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(root / "set.tar", "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(root / "set.tar")


def _table(root: Path, files: dict[str, bytes]) -> str:
    _folder(root, files)
    rows = [f"set/{name},{name[0]}" for name in files]
    (root / "set.csv").write_text("\n".join(["image,label", *rows]))
    return str(root / "set.csv")


def _parquet(root: Path, files: dict[str, bytes]) -> str:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"bytes": data, "path": name} for name, data in files.items()]
    table = pyarrow.table({"image": rows, "label": [name[0] for name in files]})
    parquet.write_table(table, root / "set.parquet")
    return str(root / "set.parquet")


SOURCES = {"folder": _folder, "zip": _zip, "tar": _tar, "table": _table, "parquet": _parquet}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_reads_npy_and_tiff(source, tmp_path):
    array = values(12)
    files = {"a/1.npy": npy(array), "b/2.tif": as_tiff(array, photometric="minisblack")}
    path = SOURCES[source](tmp_path, files)
    data = create_dataset("auto", DatasetSpec(path), train=True)
    made = TransformedDataset(data, create_pretrain_transform(16), 3, 12).map_values((0, 10_000))
    assert len(made) == 2
    for index in range(2):
        image, _, _ = made[0, index]
        assert image.shape == (12, 16, 16)
        assert torch.isfinite(image).all()


def test_pack_keeps_them_as_they_are_and_resizes_none(tmp_path):
    array = values(12)
    files = {"a/1.npy": npy(array), "b/2.tif": as_tiff(array, photometric="minisblack")}
    data = create_dataset("auto", DatasetSpec(_folder(tmp_path, files)), train=True)
    packed = EncodedImages(data, Encoding())
    assert [packed[0, index][0].content for index in range(2)] == [*files.values()]
    problem = EncodedImages(data, Encoding(8))[0, 0]
    assert "a uint16 array of shape (12, 20, 30): --size resizes 8-bit gray" in str(problem)
    (tmp_path / "set/a/1.npy").write_bytes(files["a/1.npy"][:-1])
    assert isinstance(packed[0, 0], BadImage)


def test_crop_that_fast_decoding_drew_is_kept():
    """It would be drawn again, on the smaller image."""
    photo = torch.zeros(3, 8, 8, dtype=torch.uint8).as_subclass(WithBox)
    photo.box = 1, 2, 3, 4
    for in_chans, value_range in ((3, (0, 510)), (1, (0, 510)), (3, (0, 255)), (3, None)):
        assert to_pixels(photo, in_chans, value_range).box == (1, 2, 3, 4)


def test_arrays_next_to_images_of_their_names_are_no_images(tmp_path):
    """Features that lie next to photos made the run fail, or were taken for photos."""
    photo = png(Image.new("RGB", (4, 4)))
    files = {name: npy(np.zeros(9)) for name in ("a/1.npy", "a/1.clip.npy")}
    files = {"a/1.png": photo, **files, "a/2.npy": npy(np.zeros((4, 4, 3), np.uint8))}
    for source in ("folder", "zip", "tar"):
        (tmp_path / source).mkdir()
        path = SOURCES[source](tmp_path / source, files)
        data = create_dataset("auto", DatasetSpec(path), train=True)
        assert [name.rpartition("/")[2] for name in data.names] == ["1.png", "2.npy"], source
        assert "2 .npy" in data.describe_list()


def test_lists_of_data_index_are_no_images(tmp_path):
    path = _folder(tmp_path, {"1.png": png(Image.new("RGB", (4, 4)))})
    spec = DatasetSpec(path, labeled=False, data_index=path)
    for _ in range(2):
        assert len(create_dataset("folder", spec, train=True)) == 1
    assert len(create_dataset("folder", DatasetSpec(path, labeled=False), train=True)) == 1
