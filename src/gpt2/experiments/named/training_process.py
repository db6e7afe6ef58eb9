"""A training in a process of its own, as a job: what it prints goes to a console log."""

import collections
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpt2
from gpt2.base.errors import UserError
from gpt2.experiments.named.experiment import Experiment
from gpt2.experiments.pool.job import Job, Stopped
from gpt2.experiments.pool.worker import Reporter
from gpt2.metrics.notify import VARIABLE

POLL_S = 0.2
"""how soon an end and a stop are noticed"""
STOPPED = (-signal.SIGTERM, 128 + signal.SIGTERM)
"""return codes of a training that SIGTERM ended, before and after it could save"""


def job(experiment: Experiment, begun: str, slot: int | None) -> Job:
    """The job that trains an experiment."""
    values = {"name": experiment.name, "flags": [*experiment.flags], "begun": begun}
    return Job(experiment.name, f"{__name__}:run", values, slot=slot)


def run(name: str, flags: list[str], begun: str, report: Reporter) -> None:
    """Trains to the end. A request to stop is passed on as SIGTERM, after which it saves and ends.

    Raises Stopped if it ended so, and UserError with its exit code and last line if it failed.
    """
    script = Path(gpt2.__file__).parents[1] / "train_improved.py"  # an installed package has none
    train = [str(script)] if script.exists() else ["-m", "gpt2", "train"]
    # One message is posted when all experiments have ended, not one for each.
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    command = [sys.executable, *train, *flags, "--experiment_name", name]
    console = Experiment(name, tuple(flags)).console(os.environ, begun)
    try:
        console.parent.mkdir(parents=True, exist_ok=True)
        with console.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
    except OSError as error:
        raise UserError(f"cannot start {command[0]}, which writes to {console}: {error}") from error
    while process.poll() is None and not report.stop_requested:
        time.sleep(POLL_S)
    process.terminate()  # does nothing if it has ended
    code = process.wait()
    if code in STOPPED and report.stop_requested:
        raise Stopped
    if code:
        with console.open(errors="replace") as lines:
            last = "".join(collections.deque(lines, maxlen=1)).strip()
        raise UserError(f"exit code {code if code > 0 else 128 - code}; its last line: {last}")
