import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from gpt2 import lock
from gpt2.errors import CheckpointError


def test_one_at_a_time(tmp_path: Path):
    assert not lock.is_held(tmp_path)
    with lock.held(tmp_path):
        assert lock.is_held(tmp_path)
        assert lock.owner(tmp_path).pid == os.getpid()
        with (
            pytest.raises(CheckpointError, match=rf"another run .* process {os.getpid()} on"),
            lock.held(tmp_path),
        ):
            pass
    assert not lock.is_held(tmp_path)
    with lock.held(tmp_path):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock.held(tmp_path):
        assert lock.is_held(tmp_path)
        refused = pytest.raises(CheckpointError, match=rf"process {os.getpid()} on")
        with refused, lock.held(tmp_path):
            pass
    later = json.loads((tmp_path / lock.NAME).read_text()) | {"ticks": 5}  # its pid is used again
    (tmp_path / lock.NAME).write_text(json.dumps(later))
    assert not lock.is_held(tmp_path)


def test_an_owner_that_said_nothing(tmp_path: Path):
    assert lock.owner(tmp_path) is None
    (tmp_path / lock.NAME).write_text("{")
    assert lock.owner(tmp_path) is None
