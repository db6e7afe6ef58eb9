"""What a job may do with its standard output and error."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2.experiments.pool import log_lines


@contextlib.contextmanager
def logged(path: Path) -> Iterator[list[str]]:
    """Standard output goes to a log in the block; the texts of its lines follow after it."""
    lines: list[str] = []
    handle = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        with contextlib.redirect_stdout(log_lines.text_stream(handle)):
            yield lines
            sys.stdout.flush()
        lines += [line.partition(" | ")[2] for line in path.read_text().splitlines()]
    finally:
        os.close(handle)


def test_it_is_a_text_stream(tmp_path: Path):
    with logged(tmp_path / "log") as lines:
        stream = sys.stdout
        assert (stream.encoding, stream.isatty(), stream.writable()) == ("utf-8", False, True)
        assert os.fstat(stream.fileno()).st_ino == (tmp_path / "log").stat().st_ino
        stream.reconfigure(line_buffering=True, errors="replace")
        stream.buffer.write("bytes ä\n".encode())
        stream.buffer.flush()
        print("a", "b", sep="", end="")
        print("c", file=stream, flush=True)
        stream.writelines(["one\n", "two\n"])
        with pytest.raises(OSError):
            stream.read()
    assert lines == ["bytes ä", "abc", "one", "two"]


def test_lines_are_written_whole(tmp_path: Path):
    with logged(tmp_path / "log") as lines:
        for part in ("begin", "ning", " 1 %\r2 %\r\n", "\n", "\udcff", "rest"):
            sys.stdout.write(part)
        sys.stdout.buffer.write(b"\xff")
    assert lines == ["beginning 1 %", "2 %", "", "\\udcffrest\\xff"]
    assert all(" | " in line for line in (tmp_path / "log").read_text().splitlines())


def test_a_stream_that_is_dropped_leaves_the_file_open(tmp_path: Path):
    with logged(tmp_path / "log") as lines:
        print("x", file=log_lines.text_stream(sys.stdout.fileno()))
        print("y")
    assert lines == ["x", "y"]
