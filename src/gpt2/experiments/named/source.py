"""Named experiments as a source of jobs; prints a line when one starts and when it ends."""

import collections
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gpt2.config import experiment_name
from gpt2.experiments.named import training_process
from gpt2.experiments.named.experiment import Experiment
from gpt2.experiments.pool.job import Event, Job, Slot
from gpt2.train.report import Answer

logger = logging.getLogger(__name__)

KILLED, TERMINATED = 128 + signal.SIGKILL, 128 + signal.SIGTERM
STOPPED = (128 + signal.SIGHUP, 128 + signal.SIGINT, TERMINATED)
"""exit codes of a training that a signal stopped"""


class NamedTrainings:
    """Gives each free slot the first experiment that may train there."""

    def __init__(self, experiments: Sequence[Experiment], slots: Sequence[Slot]) -> None:
        self._slots, self._free = slots, {slot.index for slot in slots}
        self._waiting = list(experiments)
        self._consoles: dict[str, Path] = {}
        self.running: set[str] = set()
        self.finished: list[str] = []
        self.failed: list[str] = []
        self.stop_requested: Callable[[], bool] = lambda: False
        """after that, no experiment begins"""

    def next(self) -> Job | None:
        for slot in self._slots:
            for experiment in list(self._waiting):
                if slot.index in self._free and self._suits(experiment, slot):
                    job = self._begin(experiment, slot)
                    if self.stop_requested():
                        return None
                    if job is not None:
                        self._waiting.remove(experiment)
                        self._free.discard(slot.index)
                        return job
        return None

    def event(self, event: Event) -> Answer:
        if event.job is None:  # nothing has happened for a while
            return "go"
        name = event.job.name
        if event.kind == "started":
            self.running.add(name)
            on = (
                event.slot.name
                if event.slot.name == experiment_name.CPU
                else f"gpu {event.slot.name}"
            )
            say(f"started   {name} on {on}, process {event.pid}, {self._consoles[name]}")
            return "go"
        self.running.discard(name)
        self._free.add(event.slot.index)
        if event.kind == "finished":
            self._end(name, event.elapsed_s, event.result)
        elif event.kind == "stopped":  # its worker has ended before the training did
            self._end(name, event.elapsed_s, KILLED if event.reason else TERMINATED)
        else:
            logger.error("%s: %s", name, event.traceback or event.reason)
            self._end(name, event.elapsed_s, 1)
        return "go"

    def lose(self, slot: Slot) -> None:
        """Gives this slot no more experiments."""
        self._free.discard(slot.index)

    def _suits(self, experiment: Experiment, slot: Slot) -> bool:
        """Whether an experiment may train on this slot: not if it had another of these GPUs before,
        where its checkpoints are."""
        if experiment.folder(slot.name).is_dir():
            return True
        return not any(experiment.folder(other.name).is_dir() for other in self._slots)

    def _begin(self, experiment: Experiment, slot: Slot) -> Job | None:
        """The job of an experiment, whose folder is made; None if that is impossible."""
        folder = experiment.folder(slot.name)
        console = folder / f"console_{time.strftime('%Y%m%d_%H%M%S')}.log"
        self._consoles[experiment.name] = console
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logger.error("%s: cannot make %s: %s", experiment.name, folder, error.strerror)
            self._waiting.remove(experiment)
            self._end(experiment.name, 0, 1)
            return None
        flags = [*experiment.flags, "--experiment_name", experiment.name]
        return training_process.job(experiment.name, flags, console, slot.index)

    def _end(self, name: str, elapsed_s: float, code: int) -> None:
        how = "finished" if code == 0 else "stopped" if code in STOPPED else "failed"
        say(f"{how:<9} {name} after {elapsed_s:.0f} s, exit code {code}")
        (self.failed if code else self.finished).append(name)
        if code and self._consoles[name].is_file():
            with self._consoles[name].open(errors="replace") as console:
                for line in collections.deque(console, maxlen=1):
                    say(f"          {line.rstrip()}")


def say(line: str) -> None:
    """Prints a line; experiments go on after the reader of standard output has closed it."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
