"""The folder of an experiment: its description, its owner, and the results of its jobs.

`results.jsonl` gets a line as soon as a job has ended, and decides: a job with a finished line
never runs again. Lines are only appended, so that nothing in them is lost. `results.json` is a copy
for people and other tools, replaced as a whole. `experiment.json` describes the experiment.

The owner, which is the process that runs the experiment, writes through a `ResultsStore`. Commands
that show an experiment use the `read_` functions.
"""

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeGuard

from gpt2.base import addresses, atomic_files, folder_lock, json_fields, regular_file
from gpt2.base.errors import CheckpointError, ConfigError
from gpt2.base.json_fields import Timestamp, from_json
from gpt2.base.text import counted, one_line, shortened
from gpt2.base.validation import is_finite
from gpt2.config import options
from gpt2.experiments.pool.job import Event
from gpt2.experiments.pool.messages import is_number, json_ready
from gpt2.train import status

logger = logging.getLogger(__name__)

EXPERIMENT_FILE = "experiment.json"
RESULT_LINES_FILE = "results.jsonl"
RESULTS_FILE = "results.json"
FLUSH_EVERY_S = 1.0
"""results of this time may be lost in a power cut; their jobs run again"""
LONGEST_VALUE = 200
"""characters of a value in a message"""


@dataclass(frozen=True)
class ExperimentDescription:
    """What an experiment is. Results of another one must not count as its own."""

    kind: str
    """seeds, models, …"""
    fixed: Mapping[str, Any]
    """values that all of its jobs share, by name"""
    total: int
    """number of planned jobs; may grow"""


@dataclass(frozen=True)
class JobResult:
    """How a job ended, and what it returned."""

    job: str
    """its name"""
    state: Literal["finished", "pruned", "failed"]
    values: Mapping[str, Any]
    """values that distinguish it from other jobs: its point of the grid, its seed"""
    result: Any = None
    reason: str = ""
    """why it failed"""
    traceback: str = ""
    attempt: int = 1
    elapsed_s: float = 0.0
    slot: str = ""
    time: Timestamp = field(default_factory=time.time)
    """when it ended"""

    @classmethod
    def from_event(cls, event: Event, values: Mapping[str, Any]) -> Self:
        """From an event of kind finished, failed or pruned."""
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

    @property
    def numbers(self) -> dict[str, float]:
        """The finite numbers that it returned by name; a single number is called `value`."""
        named = self.result if isinstance(self.result, dict) else {"value": self.result}
        return {name: value for name, value in named.items() if is_finite_number(value)}


def is_finite_number(value: object) -> TypeGuard[float]:
    """Whether the value is one real number in the range of floats, and not a bool."""
    return is_number(value) and is_finite(value)


class ResultsStore:
    """The results of an experiment, for its owner.

    A full disk does not end the experiment: what could not be written is written later.
    """

    def __init__(self, folder: Path, description: ExperimentDescription) -> None:
        self.folder, self.description = folder, description
        self.results = {result.job: result for result in read_results(folder)}
        """the latest one of each job"""
        self._path = folder / RESULT_LINES_FILE
        self._lines = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        # A power cut may have left a part of a line.
        os.ftruncate(self._lines, self._path.read_bytes().rfind(b"\n") + 1)
        self._pending = b""
        self._flushed = time.monotonic()

    def is_done(self, job: str) -> bool:
        """Whether the job need not run again. A failed one must."""
        return job in self.results and self.results[job].state != "failed"

    def add(self, result: JobResult) -> None:
        """Appends a result to `results.jsonl`."""
        self.results[result.job] = plain = replace(result, result=json_ready(result.result))
        self._pending += json.dumps(asdict(plain)).encode() + b"\n"
        with contextlib.suppress(OSError):  # the next one, or `close`, tries again
            self._write_pending()
            if time.monotonic() > self._flushed + FLUSH_EVERY_S:
                os.fsync(self._lines)
                self._flushed = time.monotonic()

    def save(self, **more: Any) -> None:
        """Replaces `results.json`: the description, `more`, and all results."""
        results = [asdict(result) for result in self.results.values()]
        for result in results:
            del result["traceback"]  # results.jsonl has it, and the worker's log
        content = {**asdict(self.description), **json_ready(more), "results": results}
        path = self.folder / RESULTS_FILE
        try:
            atomic_files.write_text(path, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            logger.warning("cannot write %s: %s; %s has the results", path, error, self._path)

    def close(self) -> None:
        """Raises CheckpointError if results could not be written."""
        try:
            self._write_pending()
            os.fsync(self._lines)
        except OSError as error:
            lost = counted(len(self._pending.splitlines()), "result")
            raise CheckpointError(
                f"cannot write {lost} to {self._path}: {error}; make room, then give the same "
                "command again, which runs these jobs again"
            ) from error
        finally:
            os.close(self._lines)

    def _write_pending(self) -> None:
        """Writes all pending lines, or raises OSError and leaves no part of them."""
        end = os.fstat(self._lines).st_size
        try:
            if os.write(self._lines, self._pending) < len(self._pending):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._lines, end)
            raise
        self._pending = b""


