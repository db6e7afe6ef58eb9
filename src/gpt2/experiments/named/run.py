"""Runs named experiments on the pool until all have ended, or a signal stops them."""

import logging
import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gpt2.base.text import console
from gpt2.distributed import visible_gpus
from gpt2.experiments.named import experiment
from gpt2.experiments.named.experiment import Experiment
from gpt2.experiments.pool import slots
from gpt2.experiments.pool.job import Event, Job, Slot
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Limits, Scheduler
from gpt2.experiments.progress.live_view import showing_progress
from gpt2.experiments.progress.state import ExperimentState
from gpt2.train.report import Answer

logger = logging.getLogger(__name__)

LIMITS = Limits(retries=0, grace=math.inf)
"""an experiment has one attempt, and as long as it needs for saving"""
KILLING_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
"""that end the experiments at once if one of them comes after the signal that stops them"""


def slots_of(
    gpus: Sequence[str] | None = None, max_gpus: int | None = None, shares: int | None = None
) -> list[Slot]:
    """A slot for each of these GPUs, `max_gpus` at most; the default is those that
    CUDA_VISIBLE_DEVICES shows, or that the machine has without it. Without GPUs, slots for `shares`
    of the cores: by default two, or one for `max_gpus` 1."""
    shown = visible_gpus.ids() if gpus is None else gpus
    if shown is None:
        import torch  # takes seconds to import

        shown = visible_gpus.ids_of(torch.cuda.device_count())
    used = shown[:max_gpus]
    count = len(used) or shares or min(slots.CPU_SHARES, max_gpus or slots.CPU_SHARES)
    threads = slots.threads(len(os.sched_getaffinity(0)) / count)
    return slots.of_gpus(used, count, threads) if used else slots.of_cores(count, threads)


def run(experiments: Sequence[Experiment], on: Sequence[Slot]) -> tuple[int, ExperimentState]:
    """Trains the experiments, one at a time on each slot.

    Returns the exit code (0 if all finished, 1 if one ended early, 128 + N after signal N) and the
    last state.
    """
    out, source = console(), NamedTrainings(experiments, on)
    begun = ExperimentState.at_start("experiments", len(experiments), on)
    with showing_progress(begun, out=out) as progress:

        def on_event(event: Event) -> None:
            if event.kind == "stopping":
                # Another signal raises KeyboardInterrupt: the scheduler kills what still runs.
                for number in KILLING_SIGNALS:
                    if signal.getsignal(number) != signal.SIG_IGN:
                        signal.signal(number, signal.default_int_handler)
            progress.report(source.as_shown(event))

        # A training has its own console log; how a job fails is in its event.
        without_log = {"log_of": lambda _slot, _job: Path(os.devnull)}
        number = Scheduler(Engine(on), source, on_event, limits=LIMITS, **without_log).run()
    if number:
        out.print("To continue, run the same command with --resume latest after --")
    last = progress.current
    return 128 + number if number else int(last.done < last.total), last


class NamedTrainings:
    """A source with a job for each experiment."""

    def __init__(self, experiments: Sequence[Experiment], on: Sequence[Slot]) -> None:
        self._experiments = {item.name: item for item in experiments}
        self._waiting, self._slots = iter(experiments), on
        self._begun = time.strftime("%Y%m%d_%H%M%S")

    def next(self) -> Job | None:
        if (found := next(self._waiting, None)) is None:
            return None
        # It waits for the GPU that it had before, where its checkpoints are.
        had = [slot for slot in self._slots if found.folder(slot.environment).is_dir()]
        slot = had[0].index if 0 < len(had) < len(self._slots) else None
        values = {"name": found.name, "flags": [*found.flags], "begun": self._begun}
        return Job(found.name, f"{experiment.__name__}:run", values, slot=slot)

    def event(self, event: Event) -> Answer:
        if event.traceback:  # of an error that is not the training's
            logger.error("%s", event.traceback)
        return "go"

    def as_shown(self, event: Event) -> Event:
        """The event with the console log of its training, or with what a stop means here."""
        if event.kind == "stopping":
            return replace(event, reason="every experiment saves and ends; a second signal kills")
        if event.job is None:
            return event
        console = self._experiments[event.job.name].console(event.slot.environment, self._begun)
        return replace(event, log=str(console))
