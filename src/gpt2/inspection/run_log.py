"""What a run logs, read while the log grows: each reading takes only what was appended.

The file is opened for reading, for a moment, and never locked. It may be moved, cut, replaced or
deleted meanwhile, and the run may be resumed.
"""

import os
from array import array
from bisect import bisect_right
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from gpt2.base import json_fields, regular_file
from gpt2.base.json_fields import Timestamp
from gpt2.metrics import log_reader
from gpt2.metrics.jsonl import RECORDS_NAME

BLOCK_BYTES = 2**24
KEPT_MESSAGES = 200
SAMPLE_INDENT = "    "
STEP_NUMBERS = ("loss", "learning_rate", "elapsed_s", "tokens_per_s")
"""that every record of a step has; NaN where they are null"""


USED_IF_THERE = {
    "run": str | None,
    "time": Timestamp | None,
    "left_s": Timestamp | None,  # seconds too, which are added to one
    "steps_left": int | None,
    "mfu": float | None,
    "grad_norm": float | None,
    "epoch": int | None,
    "rank_gpu": list[dict[str, float | None]] | None,
}
"""types of what the live view shows of a record"""


class Message(NamedTuple):
    """A log message of the run."""

    time: float | None
    """seconds since 1970; None if it was read from `log.txt`, which has no times"""
    level: str
    text: str

    @property
    def is_warning(self) -> bool:
        return self.level not in ("INFO", "DEBUG")


class RunLog:
    """The steps, measurements and messages of a run, without the steps that a resume undid."""

    def __init__(self, path: Path, run_name: str | None = None) -> None:
        """`path` is a log of either format; the `metrics.jsonl` beside it is preferred. Without
        `run_name`, it is the run that began last in the log."""
        self._path, self._given_name = path, run_name
        self.name = run_name
        self._name_in_text: str | None = None
        """the run whose lines follow in `log.txt`"""
        self._file_id, self._position = (0, 0), 0
        self.steps, self.losses = array("q"), array("d")
        self.skipped: list[int] = []
        """steps whose update was left out"""
        self.val_losses: dict[int, float] = {}
        self.corpus_losses: dict[str, dict[int, float]] = {}
        """of validations, by name of corpus of a mixture; `log.txt` alone does not give them"""
        self.bits_per_byte: dict[int, float] = {}
        """of validations; those of earlier versions have none"""
        self.hellaswag: dict[int, float] = {}
        """acc_norm by step"""
        self.last: dict[str, Any] = {}
        """the record of the newest step; empty before the first one"""
        self.step_s: float | None = None
        """seconds of the newest step; None until the newest process of the run has logged one"""
        self.written: float | None = None
        """when the newest record was written, in seconds since 1970"""
        self.messages: deque[Message] = deque(maxlen=KEPT_MESSAGES)
        self.warnings: deque[Message] = deque(maxlen=KEPT_MESSAGES)
        self.message_count = self.warning_count = 0
        self.is_missing = False

    def read(self, at_most: int = BLOCK_BYTES) -> bool:
        """Reads up to `at_most` bytes of what was appended; returns whether there is more."""
        path = self._path.with_name(RECORDS_NAME)
        is_text = not path.exists() and self._path.suffix != ".jsonl"
        try:
            with regular_file.open_to_read(self._path if is_text else path) as file:
                status = os.fstat(file.fileno())
                file_id = (status.st_dev, status.st_ino)
                if file_id != self._file_id or status.st_size < self._position:
                    self._begin_again(file_id)
                file.seek(self._position)
                block = file.read(at_most)
        except OSError:
            self.is_missing = True
            return False
        self.is_missing = False
        complete, newline, _ = block.rpartition(b"\n")
        if not newline and len(block) < at_most:  # the line is being written
            return False
        self._position += len(complete) + len(newline) if newline else len(block)
        for line in complete.split(b"\n"):
            self._add_line(line, is_text)
        return self._position < status.st_size

    def _begin_again(self, file_id: tuple[int, int]) -> None:
        """Reads another file, or one that was cut, from its beginning. What is known of the curves
        stays: after a rotation, the new file has only what came later."""
        self._file_id, self._position = file_id, 0
        self.messages.clear()
        self.warnings.clear()
        self.message_count = self.warning_count = 0

    def _add_line(self, line: bytes, is_text: bool) -> None:
        try:
            if is_text:
                text = line.decode(errors="replace")
                if not text.strip() or text.startswith(SAMPLE_INDENT):
                    return
                record = log_reader.object_of_text(text)
                if record["kind"] != "run":  # such lines do not name their run
                    record["run"] = self._name_in_text
            else:
                record = json_fields.require_object(json_fields.parse(line))
            for name in USED_IF_THERE.keys() & record.keys():
                json_fields.require_type(USED_IF_THERE[name], record[name])
            self._add(record)
        except (KeyError, TypeError, ValueError, OverflowError):
            return  # a torn line, or one that is no record

    def _add(self, record: dict[str, Any]) -> None:
        kind, name = record["kind"], record["run"]
        if kind == "run":
            self._name_in_text = name
            if self._given_name is None and name != self.name:
                self._forget_after(-1)
                self.name = name
        if name != self.name:
            return
        self.written = record.get("time", self.written)
        match kind:
            case "run":
                self._forget_after(int(record["step"]))
                self.step_s = None
            case "step":
                self._add_step(record)
            case "validation":
                self._add_validation(record)
            case "hellaswag":
                self.hellaswag[int(record["step"])] = log_reader.number(record["acc_norm"])
            case "event":
                self._add_message(
                    Message(record.get("time"), str(record["level"]), str(record["message"]))
                )

    def _add_validation(self, record: dict[str, Any]) -> None:
        step, of_corpora = int(record["step"]), log_reader.losses_of_corpora(record)
        self.val_losses[step] = log_reader.number(record["loss"])
        for name, loss in of_corpora.items():
            self.corpus_losses.setdefault(name, {})[step] = loss
        if (bits_per_byte := record.get("bits_per_byte")) is not None:
            self.bits_per_byte[step] = log_reader.number(bits_per_byte)

    def _add_step(self, record: dict[str, Any]) -> None:
        step = int(record["step"])
        numbers = {name: log_reader.number(record[name]) for name in STEP_NUMBERS}
        if self.steps and step <= self.steps[-1]:  # read before the file was cut
            return
        self.step_s = numbers["elapsed_s"]
        self.steps.append(step)
        self.losses.append(numbers["loss"])
        if not record.get("applied", True):
            self.skipped.append(step)
        self.last = record | numbers

    def _add_message(self, message: Message) -> None:
        self.messages.append(message)
        self.message_count += 1
        if message.is_warning:
            self.warnings.append(message)
            self.warning_count += 1

    def _forget_after(self, step: int) -> None:
        """Removes what belongs to later steps: a resume or a divergence has undone them."""
        kept = bisect_right(self.steps, step)
        del self.steps[kept:], self.losses[kept:]
        self.skipped = [item for item in self.skipped if item <= step]
        curves = (self.val_losses, self.bits_per_byte, self.hellaswag)
        for values in (*curves, *self.corpus_losses.values()):
            for later in [item for item in values if item > step]:
                del values[later]
        if self.last and int(self.last["step"]) > step:
            self.last = {}
