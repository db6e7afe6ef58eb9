"""The folder of an experiment: what it is, who owns it, and what became of its jobs.

`results.jsonl` gets a line as soon as a job has ended, and is the truth: a job with a line that
says finished never runs again. `results.json` holds the same for people and other tools, whole or
not at all. `experiment.json` says what the experiment is.
"""

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from gpt2.base import atomic_files, folder_lock
from gpt2.base.errors import ConfigError
from gpt2.checkpoint.store import require_writable
from gpt2.experiments.pool.job import Event

ABOUT, LINES, RESULTS = "experiment.json", "results.jsonl", "results.json"
FLUSH_EVERY_S = 1.0
"""results that a power cut may cost, and that are made again then"""


@dataclass(frozen=True)
class About:
    """What an experiment is: jobs of another one must not count as its own."""

    kind: str
    """seeds, models, …"""
    fixed: Mapping[str, Any]
    """what all of its jobs have in common, by name"""
    total: int
    """jobs that are planned; may grow"""


@dataclass(frozen=True)
class Record:
    """What became of a job."""

    job: str
    state: Literal["finished", "pruned", "failed"]
    values: Mapping[str, Any]
    """what tells it from the others: its point of the grid, its seed"""
    result: Any = None
    reason: str = ""
    """why it failed"""
    traceback: str = ""
    attempt: int = 1
    elapsed_s: float = 0.0
    slot: str = ""
    time: float = field(default_factory=time.time)
    """seconds since 1970"""

    @classmethod
    def of(cls, event: Event, values: Mapping[str, Any]) -> Self:
        """The record of a job that has finished, failed or was pruned."""
        assert event.job is not None and event.kind in ("finished", "pruned", "failed")
        return cls(
            job=event.job.name,
            state=event.kind,
            values=values,
            result=event.result,
            reason=event.reason,
            traceback=event.traceback,
            attempt=event.attempt,
            elapsed_s=round(event.elapsed_s, 4),
            slot=event.slot.name,
        )


class Ledger:
    """The records of an experiment, as its owner keeps them.

    A disk that is full ends nothing: what could not be written is written later.
    """

    def __init__(self, folder: Path, about: About) -> None:
        self.folder, self.about = folder, about
        self.records = {record.job: record for record in read_records(folder)}
        """the last one of each job"""
        self._lines = os.open(folder / LINES, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._cut_torn_line()
        self._pending: list[bytes] = []
        self._flushed = time.monotonic()

    def is_done(self, job: str) -> bool:
        """Whether the job need not run again; one that failed must."""
        return job in self.records and self.records[job].state != "failed"

    def add(self, record: Record) -> None:
        """Keeps what became of a job: from here on it is not forgotten."""
        self.records[record.job] = record
        self._pending.append(json.dumps(asdict(record)).encode() + b"\n")
        self._write_pending()

    def of(self, *states: str) -> list[Record]:
        """The records in these states, in the order in which the jobs ended."""
        return [record for record in self.records.values() if record.state in states]

    def save(self, **more: Any) -> None:
        """Replaces `results.json`: all records, and what `more` says of them."""
        self._write_pending()
        records = [asdict(record) for record in self.records.values()]
        for record in records:
            del record["traceback"]  # results.jsonl has it, and the worker's log
        content = {**asdict(self.about), **more, "results": records}
        with contextlib.suppress(OSError):  # the next one
            atomic_files.write_text(self.folder / RESULTS, json.dumps(content, indent=1) + "\n")

    def close(self) -> None:
        """Raises OSError if results could not be written."""
        try:
            self._write_pending(last=True)
        finally:
            os.close(self._lines)

    def _write_pending(self, last: bool = False) -> None:
        try:
            while self._pending:
                self._append(self._pending[0])
                del self._pending[0]
            if last or time.monotonic() > self._flushed + FLUSH_EVERY_S:
                os.fsync(self._lines)
                self._flushed = time.monotonic()
        except OSError:
            if last:
                raise

    def _append(self, line: bytes) -> None:
        """Writes all of the line, or raises OSError and leaves nothing of it."""
        end = os.lseek(self._lines, 0, os.SEEK_END)
        try:
            if os.write(self._lines, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._lines, end)
            raise

    def _cut_torn_line(self) -> None:
        """A power cut may leave the beginning of a line, to which nothing may be added."""
        content = (self.folder / LINES).read_bytes()
        os.ftruncate(self._lines, content.rfind(b"\n") + 1)


@contextlib.contextmanager
def opened(
    folder: Path, about: About, differences: Callable[[About], list[str]] | None = None
) -> Iterator[Ledger]:
    """The ledger of `folder`, which is this process's alone while the block runs.

    Raises CheckpointError if another process owns the folder, and ConfigError if it holds another
    experiment; `differences` says what is other in the one that it holds.
    """
    require_writable(folder)
    with folder_lock.held(folder, "experiment", "--checkpoint_dir"):
        before = read_about(folder)
        if before is not None:
            _require_same(folder, before, about, differences)
            about = replace(about, total=max(before.total, about.total))
        atomic_files.sweep(folder, lambda name: name in (ABOUT, RESULTS))
        atomic_files.write_text(folder / ABOUT, json.dumps(asdict(about), indent=1) + "\n")
        ledger = Ledger(folder, about)
        try:
            yield ledger
        finally:
            ledger.close()


def read_about(folder: Path) -> About | None:
    """What the experiment in `folder` is, or None if there is none."""
    try:
        return About(**json.loads((folder / ABOUT).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def read_records(folder: Path) -> list[Record]:
    """What became of the jobs in `folder`, one line after another; a torn line is none."""
    try:
        *lines, _torn = (folder / LINES).read_bytes().split(b"\n")
    except OSError:
        return []
    records = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):  # a damaged line: its job runs again
            records.append(Record(**json.loads(line)))
    return records


def _require_same(
    folder: Path,
    before: About,
    about: About,
    differences: Callable[[About], list[str]] | None,
) -> None:
    if before.kind != about.kind:
        rows = [f"kind: {before.kind} before, {about.kind} now"]
    elif differences is not None:
        rows = differences(before)
    else:
        rows = [
            f"{name}: {before.fixed.get(name)} before, {about.fixed.get(name)} now"
            for name in sorted({*before.fixed, *about.fixed})
            if before.fixed.get(name) != about.fixed.get(name)
        ]
    if rows:
        raise another_experiment(folder, rows)


def another_experiment(folder: Path, rows: Sequence[str]) -> ConfigError:
    """`folder` holds other results than those that are asked for: a row says each difference."""
    listed = "\n".join(f"  {row}" for row in rows)
    return ConfigError(
        f"{folder} holds another experiment:\n{listed}\ngive the same values, or keep this one "
        "elsewhere with --checkpoint_dir"
    )
