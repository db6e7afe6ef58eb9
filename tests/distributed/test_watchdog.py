"""In one process; tests/faults has several ranks."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from forked_ranks import Ranks
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


class StoreOfOneRank:
    """The part of torch's Store that a failing rank uses."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        return self.values.setdefault(key, value.encode())


def test_the_first_rank_that_fails_hands_its_error_on_before_it_exits(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(os, "_exit", lambda code: None)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    failures: list[Exception] = []
    errors = [RuntimeError("CUDA error"), RuntimeError("gloo: Connection closed by peer")]
    for error in errors:
        with pytest.raises(RuntimeError), Watchdog(0, StoreOfOneRank(), 1.0, failures.append):
            raise error
    assert failures == errors[:1], "a lost connection is not this rank's failure"


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
    assert "rank 0 is ended because of this: another rank failed" in stuck.text()


def test_ctrl_c_twice_ends_a_rank_that_waits_in_c(stuck: Ranks):
    one, _ = stuck.processes
    while one.is_alive():  # signals that arrive together are one
        os.kill(one.pid, signal.SIGINT)
        one.join(0.1)
    assert one.exitcode == 130
    assert "rank 0 is ended because of this: Ctrl+C" in stuck.text()
