"""In one process; tests/faults has several ranks."""

import os
import signal
import subprocess
import sys
import time

import pytest
from torch.distributed import TCPStore

from gpt2.distributed.watchdog import Watchdog
from support import ROOT


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
import ctypes, os, sys, time
from torch.distributed import TCPStore
from gpt2.distributed.watchdog import Watchdog
rank, port = int(sys.argv[1]), int(sys.argv[2])
store = TCPStore("127.0.0.1", port, is_master=False)
os.environ["TORCHELASTIC_RUN_ID"] = "x"
{before}
with Watchdog(rank, store, 600.0, size=2):
    print(os.getpid(), flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
"""A rank whose main thread waits in C for ever, as in a collective of NCCL: signals do not wake it,
and no Python code runs there."""


class StuckRanks:
    """Two such ranks, and the store that torchrun would keep."""

    def __init__(self, before: str = "") -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True)
        script = STUCK.format(before=before)
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(rank), str(self.store.port)],
                env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        for rank in self.ranks:
            assert rank.stdout.readline()

    def __enter__(self) -> list[subprocess.Popen[str]]:
        return self.ranks

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.communicate()


def test_a_rank_ends_when_another_one_is_killed():
    with StuckRanks() as (one, other):
        other.kill()
        other.wait()
        assert one.wait(60) == 1
        assert "rank 0 is ended because of this: another rank failed" in one.stderr.read()


def test_ctrl_c_twice_ends_a_rank_that_waits_in_c():
    handler = "import signal; signal.signal(signal.SIGINT, lambda *_: None)"
    with StuckRanks(handler) as (one, _):
        while one.poll() is None:  # signals that arrive together are one
            one.send_signal(signal.SIGINT)
            time.sleep(0.1)
        assert one.returncode == 130
        assert "rank 0 is ended because of this: Ctrl+C" in one.stderr.read()
