"""What one process can show of it; the rest is in tests/faults."""

import subprocess
import sys

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

    def told(**environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONPATH": str(ROOT / "src"), **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    assert told() == "0 False"
    assert told(TORCHELASTIC_RUN_ID="x") == "9 False"
