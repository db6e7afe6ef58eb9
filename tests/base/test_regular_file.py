import os
from pathlib import Path

import pytest

from gpt2.base import regular_file


def test_a_file_is_read(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfgr\xc3\xbcn")
    (link := tmp_path / "link").symlink_to(path)
    assert regular_file.read_text(path) == "grün"
    assert regular_file.read_bytes(link) == path.read_bytes()


def test_a_fifo_is_an_error_not_a_wait(tmp_path: Path):
    os.mkfifo(path := tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        regular_file.read_bytes(path)


def test_a_folder_is_an_error(tmp_path: Path):
    with pytest.raises(IsADirectoryError):
        regular_file.read_bytes(tmp_path)
