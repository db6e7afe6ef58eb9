import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2.base import folder_lock
from gpt2.base.errors import FolderInUse


def test_one_at_a_time(tmp_path: Path):
    assert not folder_lock.is_held(tmp_path)
    with folder_lock.held(tmp_path):
        assert folder_lock.is_held(tmp_path)
        assert folder_lock.owner(tmp_path).pid == os.getpid()
        with (
            pytest.raises(FolderInUse, match=rf"another run .* process {os.getpid()} on"),
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
        refused = pytest.raises(FolderInUse, match=rf"process {os.getpid()} on")
        with refused, folder_lock.held(tmp_path):
            pass
        left = json.loads((tmp_path / folder_lock.OWNER_NAME).read_text())
    later = left | {"ticks": 5}  # the owner was killed, and its pid is used again
    (tmp_path / folder_lock.OWNER_NAME).write_text(json.dumps(later))
    assert not folder_lock.is_held(tmp_path)
    with folder_lock.held(tmp_path):
        assert folder_lock.is_held(tmp_path)


def test_an_unreadable_owner_is_unknown(tmp_path: Path):
    assert folder_lock.owner(tmp_path) is None
    (tmp_path / folder_lock.OWNER_NAME).write_text("{")
    assert folder_lock.owner(tmp_path) is None


def test_an_owner_of_a_later_version_is_read(tmp_path: Path):
    with folder_lock.held(tmp_path):
        owner = folder_lock.owner(tmp_path)
        values = json.loads((tmp_path / folder_lock.OWNER_NAME).read_text()) | {"user": "me"}
        (tmp_path / folder_lock.OWNER_NAME).write_text(json.dumps(values))
        assert folder_lock.owner(tmp_path) == owner


def test_a_look_changes_nothing_and_the_end_leaves_no_owner(tmp_path: Path):
    assert not folder_lock.is_held(tmp_path)
    assert not list(tmp_path.iterdir())
    with folder_lock.held(tmp_path):
        assert folder_lock.owner(tmp_path).command
    assert folder_lock.owner(tmp_path) is None


def test_the_lock_file_of_an_earlier_version(tmp_path: Path):
    """It named the owner itself, and stayed after the run."""
    path = tmp_path / folder_lock.NAME
    path.write_text('{"host": "other", "pid": 1, "started": "2026-01-01 00:00:00", "ticks": 7}\n')
    assert not folder_lock.is_held(tmp_path)
    with path.open() as file:  # a run of an earlier version holds it
        fcntl.flock(file, fcntl.LOCK_EX)
        assert folder_lock.is_held(tmp_path)
        with (
            pytest.raises(FolderInUse, match="an unknown process"),
            folder_lock.held(tmp_path),
        ):
            pass
    with folder_lock.held(tmp_path):
        assert folder_lock.owner(tmp_path).pid == os.getpid()


def test_a_forked_process_does_not_keep_the_lock_of_a_killed_owner(tmp_path: Path):
    script = (
        "import os, sys, signal, time\n"
        "from pathlib import Path\n"
        "from gpt2.base import folder_lock\n"
        "with folder_lock.held(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        time.sleep(600)\n"
        "    print(child, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        child = int(owner.stdout.readline())
        owner.wait()
        try:
            with folder_lock.held(tmp_path):
                assert folder_lock.owner(tmp_path).pid == os.getpid()
        finally:
            os.kill(child, signal.SIGKILL)
