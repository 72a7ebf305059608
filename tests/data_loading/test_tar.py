# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Tar files: the members that tarfile finds, their content, and errors for what is damaged."""

import io
import multiprocessing
import os
import pickle
import shutil
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_loading import tar, tar_headers
from data_loading.listing import MAX_KINDS, OTHERS, SYSTEM
from data_loading.tar import TarFiles, expand, list_tar
from errors import UserError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
GNU_TAR = shutil.which("tar")


def content_of(name: str) -> bytes:
    """Content of another length for each name, of 0 to a few blocks."""
    return name.encode("utf-8", "surrogateescape") * (len(name) % 40)


def info(name: str, **fields) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(member, field, value)
    return member


def write(path: Path, names: list, kind: str = "gnu", **fields) -> str:
    """Write a tar file; `names` are files, or (TarInfo, content)."""
    with tarfile.open(path, "w", format=FORMATS[kind]) as file:
        for name in names:
            if isinstance(name, str):
                content = content_of(name)
                name = info(name, size=len(content), **fields), content
            member, content = name
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return str(path)


def files_of(paths: list[str]) -> TarFiles:
    found = list_tar(paths, False)
    return TarFiles(paths, found.names, found.places)


def listed(*paths) -> dict[str, bytes]:
    files = files_of([str(path) for path in paths])
    return {files.names[number]: files.read(number) for number in range(len(files))}


def by_tarfile(path: str) -> dict[str, bytes]:
    with tarfile.open(path, "r:") as file:
        return {
            os.path.normpath(member.name): file.extractfile(member).read()
            for member in file
            if member.isreg() and not member.issparse() and member.name.lower().endswith(".jpg")
        }


LONG = "/".join(["folder" * 6] * 5) + "/image"  # 190 characters: more than a header's name
LONGER = "/".join(["folder" * 6] * 20) + "/image"
NAMES = [f"cat/{number}.jpg" for number in range(300)]
NAMES += ["top.JPG", "a/b/c/d/e.jpg", "with space/a b.jpg", "x" * 96 + ".jpg", f"{LONG}.jpg"]


@pytest.fixture(params=["together", "one by one"])
def window(request, monkeypatch):
    """Windows of 4 KiB, which members cross, and both ways to find headers in them."""
    monkeypatch.setattr(tar_headers, "LARGEST", 4096)
    monkeypatch.setattr(tar_headers, "BATCH", 50)
    monkeypatch.setattr(tar_headers, "MANY", 0 if request.param == "together" else 10**9)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mtime", [1, 1.5])  # 1.5: PAX has a header more for each file
def test_members_are_those_of_tarfile(kind, mtime, window, tmp_path):
    names = NAMES + [f"{LONGER}.jpg", "größe/ä.jpg", "byte\udcff.jpg"] * (kind != "ustar")
    path = write(tmp_path / "a.tar", names, kind, mtime=mtime)
    expected = by_tarfile(path)
    assert len(expected) == len(names)
    assert listed(path) == expected
    assert list(listed(path)) == names  # in the order of the file


@pytest.mark.skipif(not GNU_TAR, reason="needs tar")
@pytest.mark.parametrize("kind", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_members_are_those_that_gnu_tar_packed(kind, window, tmp_path):
    for name in NAMES[-30:] if kind != "v7" else NAMES[-30:-2]:
        file = tmp_path / "in" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content_of(name))
    (tmp_path / "in/empty").mkdir()
    path = str(tmp_path / "a.tar")
    words = ["-C", str(tmp_path / "in"), "-cf", path, f"--format={kind}", "."]
    subprocess.run([GNU_TAR, *words], check=True)
    expected = {
        file.relative_to(tmp_path / "in").as_posix(): file.read_bytes()
        for file in (tmp_path / "in").rglob("*")
        if file.is_file()
    }
    assert listed(path) == expected


