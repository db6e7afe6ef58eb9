"""A training in a process of its own, as a job: what it prints goes to a console log."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import gpt2
from gpt2.base.errors import UserError
from gpt2.config import experiment_name
from gpt2.experiments.named.experiment import Experiment
from gpt2.experiments.pool.job import Job
from gpt2.experiments.pool.worker import Reporter

POLL_S = 0.2
"""how soon an end and a stop are noticed"""


def job(experiment: Experiment, begun: str, slot: int | None) -> Job:
    """The job that trains an experiment; its result is the exit code of the training."""
    values = {"name": experiment.name, "flags": [*experiment.flags], "begun": begun}
    return Job(experiment.name, f"{__name__}:run", values, slot=slot)


def run(name: str, flags: Sequence[str], begun: str, report: Reporter) -> int:
    """Trains to the end and returns the exit code, 128 + N if signal N killed the training.

    A request to stop is passed on as SIGTERM, after which a training saves and ends.
    """
    script = Path(gpt2.__file__).parents[1] / "train_improved.py"  # an installed package has none
    train = [str(script)] if script.exists() else ["-m", "gpt2", "train"]
    command = [sys.executable, *train, *flags, "--experiment_name", name]
    gpu_id = experiment_name.first_visible(os.environ["CUDA_VISIBLE_DEVICES"])
    console = Experiment(name, tuple(flags)).console(gpu_id, begun)
    try:
        console.parent.mkdir(parents=True, exist_ok=True)
        with console.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
    except OSError as error:
        raise UserError(f"cannot start {command[0]}, which writes to {console}: {error}") from error
    while process.poll() is None and not report.stop_requested:
        time.sleep(POLL_S)
    process.terminate()  # does nothing if it has ended
    code = process.wait()
    return code if code >= 0 else 128 - code
