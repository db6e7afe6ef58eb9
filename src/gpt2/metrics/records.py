"""What a run measures, as records, and `Metrics`, which gives each record to every sink.

Steps are counted in finished updates: `step 250` is the 250th update, after which the validation of
step 250 is measured and `step_000250.pt` is written. A new sink is one class with the methods of
`Sink` and an entry of `sinks.SINKS`.
"""

import contextlib
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from gpt2.base import addresses, log

logger = logging.getLogger(__name__)

RECENT_STEPS = 50
"""the time left is estimated from the speed of so many steps"""
WARN_EVERY_S = 600
"""between two warnings about the same sink"""


@dataclass(frozen=True)
class StepRecord:
    """One finished update."""

    step: int
    epoch: int
    loss: float
    """mean over the global batch, nats per token"""
    learning_rate: float
    grad_norm: float
    """before clipping"""
    elapsed_s: float
    tokens_per_s: float
    """of all ranks together"""
    mfu: float
    """model FLOPs utilisation: 1 is the peak of the hardware"""
    rank_s: list[float]
    """each rank's own time, without waiting for the other ranks' gradients"""
    rank_gpu: list[dict[str, float]] = field(default_factory=list)
    """what each rank uses of its GPU: memory_gb, peak_memory_gb and, where it can be measured,
    utilisation_percent; nothing on a CPU"""
    steps_left: int = 0
    applied: bool = True
    """whether the weights were updated: False if loss or gradient is NaN or infinite"""
    loss_scale: float | None = None
    """by which the loss was scaled for the gradients of float16; None for other types"""
    left_s: float | None = None
    """estimated time of the steps left; `Metrics` fills it in"""
    corpora: dict[str, float] = field(default_factory=dict)
    """of a mixture, the loss over the rows of each corpus that has some in this step"""


@dataclass(frozen=True)
class CorpusLoss:
    """The validation loss of one corpus of a mixture."""

    loss: float
    """nats per token"""
    bits_per_byte: float | None
    """None if its rows have no text"""


@dataclass(frozen=True)
class ValidationRecord:
    """The validation loss after a step."""

    step: int
    epoch: int
    loss: float
    """nats per token"""
    bits_per_byte: float | None = None
    """the same loss by the text of the targets; None if they have no text"""
    corpora: dict[str, CorpusLoss] = field(default_factory=dict)
    """of a mixture, by name; each corpus has the same number of rows in `loss`"""


@dataclass(frozen=True)
class HellaSwagRecord:
    """HellaSwag after a step: shares of right answers, `acc_norm` with lengths normalised."""

    step: int
    epoch: int
    acc: float
    acc_norm: float
    tasks: int


@dataclass(frozen=True)
class SamplesRecord:
    """Texts that the model generated after a step."""

    step: int
    texts: list[str]


@dataclass(frozen=True)
class EventRecord:
    """A log message of the program, with its traceback if it has one."""

    level: str
    """`INFO`, `WARNING`, …"""
    message: str


Record = StepRecord | ValidationRecord | HellaSwagRecord | SamplesRecord | EventRecord


class Sink(Protocol):
    """Where records go. A sink ignores the kinds of records that it has no place for.

    Methods raise OSError if the sink cannot write now; it is called again with the next record.
    """

    def write(self, record: Record) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Metrics:
    """Gives each record, and each log message of INFO and above, to every sink until it is closed.

    Without sinks (on ranks other than 0) it does nothing. No error of a sink ends the training.
    """

    def __init__(self, sinks: list[Sink], events: Iterable[EventRecord] = ()) -> None:
        """`events` are messages that were logged before the sinks were opened."""
        self._sinks = [_GuardedSink(sink) for sink in sinks]
        self._recent_token_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._handlers = contextlib.ExitStack()
        if sinks:
            self._handlers.enter_context(events_to(self._write))
        for event in events:
            self._write(event)

    def step(self, record: StepRecord, tokens_left: int = 0) -> None:
        """`tokens_left` are those of the steps left."""
        self._recent_token_s.append(1 / record.tokens_per_s)
        if tokens_left:
            left_s = tokens_left * statistics.median(self._recent_token_s)
            record = replace(record, left_s=left_s)
        self._write(record)

    def validation(
        self,
        step: int,
        epoch: int,
        loss: float,
        bits_per_byte: float | None = None,
        corpora: Mapping[str, CorpusLoss] | None = None,
    ) -> None:
        self._write(ValidationRecord(step, epoch, loss, bits_per_byte, dict(corpora or {})))

    def hellaswag(self, step: int, epoch: int, acc: float, acc_norm: float, tasks: int) -> None:
        self._write(HellaSwagRecord(step, epoch, acc, acc_norm, tasks))

    def samples(self, step: int, texts: list[str]) -> None:
        self._write(SamplesRecord(step, texts))

    def event(self, level: str, message: str) -> None:
        """A message for the sinks alone, which is not printed."""
        self._write(EventRecord(level, message))

    def flush(self) -> None:
        """Hands all records to the operating system, which keeps them if this process is killed."""
        for sink in self._sinks:
            sink.call(lambda sink: sink.flush())

    def close(self) -> None:
        """Closes the sinks, the last one first, so that the first ones log what goes wrong."""
        while self._sinks:
            self._sinks.pop().close()
        self._handlers.close()

    def _write(self, record: Record) -> None:
        for sink in self._sinks:
            sink.call(lambda sink: sink.write(record))


class _GuardedSink:
    """Calls a sink, and reports its errors instead of raising them.

    An OSError is a warning every ten minutes; the sink is called again with the next record. Any
    other error is a bug: it is logged with its traceback once, and the sink is switched off for ten
    minutes.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink, self._name = sink, type(sink).__name__
        self._quiet_until = self._off_until = -math.inf
        self._has_logged_traceback = False

    def call(self, act: Callable[[Sink], None]) -> None:
        if time.monotonic() < self._off_until:
            return
        try:
            act(self._sink)
        except OSError as error:
            self._warn(error)
        except Exception as error:
            self._off_until = time.monotonic() + WARN_EVERY_S
            if self._has_logged_traceback:
                self._warn(error)
            else:
                self._has_logged_traceback = True
                minutes = WARN_EVERY_S // 60
                logger.exception("%s failed; it is off for %d minutes", self._name, minutes)

    def close(self) -> None:
        self._off_until = -math.inf
        self.call(lambda sink: sink.close())

    def _warn(self, error: Exception) -> None:
        now = time.monotonic()
        if now >= self._quiet_until:
            # Before the message, which comes back to this sink as an event.
            self._quiet_until = now + WARN_EVERY_S
            logger.warning("%s cannot write: %s", self._name, error)


@contextlib.contextmanager
def events_to(write: Callable[[EventRecord], None]) -> Iterator[None]:
    """Within the context, `write` receives every log message of the package, INFO and above."""
    package = logging.getLogger(log.ROOT)
    level = package.level
    if not package.isEnabledFor(logging.INFO):  # a program that never called `log.setup`
        package.setLevel(logging.INFO)
    handler = _EventHandler(write)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


class _EventHandler(logging.Handler):
    def __init__(self, write: Callable[[EventRecord], None]) -> None:
        super().__init__(logging.INFO)
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(
                EventRecord(record.levelname, addresses.without_secrets(self.format(record)))
            )
        except Exception:  # as every handler of `logging` does: prints it to standard error
            self.handleError(record)