def value_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each value that is not the same, passwords in addresses apart. An option that is
    missing has its value in `options.LATER`, if it is there."""
    before, now = addresses.public(dict(before)), addresses.public(dict(now))
    names = sorted({*before, *now})
    old, new = (
        {name: of.get(name, options.LATER.get(name)) for name in names} for of in (before, now)
    )
    return [
        f"{name}: {_shown(old[name])} before, {_shown(new[name])} now"
        for name in names
        if old[name] != new[name]
    ]


def _shown(value: Any) -> str:
    return shortened(one_line(str(value)), LONGEST_VALUE)


@contextlib.contextmanager
def opened(
    folder: Path,
    description: ExperimentDescription,
    differences: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]] = value_differences,
) -> Iterator[ResultsStore]:
    """The store of `folder`, which no other process can open within the block.

    Raises CheckpointError if another process owns the folder or its `experiment.json` cannot be
    read, and ConfigError if it holds a training, or another experiment: `differences` compares the
    `fixed` values that it holds with these.
    """
    folder_lock.require_writable(folder)
    with folder_lock.held(folder, "experiment", "--checkpoint_dir"):
        path, content = folder / EXPERIMENT_FILE, {}
        if before := read_description(folder):
            kinds = value_differences({"kind": before.kind}, {"kind": description.kind})
            if rows := kinds or differences(before.fixed, description.fixed):
                raise another_experiment(folder, rows)
            description = replace(description, total=max(before.total, description.total))
            content = json_fields.read(path)  # a later version may have written more
        else:
            _require_no_training(folder)
        atomic_files.remove_temporary(folder, lambda name: name in (EXPERIMENT_FILE, RESULTS_FILE))
        content |= asdict(description)
        atomic_files.write_text(path, json.dumps(content, indent=1) + "\n")
        with contextlib.closing(ResultsStore(folder, description)) as store:
            yield store


def _require_no_training(folder: Path) -> None:
    """Commands that show a folder with both would show the experiment alone."""
    found = [*sorted(folder.glob("step_*.pt"))[-1:], *folder.glob(status.NAME)]
    if found:
        raise ConfigError(
            f"{folder} holds a training ({', '.join(path.name for path in found)}); keep this "
            "experiment elsewhere with --checkpoint_dir OTHER"
        )


def read_description(folder: Path) -> ExperimentDescription | None:
    """The experiment in `folder`, or None if there is none; raises CheckpointError if its file
    cannot be read."""
    path = folder / EXPERIMENT_FILE
    try:
        return from_json(ExperimentDescription, json_fields.read(path), path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:  # TypeError: other JSON
        raise _unreadable(path, error) from error


def read_results(folder: Path) -> list[JobResult]:
    """The results in `folder`, in the order of their lines; a job that failed and ran again has
    several.

    A last line without end is ignored, and so is a damaged one, with a warning. Raises
    CheckpointError if the file exists but cannot be read.
    """
    path = folder / RESULT_LINES_FILE
    try:
        *lines, _torn = regular_file.read_bytes(path).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(path, error) from error
    results = []
    for number, line in enumerate(lines, start=1):
        try:
            # Earlier versions wrote NaN, which is no JSON.
            content = json_fields.parse(line, parse_constant=lambda _: None)
            results.append(from_json(JobResult, content, path))
        except (ValueError, TypeError) as error:  # no JSON; no object, or one without a job
            logger.warning("%s, line %d is damaged, its job runs again: %s", path, number, error)
    return results


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot read {path}: {error}; repair it, or use another folder with --checkpoint_dir"
    )


def another_experiment(
    place: object, rows: Sequence[str], flag: str = "--checkpoint_dir"
) -> ConfigError:
    """The error for a place with results of other values; each row describes a difference, and the
    flag chooses another place."""
    return ConfigError(
        f"{place} holds another experiment ({'; '.join(rows)}); give the same values, or keep this "
        f"one elsewhere with {flag}"
    )
