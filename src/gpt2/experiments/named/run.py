"""Runs named experiments on the pool until all have ended, or a signal stops them."""

import math
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from gpt2.base.text import counted
from gpt2.experiments.named.experiment import Experiment
from gpt2.experiments.named.source import NamedTrainings, say
from gpt2.experiments.pool.job import Event, Slot
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Limits, Scheduler

LIMITS = Limits(retries=0, grace=math.inf)
"""an experiment has one attempt, and as long as it needs for saving"""


def run(experiments: Sequence[Experiment], slots: Sequence[Slot]) -> int:
    """Trains the experiments, one at a time on each slot. Prints a summary.

    Returns the exit code: 0 if all finished, 1 if one ended early, 128 + N after signal N.
    """
    source = NamedTrainings(experiments, slots)

    def on_event(event: Event) -> None:
        if event.kind == "slot_lost":
            source.lose(event.slot)
        elif event.kind == "stopping":
            running = counted(len(source.running), "experiment")
            say(f"Stopping: waiting for {running} to save; a second signal kills")
            _kill_at_next_signal(source)

    scheduler = Scheduler(
        Engine(slots),
        source,
        on_event,
        # A training has its own console log; how a job fails is in its event.
        log_of=lambda _slot, _job: Path(os.devnull),
        limits=LIMITS,
    )
    source.stop_requested = lambda: scheduler.stop_requested
    number = scheduler.run()
    _print_summary(source, [experiment.name for experiment in experiments])
    if number:
        say("To continue, run the same command with --resume latest after --")
        return 128 + number
    return 1 if source.failed else 0


def _kill_at_next_signal(source: NamedTrainings) -> None:
    """Lets the next SIGINT, SIGTERM or SIGHUP end the scheduler, which kills what still runs."""

    def kill(_number: int, _frame: FrameType | None) -> None:
        if not source.running:
            return
        for number in handled:
            signal.signal(number, signal.SIG_IGN)
        with suppress(OSError):  # not `print`, which the signal may have interrupted
            os.write(1, f"Killing {counted(len(source.running), 'experiment')}\n".encode())
        raise KeyboardInterrupt

    candidates = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handled = [number for number in candidates if signal.getsignal(number) is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, kill)


def _print_summary(source: NamedTrainings, names: Sequence[str]) -> None:
    finished, failed = source.finished, source.failed
    waiting = [name for name in names if name not in finished and name not in failed]
    which = f": {' '.join(finished)}" if finished else ""
    say(f"\n{len(finished)} of {len(names)} finished{which}")
    if failed:
        say(f"{len(failed)} ended early: {' '.join(failed)}")
    if waiting:
        say(f"{len(waiting)} never began: {' '.join(waiting)}")
