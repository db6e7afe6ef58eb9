"""Patterns become a checked list of files of one kind."""

from pathlib import Path

import pytest

from gpt2.data import files


def write(folder: Path, **contents: bytes | str) -> None:
    for name, content in contents.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_is_a_name_before_it_is_a_pattern(folder: Path):
    write(folder, **{"a[1].txt": "this", "a1.txt": "not this"})
    assert files.expand(["a[1].txt"]) == ["a[1].txt"]
