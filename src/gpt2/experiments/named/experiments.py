"""Named experiments: trainings with flags of their own, side by side on the pool.

Each is a process that a worker starts, and whose output goes to a console log.
"""

import collections
import itertools
import logging
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gpt2
from gpt2.base.errors import ConfigError, UserError
from gpt2.base.text import console
from gpt2.config import experiment_name, gpu_list
from gpt2.distributed import visible_gpus
from gpt2.experiments.pool import slots
from gpt2.experiments.pool.job import Event, Job, Slot, Stopped
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Limits, Scheduler
from gpt2.experiments.pool.worker import Reporter
from gpt2.experiments.progress.live_view import showing_progress
from gpt2.experiments.progress.state import ExperimentState
from gpt2.metrics.notify import VARIABLE
from gpt2.train.report import Answer

logger = logging.getLogger(__name__)

NAME = re.compile(r"\w[\w.-]*", re.ASCII)
LIMITS = Limits(retries=0, grace=math.inf)
"""an experiment has one attempt, and as long as it needs for saving"""
KILLING_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
"""that end the experiments at once if one of them comes after the signal that stops them"""
POLL_S = 0.2
"""how soon an end and a stop of a training are noticed"""
LONGEST_FRAME = 200
"""lines"""
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
        return Job(found.name, f"{__name__}:train", values, slot=slot)

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
        log = self._experiments[event.job.name].console(event.slot.environment, self._begun)
        return replace(event, log=str(log))


def train(name: str, flags: list[str], begun: str, report: Reporter) -> None:
    """Trains to the end. A request to stop is passed on as SIGTERM, after which it saves and ends.

    Raises Stopped if it ended so, and UserError with its exit code and what it printed last if it
    failed.
    """
    script = Path(gpt2.__file__).parents[1] / "train_improved.py"  # an installed package has none
    program = [str(script)] if script.exists() else ["-m", "gpt2", "train"]
    # One message is posted when all experiments have ended, not one for each.
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    command = [sys.executable, *program, *flags, "--experiment_name", name]
    log = Experiment(name, tuple(flags)).console(os.environ, begun)
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
    except OSError as error:
        raise UserError(f"cannot start {command[0]}, which writes to {log}: {error}") from error
    while process.poll() is None and not report.stop_requested:
        time.sleep(POLL_S)
    process.terminate()  # does nothing if it has ended
    code = process.wait()
    if code in STOPPED and report.stop_requested:
        raise Stopped
    if code:
        raise UserError(f"exit code {code if code > 0 else 128 - code}; {printed_last(log)}")


def printed_last(log: Path) -> str:
    """The last line of a log, or the first paragraph in the frame that ends it: tyro frames what is
    wrong with flags, and prints suggestions and a hint below a rule."""
    with log.open(errors="replace") as file:
        lines = [line.strip() for line in collections.deque(file, maxlen=LONGEST_FRAME)]
    tops = [number for number, line in enumerate(lines) if line.startswith("╭")]
    if not tops or not lines[-1].startswith("╰"):
        return f"its last line: {''.join(lines[-1:])}"
    inside = (line.strip("│ ") for line in lines[tops[-1] + 1 : -1])
    return " ".join(itertools.takewhile(lambda text: text.strip("─"), inside))
