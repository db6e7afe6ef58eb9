"""The experiments in a folder, for people and scripts: which jobs ran, are running and failed."""

import logging
import shlex
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt2.base import folder_lock
from gpt2.base.errors import CheckpointError
from gpt2.base.text import fitted, four_digits, one_line
from gpt2.config.flops import duration
from gpt2.experiments import results
from gpt2.experiments.grid import point_name
from gpt2.experiments.progress import rendering, state
from gpt2.experiments.progress.state import ExperimentState, SlotState, is_finite_number
from gpt2.experiments.results import ExperimentDescription, JobResult
from gpt2.inspection import run_status
from gpt2.inspection.run_status import Run
from gpt2.train import status

logger = logging.getLogger(__name__)

STYLES = {"running": "green", "failed": "red", "dead": "red", "stopped": "yellow"}
FIRST_RESULTS = ("val_loss", "best_val_loss", "loss", "train_loss", "hellaswag", "tokens_per_s")
"""results whose columns come first"""
MAX_REASONS = 10
MAX_SUGGESTIONS = 8


@dataclass(frozen=True)
class StoredExperiment:
    """An experiment, read from its folder."""

    folder: Path
    description: ExperimentDescription
    current: ExperimentState | None
    """the content of `state.json`; None if it cannot be read"""
    results: Mapping[str, JobResult]
    """the last result of each job, by the job's name"""
    state: str
    """running, stopping, finished or stopped; dead if its process was killed"""

    @property
    def done(self) -> int:
        """Jobs that need not run again."""
        return len(self.results) - self.failed

    @property
    def failed(self) -> int:
        return len(self.failures)

    @property
    def failures(self) -> list[JobResult]:
        return [result for result in self.results.values() if result.state == "failed"]

    @property
    def busy_slots(self) -> list[SlotState]:
        """Slots with a job that is running, or was when the experiment's process was killed."""
        return [slot for slot in self.current.slots if slot.job] if self.current else []

    @property
    def updated(self) -> float:
        """When a file of the experiment was last written, in seconds since 1970."""
        files = [
            self.folder / name
            for name in (state.FILE, results.RESULT_LINES_FILE, results.EXPERIMENT_FILE)
        ]
        return max(file.stat().st_mtime for file in files if file.exists())


def find(folder: Path) -> StoredExperiment | None:
    """The experiment in `folder`, or None if there is none; raises CheckpointError if its files
    cannot be read."""
    description = results.read_description(folder)
    if description is None:
        return None
    by_job = {result.job: result for result in results.read_results(folder)}
    current = state.read(folder)
    return StoredExperiment(folder, description, current, by_job, _state_name(folder, current))


def _state_name(folder: Path, current: ExperimentState | None) -> str:
    if folder_lock.is_held(folder):
        return "stopping" if current and current.state == "stopping" else "running"
    if current is None:
        return "dead"
    # A lock of another machine may not be visible here; a recent state says that it is alive.
    age_s = time.time() - current.written
    elsewhere = current.host != socket.gethostname() and age_s < status.SILENCE_S
    return current.state if current.is_over or elsewhere else "dead"


def require(folder: Path) -> StoredExperiment:
    """The experiment in `folder`; raises CheckpointError, which lists those nearby."""
    if found := find(folder):
        return found
    root = next((at for at in (folder, folder.parent) if at.is_dir() and at != Path()), None)
    root = root or Path("checkpoints")
    names = sorted(
        str(path) for path in (*_folders(root), *(run.folder for run in trainings(root)))
    )
    more = f" and {len(names) - MAX_SUGGESTIONS} more" if len(names) > MAX_SUGGESTIONS else ""
    there = f"there are {', '.join(names[:MAX_SUGGESTIONS])}{more}" if names else f"nor in {root}"
    raise CheckpointError(f"no experiment or training in {folder}; {there}")


def below(root: Path) -> list[StoredExperiment]:
    """The experiments in `root` and its subfolders."""
    found = []
    for folder in _folders(root):
        try:
            item = find(folder)
        except CheckpointError as error:  # one damaged folder does not hide the others
            logger.warning("%s", error)
            continue
        if item is not None:
            found.append(item)
    return found


