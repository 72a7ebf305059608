# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""console.log: a copy of what the terminal shows."""

import logging
import os
import resource
import signal

import pytest

from parallel import console
from parallel.process_group import launch


@pytest.fixture
def log(monkeypatch) -> console.ConsoleLog:
    """A `ConsoleLog` of the toolkit's logger, without a folder yet."""
    handler = console.ConsoleLog()
    monkeypatch.setattr(console.get_logger(), "handlers", [handler])
    console.get_logger().setLevel(logging.INFO)
    return handler


def lines(folder) -> list[str]:
    return [line for line in (folder / "console.log").read_text().splitlines() if line[:3] != "---"]


def test_lines_before_the_folder_is_known_are_in_it_too(log, tmp_path):
    console.get_logger().warning("first")
    console.open_console_log(tmp_path)
    console.get_logger().info("second %d", 2)
    console.note("of a bar")
    assert lines(tmp_path) == ["warning: first", "second 2", "of a bar"]
    console.open_console_log(tmp_path)  # a resumed run
    console.note("third")
    assert lines(tmp_path)[-2:] == ["of a bar", "third"]
    assert (tmp_path / "console.log").read_text().count("--- ") == 2  # the time and the command


def test_without_a_folder_nothing_is_written_or_kept(log, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    console.note("first")
    console.open_console_log(None)
    console.note("second")
    assert list(tmp_path.iterdir()) == []
    assert b"second" not in log.waiting


def test_full_disk_is_reported_once_and_loses_no_line(log, tmp_path, caplog):
    console.get_logger().propagate = True
    console.open_console_log(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "console.log").stat().st_size
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        for number in range(5):
            console.note(f"line {number}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    (message,) = caplog.messages
    assert "console.log (File too large); the run continues" in message
    console.note("last")
    written = [line for line in lines(tmp_path) if "cannot write" not in line]
    assert written == [*(f"line {number}" for number in range(5)), "last"]


def test_folder_that_is_moved_away_and_back_loses_no_line(log, tmp_path):
    folder, gone = tmp_path / "run", tmp_path / "gone"
    folder.mkdir()
    console.open_console_log(folder)
    folder.rename(gone)
    console.note("meanwhile")
    assert not folder.exists()
    gone.rename(folder)
    console.note("later")
    assert [line for line in lines(folder) if "cannot" not in line] == ["meanwhile", "later"]


def test_errors_that_end_a_run_are_in_it(log, tmp_path, capsys):
    """A traceback and a message on stderr are no log lines."""

    def fail(error: BaseException) -> None:
        raise error

    console.open_console_log(tmp_path)
    with pytest.raises(ZeroDivisionError):
        launch(fail, ZeroDivisionError("a bug"))
    with pytest.raises(SystemExit):
        launch(fail, KeyboardInterrupt())
    text = (tmp_path / "console.log").read_text()
    assert "Traceback" in text
    assert "ZeroDivisionError: a bug" in text
    assert "interrupted; checkpoints are intact" in text
    assert os.linesep.join(lines(tmp_path)[-1:]) in capsys.readouterr().err
