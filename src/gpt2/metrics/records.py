"""What a run tells of itself: console, log file, TensorBoard. Silent off rank 0.

Steps are counted in finished updates: `step 250` is the 250th update, after which the validation of
step 250 is measured and `step_000250.pt` is written. A new sink is one class with the methods of
`Sink` and one line where a run makes its sinks.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from gpt2.base.errors import ConfigError
from gpt2.config.run import WatchConfig

T = TypeVar("T")
RECENT_STEPS = 50  # what "recent" means for the time left
WARN_EVERY_S = 600  # of a sink that cannot write


@dataclass(frozen=True)
class StepRecord:
    """One finished update."""

    step: int
    epoch: int
    loss: float
    """mean over the global batch, nats per token"""
    learning_rate: float
    grad_norm: float
    elapsed_s: float
    tokens_per_s: float
    mfu: float
    rank_s: list[float]
    """each rank's own time until it waits for the others' gradients"""
    gpu: dict[str, float] = field(default_factory=dict)
    """memory and utilisation, where there is CUDA"""
    steps_left: int = 0
    applied: bool = True
    """whether the weights were updated: not if loss or gradient is no finite number"""


class Sink(Protocol):
    """Where records go."""

    def step(self, record: StepRecord, left_s: float | None) -> None: ...
    def validation(self, step: int, epoch: int, loss: float) -> None: ...
    def hellaswag(self, step: int, epoch: int, acc: float, acc_norm: float, tasks: int) -> None: ...
    def samples(self, step: int, texts: list[str]) -> None: ...
    def message(self, text: str) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Metrics:
    """Hands each record to every sink; without sinks (off rank 0) it does nothing.

    A sink that cannot write (a full disk, a terminal that is gone) never ends the training.
    """

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks
        self._silent_until: dict[int, float] = {}
        self._recent_s: deque[float] = deque(maxlen=RECENT_STEPS)

    def step(self, record: StepRecord) -> None:
        self._recent_s.append(record.elapsed_s)
        left_s = record.steps_left * statistics.median(self._recent_s)
        self._each(lambda sink: sink.step(record, left_s if record.steps_left else None))

    def validation(self, step: int, epoch: int, loss: float) -> None:
        self._each(lambda sink: sink.validation(step, epoch, loss))

    def hellaswag(self, step: int, epoch: int, acc: float, acc_norm: float, tasks: int) -> None:
        self._each(lambda sink: sink.hellaswag(step, epoch, acc, acc_norm, tasks))

    def samples(self, step: int, texts: list[str]) -> None:
        self._each(lambda sink: sink.samples(step, texts))

    def message(self, text: str) -> None:
        self._each(lambda sink: sink.message(text))

    def flush(self) -> None:
        """Lets all that was told reach the system, which keeps it when this process is killed."""
        self._each(lambda sink: sink.flush())

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, tell: Callable[[Sink], None]) -> None:
        for sink in self._sinks:
            try:
                tell(sink)
            except (OSError, ValueError) as error:
                now = time.monotonic()
                if now > self._silent_until.get(id(sink), 0):
                    self._silent_until[id(sink)] = now + WARN_EVERY_S
                    self.message(f"WARNING: {type(sink).__name__} cannot write: {error}")


def require_folders(watch: WatchConfig, with_runs: bool) -> None:
    """Makes the folders of the sinks; raises ConfigError, naming the flag, if one cannot be."""
    folders = {"log_dir": watch.log_dir}
    if with_runs:
        folders["runs_dir"] = watch.runs_dir
    for flag, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot make {folder}: {error.strerror}; choose another folder with --{flag} or "
                "--out_dir"
            ) from error