@pytest.mark.skipif(not GNU_TAR, reason="needs tar")
@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_sparse_files_are_left_out_and_the_next_member_is_found(kind, tmp_path):
    with open(tmp_path / "sparse.jpg", "wb") as file:
        for number in range(100):  # more pieces than fit in the header
            file.seek(number * 65536)
            file.write(b"x")
    (tmp_path / "z.jpg").write_bytes(b"z")
    path = str(tmp_path / "a.tar")
    words = ["-C", str(tmp_path), "-cf", path, f"--format={kind}", "-S", "sparse.jpg", "z.jpg"]
    subprocess.run([GNU_TAR, *words], check=True)
    found = list_tar([path], False)
    assert list(found.names) == ["z.jpg"]
    assert found.left_out == {tar_headers.STORED_SPARSE: 1}
    assert listed(path) == {"z.jpg": b"z"}


def test_links_devices_and_folders_are_no_images(window, tmp_path):
    others = [
        info("hard.jpg", type=tarfile.LNKTYPE, linkname="a.jpg"),
        info("soft.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        info("device.jpg", type=tarfile.CHRTYPE),
        info("folder.jpg", type=tarfile.DIRTYPE),
        info("unknown.jpg", type=b"Q"),
    ]
    members = ["a.jpg", *((other, b"") for other in others), "b.jpg"]
    path = write(tmp_path / "a.tar", members)
    found = list_tar([path], False)
    assert list(found.names) == ["a.jpg", "b.jpg"]
    assert found.left_out == {tar_headers.LINK: 2, tar_headers.SPECIAL: 2}


def test_folders_of_old_archives_are_no_images(window, tmp_path):
    """They are files whose name ends with a slash."""
    old = info("./folder.jpg", type=tarfile.AREGTYPE)
    header = with_checksum(b"./folder.jpg/".ljust(100, b"\0") + old.tobuf()[100:])
    content = header + Path(write(tmp_path / "b.tar", ["folder.jpg/a.jpg"])).read_bytes()
    (tmp_path / "a.tar").write_bytes(content)
    found = list_tar([str(tmp_path / "a.tar")], False)
    assert list(found.names) == ["folder.jpg/a.jpg"]
    assert found.left_out == {}


def test_what_is_no_image_is_counted_as_in_folders(tmp_path):
    names = ["a.jpg", ".hidden.jpg", "__MACOSX/a/._1.jpg", "@eaDir/b.jpg", "notes.txt", "README"]
    names += ["folder.jpg/x.xml", "c/.jpg", "d/._e.jpg"]
    found = list_tar([write(tmp_path / "a.tar", names)], False)
    assert list(found.names) == ["a.jpg"]
    assert found.left_out == {SYSTEM: 5, ".txt": 1, ".xml": 1, "without extension": 1}


def test_endless_extensions_are_counted_together(tmp_path):
    names = ["a.jpg", *(f"b.{number:04d}" for number in range(MAX_KINDS + 20))]
    found = list_tar([write(tmp_path / "a.tar", names)], False)
    assert len(found.left_out) == MAX_KINDS + 1
    assert found.left_out[OTHERS] == 20


def test_names_are_normalized(tmp_path):
    names = ["./a.jpg", "b//c.jpg", "d/./e.jpg", "./././f.jpg", ".//g.jpg"]
    assert list(files_of([write(tmp_path / "a.tar", names)]).names) == [
        "a.jpg", "b/c.jpg", "d/e.jpg", "f.jpg", "g.jpg",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["../a.jpg", "/a.jpg", "b/../../a.jpg", "./../a.cls"])
def test_names_that_lead_outside_are_refused(name, tmp_path):
    path = write(tmp_path / "a.tar", ["ok.jpg", name])
    with pytest.raises(UserError, match=f"member '{name.removeprefix('./')}' has an absolute path"):
        list_tar([path], False)


def test_last_of_equal_names_counts_as_in_tar(window, tmp_path):
    members = [f"{number}.jpg" for number in range(200)]
    members += [(info("./7.jpg"), b"new"), (info("9.jpg"), b"newer"), (info("9.jpg"), b"newest")]
    path = write(tmp_path / "a.tar", members)
    found = list_tar([path], False)
    assert found.left_out == {tar.REPLACED: 3}
    content = listed(path)
    assert len(content) == len(found.names) == 200
    assert content["7.jpg"] == b"new"
    assert content["9.jpg"] == b"newest"


def test_equal_names_in_several_shards_are_all_kept(tmp_path):
    paths = [write(tmp_path / f"{n}.tar", [(info("0.jpg"), bytes([n]))]) for n in range(3)]
    files = files_of(paths)
    assert list(files.names) == ["0.jpg"] * 3
    assert [files.read(number) for number in range(3)] == [b"\0", b"\1", b"\2"]
    assert files.locate(1) == f"{paths[1]}/0.jpg"


def test_several_processes_list_as_one(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"{n}.tar", NAMES[n : n + 50]) for n in range(7)]
    monkeypatch.setattr(tar, "CORES", 1)
    alone = list_tar(paths, False)
    monkeypatch.setattr(tar, "CORES", 3)
    together = list_tar(paths, False)
    assert list(alone.names) == list(together.names)
    assert len(alone.names) == 350
    for name, places in alone.places.items():
        np.testing.assert_array_equal(places, together.places[name])


