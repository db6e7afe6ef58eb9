"""A training in a process of its own, as a job: what it prints goes to a console log."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import gpt2
from gpt2.base.errors import UserError
from gpt2.experiments.pool.job import Job
from gpt2.experiments.pool.worker import Reporter

POLL_S = 0.2
"""how soon a stop is noticed"""


def job(name: str, flags: Sequence[str], console: Path, slot: int) -> Job:
    """The job that trains with `flags` on a slot; its result is the exit code of the training."""
    script = Path(gpt2.__file__).parents[1] / "train_improved.py"  # an installed package has none
    train = [str(script)] if script.exists() else ["-m", "gpt2", "train"]
    values = {"command": [sys.executable, *train, *flags], "console": str(console)}
    return Job(name, f"{__name__}:run", values, slot=slot)


def run(command: Sequence[str], console: str, report: Reporter) -> int:
    """Runs the command to its end and returns its exit code, 128 + N if signal N killed it.

    A request to stop is passed on as SIGTERM, after which a training saves and ends.
    """
    try:
        with open(console, "wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
    except OSError as error:
        raise UserError(f"cannot start {command[0]}, which writes to {console}: {error}") from error
    stop_sent = False
    while True:
        try:
            code = process.wait(POLL_S)
            return code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            if report.stop_requested and not stop_sent:
                process.terminate()
                stop_sent = True
