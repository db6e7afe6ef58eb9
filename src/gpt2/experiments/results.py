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

EXPERIMENT_FILE = "experiment.json"
RESULT_LINES_FILE = "results.jsonl"
RESULTS_FILE = "results.json"
FLUSH_EVERY_S = 1.0
"""results that a power cut may cost, and that are made again then"""


@dataclass(frozen=True)
class ExperimentDescription:
    """What an experiment is: jobs of another one must not count as its own."""

    kind: str
    """seeds, models, …"""
    fixed: Mapping[str, Any]
    """what all of its jobs have in common, by name"""
    total: int
    """jobs that are planned; may grow"""


@dataclass(frozen=True)
class JobResult:
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
    def from_event(cls, event: Event, values: Mapping[str, Any]) -> Self:
        """The result of a job that has finished, failed or was pruned."""
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


class ResultsStore:
    """The results of an experiment, as its owner keeps them.

    A disk that is full ends nothing: what could not be written is written later.
    """

    def __init__(self, folder: Path, description: ExperimentDescription) -> None:
        self.folder, self.description = folder, description
        self.results = {result.job: result for result in read_results(folder)}
        """the last one of each job"""
        path = folder / RESULT_LINES_FILE
        self._lines = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._cut_torn_line()
        self._pending: list[bytes] = []
        self._flushed = time.monotonic()

    def is_done(self, job: str) -> bool:
        """Whether the job need not run again; one that failed must."""
        return job in self.results and self.results[job].state != "failed"

    def add(self, result: JobResult) -> None:
        """Keeps what became of a job: from here on it is not forgotten."""
        self.results[result.job] = result
        self._pending.append(json.dumps(asdict(result)).encode() + b"\n")
        self._write_pending()

    def in_state(self, *states: str) -> list[JobResult]:
        """The results in these states, in the order in which the jobs ended."""
        return [result for result in self.results.values() if result.state in states]

    def save(self, **more: Any) -> None:
        """Replaces `results.json`: all results, and what `more` says of them."""
        self._write_pending()
        results = [asdict(result) for result in self.results.values()]
        for result in results:
            del result["traceback"]  # results.jsonl has it, and the worker's log
        content = {**asdict(self.description), **more, "results": results}
        with contextlib.suppress(OSError):  # the next one
            text = json.dumps(content, indent=1) + "\n"
            atomic_files.write_text(self.folder / RESULTS_FILE, text)

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
        content = (self.folder / RESULT_LINES_FILE).read_bytes()
        os.ftruncate(self._lines, content.rfind(b"\n") + 1)


@contextlib.contextmanager
def opened(
    folder: Path,
    description: ExperimentDescription,
    differences: Callable[[ExperimentDescription], list[str]] | None = None,
) -> Iterator[ResultsStore]:
    """The store of `folder`, which is this process's alone while the block runs.

    Raises CheckpointError if another process owns the folder, and ConfigError if it holds another
    experiment; `differences` says what is other in the one that it holds.
    """
    require_writable(folder)
    with folder_lock.held(folder, "experiment", "--checkpoint_dir"):
        before = read_description(folder)
        if before is not None:
            _require_same(folder, before, description, differences)
            description = replace(description, total=max(before.total, description.total))
        atomic_files.sweep(folder, lambda name: name in (EXPERIMENT_FILE, RESULTS_FILE))
        text = json.dumps(asdict(description), indent=1) + "\n"
        atomic_files.write_text(folder / EXPERIMENT_FILE, text)
        store = ResultsStore(folder, description)
        try:
            yield store
        finally:
            store.close()


def read_description(folder: Path) -> ExperimentDescription | None:
    """What the experiment in `folder` is, or None if there is none."""
    try:
        return ExperimentDescription(**json.loads((folder / EXPERIMENT_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def read_results(folder: Path) -> list[JobResult]:
    """What became of the jobs in `folder`, one line after another; a torn line is none."""
    try:
        *lines, _torn = (folder / RESULT_LINES_FILE).read_bytes().split(b"\n")
    except OSError:
        return []
    results = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):  # a damaged line: its job runs again
            results.append(JobResult(**json.loads(line)))
    return results


def _require_same(
    folder: Path,
    before: ExperimentDescription,
    description: ExperimentDescription,
    differences: Callable[[ExperimentDescription], list[str]] | None,
) -> None:
    if before.kind != description.kind:
        rows = [f"kind: {before.kind} before, {description.kind} now"]
    elif differences is not None:
        rows = differences(before)
    else:
        rows = [
            f"{name}: {before.fixed.get(name)} before, {description.fixed.get(name)} now"
            for name in sorted({*before.fixed, *description.fixed})
            if before.fixed.get(name) != description.fixed.get(name)
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
