"""`log.txt` as a metrics sink."""

import contextlib
import logging
from datetime import datetime
from pathlib import Path

from gpt2.base import log
from gpt2.metrics.console import hellaswag_line, sample_block, step_line
from gpt2.metrics.records import StepRecord


class LogFile:
    """`log.txt`: every run appended to the ones before, losses with six digits, and the program
    messages of the package while it is open."""

    def __init__(self, path: Path, run_name: str, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._heading = f"# run {run_name} | from step {step} | {datetime.now():%Y-%m-%d %H:%M:%S}"
        self._handler = _Handler(self)
        logging.getLogger(log.ROOT).addHandler(self._handler)

    def step(self, record: StepRecord, left_s: float | None) -> None:
        self.message(step_line(record, left_s, digits=6))

    def validation(self, step: int, epoch: int, loss: float) -> None:
        self.message(f"step {step} | epoch {epoch} | val loss: {loss:.6f}")

    def hellaswag(self, step: int, epoch: int, acc: float, acc_norm: float, tasks: int) -> None:
        self.message(hellaswag_line(step, epoch, acc, acc_norm, tasks))

    def samples(self, step: int, texts: list[str]) -> None:
        self.message(sample_block(step, texts))

    def message(self, text: str) -> None:
        if self._heading:  # not when it is opened, which must succeed on a full disk
            self._file.write(self._heading + "\n")
            self._heading = ""
        self._file.write(text + "\n")

    def flush(self) -> None:
        pass

    def close(self) -> None:
        logging.getLogger(log.ROOT).removeHandler(self._handler)
        self._file.close()


class _Handler(logging.Handler):
    """Hands program messages to a log file."""

    def __init__(self, file: LogFile) -> None:
        super().__init__(logging.INFO)
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # a full disk never ends a run
            self._file.message(log.line_of(record))