def trainings(root: Path) -> list[Run]:
    """The trainings in `root` and its subfolders that are not part of an experiment."""
    experiments = set(_folders(root))
    found = [
        (folder, status.read(folder))
        for folder in run_status.run_folders(root, status.NAME)
        if not experiments & {folder, *folder.parents}
    ]
    return [Run(folder, known) for folder, known in found if known is not None]


def _folders(root: Path) -> list[Path]:
    return run_status.run_folders(root, results.EXPERIMENT_FILE)


def print_list(root: Path, out: Console) -> None:
    """Prints the experiments and trainings in `root` and its subfolders, the newest last."""
    rows = [(item.updated, _experiment_row(item)) for item in below(root)]
    rows += [(run.status.time, _training_row(run)) for run in trainings(root)]
    if not rows:
        out.print(f"No experiments in {root}")
        return
    columns = ("folder", "state", "done", "failed", "ago", "kind", "when")
    cells = [
        [*row[:4], duration(time.time() - at), row[4], f"{datetime.fromtimestamp(at):%F %R}"]
        for at, row in sorted(rows, key=lambda item: item[0])
    ]
    out.print(fitted(f"Experiments in {root}", columns, cells, out.width, "folder", least=30))


def _experiment_row(item: StoredExperiment) -> list[str | Text]:
    failed = Text(f"{item.failed:,}", style="red" if item.failed else "")
    done = f"{item.done:,} of {item.description.total:,}"
    return [str(item.folder), _styled(item.state), done, failed, item.description.kind]


def _training_row(run: Run) -> list[str | Text]:
    steps = f"step {run.status.step:,} of {run.status.plan.total_steps:,}"
    return [str(run.folder), _styled(run.state), steps, "", "training"]


def _styled(name: str) -> Text:
    return Text(name, style=STYLES.get(name, ""))


def print_experiment(item: StoredExperiment, out: Console, last: int | None) -> None:
    """Prints the state of an experiment, its slots, the newest `last` jobs and why jobs failed."""
    out.print(f"{item.folder}: {one_line(item.description.kind)}, {item.state}", soft_wrap=True)
    now = item.current
    running = item.state in ("running", "stopping")
    counts = [f"{item.done:,} of {item.description.total:,} done", f"{item.failed:,} failed"]
    if running and item.busy_slots:
        counts.append(f"{len(item.busy_slots)} running")
    out.print(f"  {', '.join(counts)}")
    if now:
        since = f"{datetime.fromtimestamp(now.began):%F %R}"
        age = duration(time.time() - now.written)
        out.print(f"  process {now.pid} on {now.host}, since {since}, updated {age} ago")
        if running and (left := now.left_s(time.time())) is not None:
            out.print(f"  {duration(left)} left")
    for slot in now.slots if now else ():
        if slot.log:
            out.print(f"  log of {slot.slot} {slot.log}", soft_wrap=True)
    if now and running:
        columns = rendering.columns_of(now, time.time())
        out.print(rendering.slots_table(now, time.time(), out.width, columns))
    if item.results or item.busy_slots:
        out.print(_jobs_table(item, out.width, last))
    _print_failure_reasons(item, out)


def _jobs_table(item: StoredExperiment, width: int, last: int | None) -> Table:
    """The newest `last` jobs that have ended, in this order, and those that are running."""
    ended = [*item.results.values()]
    shown = ended[-last:] if last else ended
    values, metrics = _value_names(shown), _metric_names(shown)
    rows = [
        _job_cells(result.job, result.state, result.elapsed_s, result.attempt)
        + [_cell(result.values.get(name)) for name in values]
        + [_cell(_metrics(result.result).get(name)) for name in metrics]
        + [result.slot]
        for result in shown
    ]
    for slot in item.busy_slots:
        assert item.current is not None and slot.job is not None
        is_dead = item.state == "dead"
        until = item.current.written if is_dead else time.time()
        name = "dead" if is_dead else "running"
        rows.append(
            _job_cells(slot.job, name, until - slot.began, slot.attempt)
            + [""] * len(values)
            + [_cell(slot.metric(name)) for name in metrics]
            + [slot.slot]
        )
    title = "Jobs"
    if len(shown) < len(ended):
        title = f"Jobs: the last {len(shown):,} of {len(ended):,}; --last None shows all"
    columns = ["job", "state", "took", "attempt", *values, *metrics, "slot"]
    return fitted(title, columns, rows, width, elastic="job", least=24)


