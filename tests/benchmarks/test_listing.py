# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The tar files of the listing benchmark are valid, and its table has both rows."""

import tarfile

from benchmarks import listing


def test_written_members_are_those_that_tarfile_finds(tmp_path):
    paths = listing.write_shards(str(tmp_path), members=2700, shards=2, size=600)
    names = []
    for path in paths:
        with tarfile.open(path, "r:") as file:
            names += [member.name for member in file if member.size == 600]
    assert len(names) == 2700
    assert names[0] == "n00000000/n00000000_00000000.JPEG"
    assert names[2699] == "n00000002/n00000002_00002699.JPEG"


def test_table_has_both_rows(tmp_path, capsys):
    output = tmp_path / "results.md"
    words = "--members 500 --shards 3 --rounds 1 --tarfile 100 --bytes 10"
    listing.main([*words.split(), "--folder", str(tmp_path), "--output", str(output)])
    text = output.read_text()
    assert "| `list_tar` | 500 | 3 | **" in text
    assert "| first start, `--data_index` | 500 | 3 | " in text
    assert "| later start | 500 | 3 | " in text
    assert "| Python's `tarfile` | 100 | 1 | " in text
    assert text.strip() == capsys.readouterr().out.strip()
    assert list(tmp_path.iterdir()) == [output]  # the tar files are removed
