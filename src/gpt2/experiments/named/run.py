"""Runs named experiments on the pool until all have ended, or a signal stops them."""

import collections
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console

from gpt2.base.text import console, counted
from gpt2.config import experiment_name
from gpt2.experiments.named import training_process
from gpt2.experiments.named.experiment import Experiment
from gpt2.experiments.pool.job import Event, Job, Slot
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Limits, Scheduler
from gpt2.experiments.progress.live_view import printing_in_background
from gpt2.train.report import Answer

logger = logging.getLogger(__name__)

LIMITS = Limits(retries=0, grace=math.inf)
"""an experiment has one attempt, and as long as it needs for saving"""
STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
KILLED, *STOPPED = (128 + number for number in (signal.SIGKILL, *STOP_SIGNALS))
"""exit codes of a training that a signal ended"""


def run(experiments: Sequence[Experiment], slots: Sequence[Slot]) -> int:
    """Trains the experiments, one at a time on each slot. Prints a summary.

    Returns the exit code: 0 if all finished, 1 if one ended early, 128 + N after signal N.
    """
    out = console()
    with printing_in_background(out):
        source = NamedTrainings(experiments, slots, out)
        scheduler = Scheduler(
            Engine(slots),
            source,
            source.show,
            # A training has its own console log; how a job fails is in its event.
            log_of=lambda _slot, _job: Path(os.devnull),
            limits=LIMITS,
        )
        source.stop_requested = lambda: scheduler.stop_requested
        number = scheduler.run()
        source.print_summary()
        if number:
            out.print("To continue, run the same command with --resume latest after --")
    return 128 + number if number else int(any(source.exit_codes.values()))


class NamedTrainings:
    """A source with a job for each experiment; prints a line when one starts and when it ends."""

    def __init__(
        self, experiments: Sequence[Experiment], slots: Sequence[Slot], out: Console
    ) -> None:
        self._experiments = {experiment.name: experiment for experiment in experiments}
        self._waiting, self._slots, self._out = iter(experiments), slots, out
        self._begun = time.strftime("%Y%m%d_%H%M%S")
        self._running: set[str] = set()
        self.exit_codes: dict[str, int] = {}
        """of the experiments that have ended"""
        self.stop_requested: Callable[[], bool] = lambda: False
        """after that, no experiment begins"""

    def next(self) -> Job | None:
        experiment = next(self._waiting, None)
        if experiment is None:
            return None
        # It waits for the GPU that it had before, where its checkpoints are.
        had = [slot for slot in self._slots if experiment.folder(slot.name).is_dir()]
        slot = had[0].index if 0 < len(had) < len(self._slots) else None
        return (
            None if self.stop_requested() else training_process.job(experiment, self._begun, slot)
        )

    def event(self, event: Event) -> Answer:
        if event.job is None:  # nothing has happened for a while
            return "go"
        name, slot = event.job.name, event.slot.name
        if event.kind == "started":
            self._running.add(name)
            where = slot if slot == experiment_name.CPU else f"gpu {slot}"
            log = self._experiments[name].console(slot, self._begun)
            self._say(f"started   {name} on {where}, process {event.pid}, {log}")
            return "go"
        code = 1
        if event.kind == "finished":
            code = event.result
        elif event.kind == "stopped":  # its worker has ended before the training did
            code = KILLED if event.reason else 128 + signal.SIGTERM
        else:
            logger.error("%s: %s", name, event.traceback or event.reason)
        self._running.discard(name)
        self.exit_codes[name] = code
        how = "finished" if code == 0 else "stopped" if code in STOPPED else "failed"
        self._say(f"{how:<9} {name} after {event.elapsed_s:.0f} s, exit code {code}")
        log = self._experiments[name].console(slot, self._begun)
        if code and log.is_file():
            with log.open(errors="replace") as lines:
                for line in collections.deque(lines, maxlen=1):
                    self._say(f"          {line.rstrip()}")
        return "go"

    def show(self, event: Event) -> None:
        """Prints that the scheduler stops; then the next signal kills what still runs."""
        if event.kind == "stopping":
            running = counted(len(self._running), "experiment")
            self._say(f"Stopping: waiting for {running} to save; a second signal kills")
            handled = [item for item in STOP_SIGNALS if signal.getsignal(item) != signal.SIG_IGN]
            for number in handled:
                signal.signal(number, self._kill)

    def _kill(self, _number: int, _frame: FrameType | None) -> None:
        if self._running:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            # Not `_say`, which the signal may have interrupted.
            self._out.file.write(f"Killing {counted(len(self._running), 'experiment')}\n")
            raise KeyboardInterrupt

    def print_summary(self) -> None:
        """Prints which experiments finished, ended early and never began."""
        finished = [name for name, code in self.exit_codes.items() if code == 0]
        failed = [name for name, code in self.exit_codes.items() if code]
        waiting = [name for name in self._experiments if name not in self.exit_codes]
        which = f": {' '.join(finished)}" if finished else ""
        self._say(f"\n{len(finished)} of {len(self._experiments)} finished{which}")
        if failed:
            self._say(f"{len(failed)} ended early: {' '.join(failed)}")
        if waiting:
            self._say(f"{len(waiting)} never began: {' '.join(waiting)}")

    def _say(self, line: str) -> None:
        self._out.print(line, soft_wrap=True)
