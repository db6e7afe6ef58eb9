"""A named experiment: a training in a process of its own, whose output goes to a console log."""

import collections
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gpt2
from gpt2.base.errors import ConfigError, UserError
from gpt2.config import experiment_name, gpu_list
from gpt2.experiments.pool.job import Stopped
from gpt2.experiments.pool.worker import Reporter
from gpt2.metrics.notify import VARIABLE

NAME = re.compile(r"\w[\w.-]*", re.ASCII)
POLL_S = 0.2
"""how soon an end and a stop are noticed"""
STOPPED = (-signal.SIGTERM, 128 + signal.SIGTERM)
"""return codes of a training that SIGTERM ended, before and after it could save"""


@dataclass(frozen=True)
class Experiment:
    """One training among several."""

    name: str
    flags: tuple[str, ...]
    """of its training, without --experiment_name"""

    def folder(self, environment: Mapping[str, str]) -> Path:
        """The folder of its logs, as --log_dir or --out_dir choose it, if it trains on the first
        GPU in the CUDA_VISIBLE_DEVICES of this environment."""
        given: dict[str, str] = {}
        for flag, following in itertools.pairwise((*self.flags, "")):
            name, has_value, value = flag.partition("=")
            given[name.replace("-", "_")] = value if has_value else following
        log_dir = given.get("__log_dir") or Path(given.get("__out_dir", ""), "logs")
        shown = gpu_list.shown_by(environment[gpu_list.VARIABLE])
        gpu_id = experiment_name.first_gpu(shown or [])
        return Path(log_dir) / experiment_name.label(self.name, gpu_id)

    def console(self, environment: Mapping[str, str], begun: str) -> Path:
        """The file for what it prints; `begun` is the date and time when the command started."""
        return self.folder(environment) / f"console_{begun}.log"


def parse_all(texts: Sequence[str], common: Sequence[str] = ()) -> list[Experiment]:
    """An experiment for each text `NAME FLAGS…`; `common` flags come before its own.

    Raises ConfigError for a name that no file can have, a name that two have, and an open quote.
    """
    experiments: dict[str, Experiment] = {}
    for text in texts:
        name, *rest = text.split(maxsplit=1) or [""]
        if not NAME.fullmatch(name):
            raise ConfigError(f"'{text}' must begin with a name of letters, digits, . _ and -")
        if name in experiments:
            raise ConfigError(f"two experiments have the name {name}")
        try:
            experiments[name] = Experiment(name, (*common, *shlex.split("".join(rest))))
        except ValueError as error:
            raise ConfigError(f"'{text}' has an unmatched quote") from error
    return [*experiments.values()]


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