def test_error_of_another_process_is_raised_here(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "CORES", 2)
    (tmp_path / "b.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(UserError, match="b.tar: expected a tar file"):
        list_tar([write(tmp_path / "a.tar", NAMES), str(tmp_path / "b.tar")], False)


def test_joined_archives_are_read_to_their_end(window, tmp_path):
    parts = [write(tmp_path / f"{n}.tar", NAMES[n * 60 : n * 60 + 60]) for n in range(3)]
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join(Path(part).read_bytes() for part in parts))
    assert list(listed(joined)) == NAMES[:180]


def test_empty_shard_is_fine_if_others_have_images(tmp_path):
    empty, full = write(tmp_path / "a.tar", []), write(tmp_path / "b.tar", ["a.jpg"])
    assert list(list_tar([empty, full], False).names) == ["a.jpg"]
    with pytest.raises(UserError, match="a.tar: no images; expected some of .jpg"):
        list_tar([empty], False)


def numbers_of(size: int) -> dict[str, bytes]:
    """A size as octal digits, with and without end, and as a binary number."""
    octal = f"{size:o}".encode()
    return {
        "padded with spaces": octal.rjust(11) + b"\0",
        "without end": octal.rjust(12, b"0"),
        "end and more": octal + b"\0" + b"9" * (11 - len(octal)),
        "space at end": octal.rjust(11, b"0") + b" ",
        "binary": b"\x80" + size.to_bytes(11, "big"),
    }


def with_checksum(header: bytes, signed: bool = False) -> bytes:
    header = header[:148] + b" " * 8 + header[156:]
    total = sum(byte - 256 * (signed and byte > 127) for byte in header)
    return header[:148] + b"%06o\0 " % total + header[156:]


@pytest.mark.parametrize("way", numbers_of(0))
def test_sizes_in_all_notations(way, window, tmp_path):
    header = info("a.jpg", size=700).tobuf(tarfile.GNU_FORMAT)
    header = with_checksum(header[:124] + numbers_of(700)[way] + header[136:])
    end = info("b.jpg", size=1).tobuf(tarfile.GNU_FORMAT) + b"b" + bytes(511 + 1024)
    (tmp_path / "a.tar").write_bytes(header + b"a" * 700 + bytes(324) + end)
    assert listed(tmp_path / "a.tar") == {"a.jpg": b"a" * 700, "b.jpg": b"b"}


def test_checksum_of_signed_bytes_is_valid(tmp_path):
    header = with_checksum(info("ä.jpg").tobuf(tarfile.GNU_FORMAT), signed=True)
    (tmp_path / "a.tar").write_bytes(header + bytes(1024))
    assert list(listed(tmp_path / "a.tar")) == ["ä.jpg"]


def test_times_in_gnu_headers_are_no_part_of_the_name(tmp_path):
    """GNU tar --incremental writes them where USTAR has the start of a long name."""
    header = info("a.jpg").tobuf(tarfile.GNU_FORMAT)
    header = with_checksum(header[:345] + b"14000000000\0" + header[357:])
    (tmp_path / "a.tar").write_bytes(header + bytes(1024))
    assert list(listed(tmp_path / "a.tar")) == ["a.jpg"]


