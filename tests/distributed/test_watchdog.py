"""In one process; tests/faults has several ranks."""

import os
import subprocess
import sys

import pytest

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
    failures: list[Exception] = []
    errors = [RuntimeError("CUDA error"), RuntimeError("gloo: Connection closed by peer")]
    for error in errors:
        with pytest.raises(RuntimeError), Watchdog(0, StoreOfOneRank(), 1.0, failures.append):
            raise error
    assert failures == errors[:1], "a lost connection is not this rank's failure"
