"""In one process; tests/faults has several ranks."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import HashStore

from forked_ranks import Ranks
from gpt2.distributed import lost_rank, watchdog
from gpt2.distributed.watchdog import Watchdog
from support import ROOT, wait_until


def test_a_run_without_torchrun_outlives_its_shell():
    """Only under torchrun does the death of the parent end a rank."""
    script = (
        "import ctypes, os, sys\n"
        "from gpt2.distributed import watchdog\n"
        "watchdog.end_with_torchrun()\n"
        "number = ctypes.c_int()\n"
        "ctypes.CDLL(None).prctl(2, ctypes.byref(number))\n"
        "print(number.value, 'torch' in sys.modules)\n"
    )

    def output(**environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONPATH": str(ROOT / "src"), **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    assert output() == "0 False"
    assert output(TORCHELASTIC_RUN_ID="x") == "9 False"


@pytest.fixture
def exit_codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Those with which a watchdog would have ended this process, which is not under torchrun."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(watchdog, "NOTICED_S", 0.0)
    return codes


LOST = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:11498. This is typical.")
HANGS = RuntimeError("[unbound_buffer.cc:81] Timed out waiting 9000ms for recv operation")


def test_the_first_rank_that_fails_hands_its_error_on_before_it_exits(exit_codes: list[int]):
    failures: list[Exception] = []
    errors = [RuntimeError("CUDA error"), LOST]
    for error in errors:
        with pytest.raises(RuntimeError), Watchdog(0, HashStore(), 1.0, failures.append):
            raise error
    assert failures == errors[:1], "a lost connection is not this rank's failure"
    assert exit_codes == [1, 1]


def failed(rank: int, error: Exception, store: HashStore) -> tuple[str, list[str]]:
    """The rank ends with `error`. Returns the reason for `status.json`, and the reports."""
    reports: list[str] = []
    watching = Watchdog(rank, store, 9.0, size=4, report=reports.append)
    with pytest.raises(type(error)), watching:
        reason = watching.reason(error)
        raise error
    return reason, reports


def test_ranks_that_notice_name_the_rank_that_failed_first(exit_codes, caplog):
    store = HashStore()
    cause = "ZeroDivisionError: the reason"
    reason, reports = failed(1, ZeroDivisionError("the reason\nand more"), store)
    assert (reason, reports) == (f"{cause}\nand more", [f"rank 1: {cause}"])
    assert "rank 1 failed:\nTraceback" in caplog.text
    nccl = RuntimeError("ncclRemoteError: A call failed possibly due to a network error")
    for rank, error in ((0, LOST), (2, nccl)):
        caplog.clear()
        reason, reports = failed(rank, error, store)
        assert (reason, reports) == (f"rank 1: {cause}\nand more", [f"rank 1: {cause}"])
        assert caplog.messages == [f"rank {rank} exits because of rank 1: {cause}"]
    assert failed(3, HANGS, store)[1] == [f"rank 1: {cause}"]


def test_a_report_that_fails_is_logged_and_the_rank_still_exits(exit_codes, caplog):
    def fail(_: object) -> None:
        raise OSError("the disk is full")

    with pytest.raises(RuntimeError), Watchdog(0, HashStore(), 1.0, on_failure=fail, report=fail):
        raise RuntimeError("CUDA error")
    assert exit_codes == [1]
    assert caplog.text.count("OSError: the disk is full") == 2


def test_without_a_known_cause_a_rank_says_what_it_noticed(exit_codes, caplog):
    said = lost_rank.LOST
    assert failed(0, LOST, HashStore()) == (said, [f"rank 0: {said}"])
    assert caplog.messages == [f"rank 0 {said}:\n{LOST}"]
    said = "no reply from another rank within 9 s: a rank hangs"
    assert failed(0, HANGS, HashStore()) == (said, [f"rank 0: {said}"])
    assert "rank 0 got no reply from another rank within 9 s (--collective_timeout)" in caplog.text


def test_a_rank_that_has_noticed_nothing_hangs(exit_codes, caplog):
    store = HashStore()
    Watchdog(2, store, 9.0, size=4).reason(LOST)  # the connections of rank 0 are closed
    reason, reports = failed(0, HANGS, store)
    assert reason == "rank 1: it hangs: no reply from it, nor from rank 3 within 9 s"
    assert reports == [reason]
    assert f"from another rank within 9 s (--collective_timeout): {reason}. This" in caplog.text
    assert failed(3, LOST, store)[1] == [reason]


def test_no_rank_is_said_to_hang_if_all_have_noticed(exit_codes):
    store = HashStore()
    for rank in (1, 2, 3):
        Watchdog(rank, store, 9.0, size=4).reason(LOST)
    assert failed(0, HANGS, store)[0] == "no reply from another rank within 9 s: a rank hangs"


def test_a_rank_waits_for_the_cause_to_be_recorded(exit_codes, monkeypatch):
    monkeypatch.setattr(watchdog, "NOTICED_S", 60.0)
    store = HashStore()
    slow = threading.Timer(0.2, Watchdog(1, store, 9.0, size=2).first_to_fail, ["the late reason"])
    slow.start()
    assert Watchdog(0, store, 9.0, size=2).reason(LOST) == "rank 1: the late reason"
    slow.join()


STUCK = """
import ctypes, os, signal
from torch.distributed import TCPStore
from gpt2.distributed.watchdog import Watchdog
store = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
signal.signal(signal.SIGINT, lambda *_: None)
with Watchdog(int(os.environ["RANK"]), store, 600.0, size=2):
    os.write(1, b"waits\\n")
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
"""A rank whose main thread waits in C for ever, as in a collective of NCCL: signals do not wake it,
and no Python code runs there."""


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[Ranks]:
    """Two such ranks, under an agent's name."""
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    with Ranks([], 2, tmp_path, script, TORCHELASTIC_RUN_ID="x") as ranks:
        wait_until(lambda: ranks.text().count("waits\n") == 2, ranks.text)
        yield ranks


def test_a_rank_ends_when_another_one_is_killed(stuck: Ranks):
    one, other = stuck.processes
    other.kill()
    one.join()
    assert one.exitcode == 1
    assert "rank 0 is ended because of this: rank 1: its process was killed" in stuck.text()


def test_ctrl_c_twice_ends_a_rank_that_waits_in_c(stuck: Ranks):
    one, _ = stuck.processes
    while one.is_alive():  # signals that arrive together are one
        os.kill(one.pid, signal.SIGINT)
        one.join(0.1)
    assert one.exitcode == 130
    assert "rank 0 is ended because of this: Ctrl+C" in stuck.text()