def test_image_of_more_than_2_gib_is_left_out(tmp_path):
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:  # sparse on disk
        file.write(info("large.jpg", size=2**31 + 1).tobuf(tarfile.GNU_FORMAT))
        file.seek(512 + 2**31 + 512)
        file.write(info("small.jpg").tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    found = list_tar([str(path)], False)
    assert list(found.names) == ["small.jpg"]
    assert found.left_out == {tar_headers.TOO_LARGE: 1}


def test_far_place_in_a_shard_of_more_than_2_tib(tmp_path):
    path = tmp_path / "a.tar"
    size, start = 2**42, 512 + 2**42  # more blocks than 32 bits number; sparse on disk
    try:
        with open(path, "wb") as file:
            file.write(info("large.bin", size=size).tobuf(tarfile.GNU_FORMAT))
            file.seek(start)
            file.write(info("small.jpg", size=3).tobuf(tarfile.GNU_FORMAT) + b"abc" + bytes(1533))
    except OSError:
        pytest.skip("the file system has no files of 4 TiB")
    assert listed(path) == {"small.jpg": b"abc"}


def test_places_take_at_most_16_bytes(tmp_path):
    found = list_tar([write(tmp_path / "a.tar", NAMES)], False)
    assert sum(array.dtype.itemsize for array in found.places.values()) <= 16


# --- damaged files --------------------------------------------------------------------------------


def test_shard_cut_anywhere_is_refused(window, tmp_path):
    """Also between two members, where only the zeros at the end are missing."""
    path = write(tmp_path / "a.tar", NAMES[:8], "pax", mtime=1.5)
    whole = Path(path).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for size in range(0, end, 256):
        Path(path).write_bytes(whole[:size])
        with pytest.raises(UserError, match="a.tar: .*(cut short|expected a tar file, got)"):
            list_tar([path], False)


@pytest.mark.parametrize("damaged", [0, 5, 120])
def test_damaged_header_is_named_by_its_byte(damaged, window, tmp_path):
    members = [(info(f"{number}.jpg"), b"x" * 600) for number in range(121)]
    path = write(tmp_path / "a.tar", members)
    content = bytearray(Path(path).read_bytes())
    content[damaged * 1536 + 130] ^= 1  # a digit of its size, which also hides what follows
    Path(path).write_bytes(content)
    where = f"byte {damaged * 1536}: expected a header" if damaged else "expected a tar file, but"
    with pytest.raises(UserError, match=f"a.tar: {where}"):
        list_tar([path], False)


@pytest.mark.parametrize("size", [b"hello world\0", b"-0000000001\0", b"\xff" * 12])
def test_size_that_is_no_number_is_refused(size, window, tmp_path):
    header = info("a.jpg").tobuf(tarfile.GNU_FORMAT)
    header = with_checksum(header[:124] + size + header[136:])
    (tmp_path / "a.tar").write_bytes(header + bytes(1024))
    with pytest.raises(UserError, match="a.tar: byte 0: the header gives the size"):
        list_tar([str(tmp_path / "a.tar")], False)


@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\xff" * 11])
def test_size_far_beyond_the_end_is_refused(size, window, tmp_path):
    header = info("a.jpg").tobuf(tarfile.GNU_FORMAT)
    header = with_checksum(header[:124] + size + header[136:])
    (tmp_path / "a.tar").write_bytes(header + bytes(1024))
    with pytest.raises(UserError, match=r"a.tar: cut short: it has 1536 bytes, but"):
        list_tar([str(tmp_path / "a.tar")], False)


def test_data_after_the_end_is_no_silent_loss(tmp_path):
    """A broken download leaves zeros in the middle, which look like the end."""
    path = write(tmp_path / "a.tar", [(info(f"{n}.jpg"), b"x" * 5000) for n in range(9)])
    content = bytearray(Path(path).read_bytes())
    content[2 * 5632 : 3 * 5632 + 2048] = bytes(5632 + 2048)  # one member, and half of another
    Path(path).write_bytes(content)
    with pytest.raises(UserError, match=r"a.tar: byte \d+: expected a header.*data follows"):
        list_tar([path], False)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (b"20 path=../../x.jpg\n", "has an absolute path or one with '..'"),
        (b"99 path=x.jpg\n", "the extended header is damaged"),
        (b"path=x.jpg\n", "the extended header is damaged"),
        (b"13 size=abc \n", "the size b'abc ' is no number of bytes"),
        (b"5009 size=" + b"9" * 4998 + b"\n", "is no number of bytes"),
        (b"10 size=7\n", "it has 3 bytes in one header and 7 in another"),
    ],
)
def test_wrong_extended_header_is_refused(record, problem, window, tmp_path):
    extended = info("x", size=len(record), type=b"x").tobuf(tarfile.GNU_FORMAT)
    extended += record + bytes(-len(record) % 512)
    member = info("a.jpg", size=3).tobuf(tarfile.GNU_FORMAT) + b"abc" + bytes(509)
    (tmp_path / "a.tar").write_bytes(extended + member + bytes(1024))
    with pytest.raises(UserError, match="a.tar: .*") as caught:
        list_tar([str(tmp_path / "a.tar")], False)
    assert problem in str(caught.value)