def _job_cells(job: str, state_name: str, elapsed_s: float, attempt: int) -> list[str | Text]:
    took = duration(elapsed_s) if elapsed_s >= 10 else f"{elapsed_s:.2f}s"
    return [job, _styled(state_name), took, f"{attempt}"]


def _value_names(ended: Sequence[JobResult]) -> list[str]:
    """The names of the values that the jobs' names do not contain."""
    names = dict.fromkeys(
        name
        for result in ended
        for name, value in result.values.items()
        if point_name({name: value}) not in result.job
    )
    return [*names]


def _metric_names(ended: Sequence[JobResult]) -> list[str]:
    """The names of the numbers in the results: well-known ones first, then those that vary."""
    found: dict[str, set[float]] = {}
    for result in ended:
        for name, value in _metrics(result.result).items():
            found.setdefault(name, set()).add(value)

    def rank(name: str) -> tuple[int, bool]:
        known = FIRST_RESULTS.index(name) if name in FIRST_RESULTS else len(FIRST_RESULTS)
        return known, len(found[name]) == 1

    return sorted(found, key=rank)


def _metrics(result: Any) -> dict[str, float]:
    """The numbers of a result by name; a result that is a number is called `result`."""
    named = result if isinstance(result, dict) else {"result": result}
    return {name: value for name, value in named.items() if is_finite_number(value)}


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return four_digits(value) if is_finite_number(value) else f"{value}"


def _print_failure_reasons(item: StoredExperiment, out: Console) -> None:
    """Prints why jobs failed, a line each."""
    for result in item.failures[-MAX_REASONS:]:
        words = f"{result.job}: {one_line(result.reason)}"
        out.print(Text(words, style="red"), soft_wrap=True)
    if item.failures:
        hidden = max(0, item.failed - MAX_REASONS)
        more = f"and {hidden:,} more; " if hidden else ""
        out.print(
            f"{more}gpt2 experiments show {shlex.quote(str(item.folder))} --failed prints the "
            "tracebacks",
            soft_wrap=True,
        )


def print_failures(item: StoredExperiment, out: Console, last: int | None) -> None:
    """Prints the newest `last` failures, with the tracebacks of jobs that raised an exception."""
    if not item.failures:
        out.print(f"No job of {item.folder} has failed")
    for result in item.failures[-last:] if last else item.failures:
        when = f"{datetime.fromtimestamp(result.time):%F %T}"
        attempt = rendering.attempt_suffix(result.attempt)
        words = f"{result.job}, {when} on {result.slot}{attempt}: {one_line(result.reason)}"
        out.print(Text(words, style="red"), soft_wrap=True)
        for line in result.traceback.splitlines():
            out.print(f"  {line}", soft_wrap=True)


def summary_json(item: StoredExperiment) -> dict[str, Any]:
    """State and counts, as `gpt2 experiments list --json` prints them."""
    return {
        "folder": str(item.folder),
        "state": item.state,
        "kind": item.description.kind,
        "total": item.description.total,
        "done": item.done,
        "failed": item.failed,
        "time": item.updated,
    }


def full_json(item: StoredExperiment) -> dict[str, Any]:
    """The summary with state and jobs, as `gpt2 experiments show --json` prints it."""
    return {
        **summary_json(item),
        "fixed": item.description.fixed,
        "now": state.as_json(item.current) if item.current else None,
        "jobs": [asdict(result) for result in item.results.values()],
    }
