import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from gpt2.base import folder_lock
from gpt2.base.errors import CheckpointError, FolderInUse


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


@pytest.fixture
def useless_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process gets every lock, as on some network file systems; times are short."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    monkeypatch.setattr(folder_lock, "CLAIM_POLL_S", 0.01)
    monkeypatch.setattr(folder_lock, "SILENCE_S", 0.3)


def claim_elsewhere(folder: Path, **changes: object) -> Path:
    """The owner file of a process that this one cannot see."""
    me = folder_lock.Owner.this_process()
    path = folder / folder_lock.OWNER_NAME
    values = asdict(me) | {"host": "other", "boot": "another", "claim": "theirs"} | changes
    path.write_text(json.dumps(values))
    return path


def test_useless_locks_on_one_machine(tmp_path: Path, useless_locks: None):
    with folder_lock.held(tmp_path):
        assert folder_lock.is_held(tmp_path)
        refused = pytest.raises(FolderInUse, match=rf"process {os.getpid()} on")
        with refused, folder_lock.held(tmp_path):
            pass
    assert not folder_lock.is_held(tmp_path)


def test_an_owner_elsewhere_that_gives_signs_of_life_is_respected(
    tmp_path: Path, useless_locks: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(folder_lock, "SILENCE_S", 60.0)
    path = claim_elsewhere(tmp_path)
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        refused = pytest.raises(FolderInUse, match=r"another run .* process \d+ on other")
        with refused, folder_lock.held(tmp_path):
            pass
    finally:
        is_over.set()
        thread.join()
    assert json.loads(path.read_text())["claim"] == "theirs"


@pytest.mark.parametrize("content", [None, "", "{"])
def test_a_silent_owner_is_dead_after_a_while_which_is_said(
    tmp_path: Path, useless_locks: None, caplog: pytest.LogCaptureFixture, content: str | None
):
    path = claim_elsewhere(tmp_path)
    if content is not None:
        path.write_text(content)
    with folder_lock.held(tmp_path):
        assert folder_lock.owner(tmp_path).pid == os.getpid()
    assert "for a sign of life: another run is using" in caplog.messages[0]
    assert "gave no sign of life; taking over" in caplog.messages[1]
    assert not path.exists()


def test_a_dead_owner_of_this_machine_is_replaced_at_once(
    tmp_path: Path, useless_locks: None, caplog: pytest.LogCaptureFixture
):
    """Its process ended, or the machine was restarted since."""
    mine = folder_lock.Owner.this_process()
    for changes in ({"boot": mine.boot, "ticks": 5}, {"host": mine.host, "boot": "earlier"}):
        claim_elsewhere(tmp_path, **changes)
        with folder_lock.held(tmp_path):
            assert folder_lock.owner(tmp_path).boot == mine.boot
    assert not caplog.messages


def test_an_owner_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folder_lock, "HEARTBEAT_S", 0.01)
    path = tmp_path / folder_lock.OWNER_NAME
    with folder_lock.held(tmp_path):
        content, first = path.read_text(), path.stat().st_mtime_ns
        while path.stat().st_mtime_ns == first:
            pass
        assert path.read_text() == content
        path.unlink()
        while not path.exists():
            pass
    assert not path.exists()


def test_a_process_whose_folder_was_taken_over_ends(tmp_path: Path):
    """It may have been suspended for an hour."""
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from gpt2.base import folder_lock\n"
        "folder_lock.HEARTBEAT_S = 0.01\n"
        "with folder_lock.held(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as first:
        first.stdout.readline()
        temporary = claim_elsewhere(tmp_path).rename(tmp_path / "theirs")
        os.replace(temporary, tmp_path / folder_lock.OWNER_NAME)
        assert first.wait() == 1
        assert "on other" in (error := first.stderr.read())
        assert "this process ends without saving" in error
    assert folder_lock.owner(tmp_path).claim == "theirs"


def test_a_full_disk_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    expected = r"cannot write .*owner\.json: No space left on device; make room"
    with pytest.raises(CheckpointError, match=expected), folder_lock.held(tmp_path):
        pass
    assert not (tmp_path / folder_lock.OWNER_NAME).exists()


def test_a_lock_that_cannot_be_made_is_a_line(tmp_path: Path):
    """As on a full disk, and with a folder in its place."""
    (tmp_path / folder_lock.NAME).mkdir()
    with (
        pytest.raises(
            CheckpointError, match=r"cannot write .*run\.lock: Is a directory; make room"
        ),
        folder_lock.held(tmp_path),
    ):
        pass


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