def test_long_name_of_any_size_is_not_read(tmp_path):
    header = info("x", size=2**40, type=b"L").tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(header + bytes(2048))
    with pytest.raises(UserError, match="a name of 1099511627776 bytes, expected at most"):
        list_tar([str(tmp_path / "a.tar")], False)


def test_unreadable_file_and_folder_are_named(tmp_path):
    with pytest.raises(UserError, match="none.tar: No such file or directory; check"):
        list_tar([str(tmp_path / "none.tar")], False)
    with pytest.raises(UserError, match=f"{tmp_path}: byte 0: .*directory"):
        list_tar([str(tmp_path)], False)


# --- paths ----------------------------------------------------------------------------------------


def expand_in(folder: Path, pattern: str) -> list[str]:
    return [Path(path).relative_to(folder).as_posix() for path in expand(f"{folder}/{pattern}")]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("s-{000..002}.tar", ["s-000.tar", "s-001.tar", "s-002.tar"]),
        ("s-{2..0}.tar", ["s-2.tar", "s-1.tar", "s-0.tar"]),
        ("s-{08..10}.tar", ["s-08.tar", "s-09.tar", "s-10.tar"]),
        ("s-{0..9..4}.tar", ["s-0.tar", "s-4.tar", "s-8.tar"]),
        ("{b,a}/{1..2}.tar", ["b/1.tar", "b/2.tar", "a/1.tar", "a/2.tar"]),
        ("{a}.tar", ["{a}.tar"]),
    ],
)
def test_braces_as_in_bash(pattern, expected, tmp_path):
    touch(tmp_path, *expected)
    assert expand_in(tmp_path, pattern) == expected


def test_patterns_and_paths(tmp_path):
    touch(tmp_path, "b.tar", "a.tar", "d/a.tar", "e/a.tar", "[x].tar", "c.txt")
    assert expand_in(tmp_path, "b.tar") == ["b.tar"]
    assert expand_in(tmp_path, "[ab].tar") == ["a.tar", "b.tar"]
    assert expand_in(tmp_path, "{d,e}/*.tar") == ["d/a.tar", "e/a.tar"]
    assert expand_in(tmp_path, "[x].tar") == ["[x].tar"]  # the file itself


def test_missing_shards_are_counted_and_named(tmp_path):
    touch(tmp_path, "0.tar", "3.tar")
    with pytest.raises(UserError, match=r"8 of 10 shards do not exist: \S*1.tar, .*6.tar and 3 mo"):
        expand(f"{tmp_path}/{{0..9}}.tar")
    with pytest.raises(UserError, match=r"\*.tgz: no such files; check --data_path"):
        expand(f"{tmp_path}/*.tgz")
    with pytest.raises(UserError, match="9.tar: no such file; check --data_path"):
        expand(f"{tmp_path}/9.tar")


def test_pattern_of_endless_files_is_refused():
    with pytest.raises(UserError, match="expected at most 10000000"):
        expand("{0..99999}{0..99999}.tar")
    with pytest.raises(UserError, match="expected at most 10000000"):
        expand("{0..99999999999}.tar")


@pytest.mark.parametrize("ending", ["tar.gz", "TGZ", "tar.zst", "tar.xz", "tar.bz2"])
def test_compressed_file_says_how_to_unpack(ending, tmp_path):
    touch(tmp_path, f"a.{ending}")
    with pytest.raises(UserError, match="no random access: unpack it first, (gunzip|un|bun)"):
        expand(f"{tmp_path}/a.{ending}")


