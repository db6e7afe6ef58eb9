import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from gpt2.base import folder_lock
from gpt2.base.errors import CheckpointError


def test_one_at_a_time(tmp_path: Path):
    assert not folder_lock.is_held(tmp_path)
    with folder_lock.held(tmp_path):
        assert folder_lock.is_held(tmp_path)
        assert folder_lock.owner(tmp_path).pid == os.getpid()
        with (
            pytest.raises(CheckpointError, match=rf"another run .* process {os.getpid()} on"),
            folder_lock.held(tmp_path),
        ):
            pass
    assert not folder_lock.is_held(tmp_path)
    with folder_lock.held(tmp_path):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with folder_lock.held(tmp_path):
        assert folder_lock.is_held(tmp_path)
        refused = pytest.raises(CheckpointError, match=rf"process {os.getpid()} on")
        with refused, folder_lock.held(tmp_path):
            pass
    later = json.loads((tmp_path / folder_lock.NAME).read_text()) | {
        "ticks": 5
    }  # its pid is used again
    (tmp_path / folder_lock.NAME).write_text(json.dumps(later))
    assert not folder_lock.is_held(tmp_path)


def test_an_unreadable_owner_is_unknown(tmp_path: Path):
    assert folder_lock.owner(tmp_path) is None
    (tmp_path / folder_lock.NAME).write_text("{")
    assert folder_lock.owner(tmp_path) is None


def test_an_owner_of_a_later_version_is_read(tmp_path: Path):
    with folder_lock.held(tmp_path):
        owner = folder_lock.owner(tmp_path)
        values = json.loads((tmp_path / folder_lock.NAME).read_text()) | {"user": "me"}
        (tmp_path / folder_lock.NAME).write_text(json.dumps(values))
        assert folder_lock.owner(tmp_path) == owner
