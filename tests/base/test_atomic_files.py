import os
from pathlib import Path

import pytest

from gpt2.base import atomic_files


def test_a_file_is_complete_or_absent(tmp_path: Path):
    path = tmp_path / "a.bin"
    with atomic_files.writing(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_one(tmp_path: Path):
    path = tmp_path / "a.bin"
    atomic_files.write_text(path, "old")
    with pytest.raises(KeyError), atomic_files.writing(path) as file:
        file.write(b"half of the n")
        raise KeyError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_data_then_name_then_folder_reach_the_disk(tmp_path: Path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: (
            events.append(
                "folder" if Path(f"/proc/self/fd/{handle}").resolve().is_dir() else "data"
            ),
            fsync(handle),
        ),
    )
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("name"), replace(*names)))
    atomic_files.write_text(tmp_path / "a", "text")
    assert events == ["data", "name", "folder"]


def test_a_folder_is_complete_or_absent(tmp_path: Path):
    """A new folder, a replaced one, a failed write, and leftovers of a killed process."""
    path = tmp_path / "a"
    (tmp_path / ".a.tmp").mkdir()
    (tmp_path / ".a.tmp" / "half").touch()
    for name in ("one", "two"):
        with atomic_files.writing_folder(path) as folder:
            (folder / name).write_text(name)
            assert not (path / name).exists()
        assert [file.name for file in path.iterdir()] == [name]
    with pytest.raises(KeyError), atomic_files.writing_folder(path) as folder:
        (folder / "three").touch()
        raise KeyError
    assert [file.name for file in path.iterdir()] == ["two"]
    assert os.listdir(tmp_path) == ["a"]


def test_point_replaces_a_link(tmp_path: Path):
    link = tmp_path / "latest"
    atomic_files.point(link, "one")
    atomic_files.point(link, "two")
    assert os.readlink(link) == "two"
    assert os.listdir(tmp_path) == ["latest"]


def test_sweep_removes_only_our_temporary_files(tmp_path: Path):
    for name in ("step_1.pt.tmp", "other.tmp", "step_1.pt"):
        (tmp_path / name).touch()
    atomic_files.remove_temporary(tmp_path, owns=lambda name: name.startswith("step_"))
    assert sorted(os.listdir(tmp_path)) == ["other.tmp", "step_1.pt"]


def test_a_folder_whose_replacement_was_killed_between_its_renames_is_restored(tmp_path: Path):
    """Also when the next attempt fails, on a full disk."""
    folder = tmp_path / "export"
    with atomic_files.writing_folder(folder) as temporary:
        (temporary / "weights").write_text("old")
    os.replace(folder, tmp_path / ".export.old")
    with pytest.raises(KeyError), atomic_files.writing_folder(folder):
        raise KeyError
    assert (folder / "weights").read_text() == "old"
    with atomic_files.writing_folder(folder) as temporary:
        (temporary / "weights").write_text("new")
    assert (folder / "weights").read_text() == "new"
    assert os.listdir(tmp_path) == ["export"]


def test_what_is_no_link_points_nowhere(tmp_path: Path):
    for name, content in (("weights.pt", b"PK\3\4"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        assert atomic_files.pointed_at(tmp_path / name) is None
    for path in (tmp_path, tmp_path / "missing"):
        assert atomic_files.pointed_at(path) is None


@pytest.mark.parametrize("path", ["/", ".", ".."])
def test_what_can_be_no_file_is_an_error_of_the_system(tmp_path: Path, monkeypatch, path: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError):
        atomic_files.write_text(Path(path), "text")
    assert not list(tmp_path.iterdir())