def test_compressed_file_by_another_name_is_recognized(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as file:
        file.addfile(info("a.jpg", size=9999), io.BytesIO(os.urandom(9999)))
    with pytest.raises(UserError, match="a.tar: is compressed; .* gunzip"):
        list_tar([str(tmp_path / "a.tar")], False)


# --- reading --------------------------------------------------------------------------------------


def test_shard_that_was_cut_since_it_was_listed(tmp_path):
    path = write(tmp_path / "a.tar", [(info("a.jpg"), b"x" * 5000), (info("b.jpg"), b"y" * 5000)])
    files = files_of([path])
    os.truncate(path, 5000)
    with pytest.raises(
        UserError, match="a.tar: ends before byte 5512: it was cut short or changed"
    ):
        files.read(0)
    with pytest.raises(UserError, match="a.tar: ends before byte 11144: it was cut short"):
        files.read(1)


def test_shard_that_was_replaced_since_it_was_listed(tmp_path):
    path = write(tmp_path / "a.tar", ["a.jpg", "bc.jpg"])
    files = files_of([path])
    write(tmp_path / "a.tar", ["abcd.jpg", "bc.jpg"])
    with pytest.raises(UserError, match="a.tar: byte 0: not the listed image: it was cut short or"):
        files.read(0)
    os.remove(path)
    copy = pickle.loads(pickle.dumps(files))
    with pytest.raises(UserError, match="a.tar: No such file or directory; it was cut short or"):
        copy.read(0)


def test_read_of_any_order_with_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "OPEN_SHARDS", 3)
    paths = [write(tmp_path / f"{n}.tar", [(info("0.jpg"), b"%d" % n)]) for n in range(8)]
    files = files_of(paths)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for number in np.random.default_rng(0).integers(0, 8, 200):
        assert files.read(number) == b"%d" % number
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 3
        del files
        assert len(os.listdir("/proc/self/fd")) == before


def test_threads_may_read_while_shards_are_closed(tmp_path, monkeypatch):
    """A closed descriptor may be that of another shard by the time a thread reads it."""
    monkeypatch.setattr(tar, "OPEN_SHARDS", 1)
    paths = [write(tmp_path / f"{n}.tar", [(info("0.jpg"), bytes([n]) * 900)]) for n in range(6)]
    files = files_of(paths)

    def read(number: int) -> bool:
        return files.read(number) == bytes([number]) * 900

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, np.random.default_rng(0).integers(0, 6, 2000)))


def _read_all(files: TarFiles, queue) -> None:
    queue.put([files.read(number) for number in range(len(files))])


def test_forked_process_reads_with_the_same_files(tmp_path):
    path = write(tmp_path / "a.tar", NAMES)
    files = files_of([path])
    here = [files.read(number) for number in range(len(files))]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_read_all, args=(files, queue))
    process.start()
    assert queue.get(timeout=60) == here
    process.join()


def test_pickled_files_open_their_shards_themselves(tmp_path):
    files = files_of([write(tmp_path / "a.tar", NAMES)])
    expected = files.read(3)
    copy = pickle.loads(pickle.dumps(files))
    assert copy.read(3) == expected
    assert copy.locate(3) == files.locate(3)


def test_reading_without_pread_as_on_windows(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar", NAMES)
    expected = listed(path)
    monkeypatch.delattr(os, "pread")
    assert listed(path) == expected


def test_short_reads_of_network_disks_are_repeated(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar", NAMES)
    expected, pread = listed(path), os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, start: pread(fd, min(size, 700), start))
    assert listed(path) == expected


def test_what_is_behind_the_end_of_a_name_is_no_part_of_it(tmp_path):
    header = info("a.jpg").tobuf(tarfile.USTAR_FORMAT)
    header = with_checksum(b"a.jpg\0rest of a name.jpg".ljust(100, b"\0") + header[100:])
    (tmp_path / "a.tar").write_bytes(header + bytes(1024))
    assert list(listed(tmp_path / "a.tar")) == ["a.jpg"]
