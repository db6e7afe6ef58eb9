"""The experiments in a folder, for people and scripts: which jobs ran, are running and failed."""

import logging
import shlex
import socket
import time
from collections.abc import Sequence
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
from gpt2.experiments.progress import rendering, state
from gpt2.experiments.progress.state import ExperimentState
from gpt2.experiments.results import ExperimentDescription, JobResult
from gpt2.inspection import run_status
from gpt2.train import status

logger = logging.getLogger(__name__)

STYLES = {"running": "green", "failed": "red", "dead": "red", "stopped": "yellow"}
FIRST_RESULTS = ("val_loss", "best_val_loss", "loss", "train_loss", "hellaswag", "tokens_per_s")
"""results whose columns come first"""
MAX_REASONS, MAX_KNOWN = 10, 10
DEFAULT_FOLDER = Path("checkpoints")


@dataclass(frozen=True)
class StoredExperiment:
    """An experiment, read from its folder."""

    folder: Path
    description: ExperimentDescription
    current: ExperimentState | None
    """the content of `state.json`; None if it cannot be read"""
    results: Sequence[JobResult]
    """the last result of each job"""

    @property
    def failures(self) -> list[JobResult]:
        return [result for result in self.results if result.state == "failed"]

    @property
    def done(self) -> int:
        """Jobs that need not run again."""
        return len(self.results) - len(self.failures)

    @property
    def state(self) -> str:
        """running, stopping, finished or stopped; dead if its process was killed."""
        return self.state_if(folder_lock.is_held(self.folder))

    def state_if(self, is_held: bool) -> str:
        """`state`, given whether a process holds the folder."""
        now = self.current
        if is_held:
            return "stopping" if now and now.state == "stopping" else "running"
        if now is None:
            return "dead"
        # A lock of another machine may not be visible here; a recent state says that it is alive.
        is_recent = time.time() - now.written < status.SILENCE_S
        is_elsewhere = now.host != socket.gethostname() and is_recent
        return now.state if now.is_over or is_elsewhere else "dead"

    @property
    def updated(self) -> float:
        """When its state was last written, in seconds since 1970."""
        about = self.folder / results.EXPERIMENT_FILE
        return self.current.written if self.current else about.stat().st_mtime


def read(folder: Path) -> StoredExperiment:
    """The experiment in `folder`; raises CheckpointError if there is none, or its files cannot be
    read."""
    description = results.read_description(folder)
    if description is None:
        raise CheckpointError(f"no experiment or training in {folder}{_known(folder)}")
    last = {result.job: result for result in results.read_results(folder)}
    return StoredExperiment(folder, description, state.read(folder), [*last.values()])


def _known(folder: Path) -> str:
    """The end of an error message: the experiments and trainings below `folder`, beside it, or in
    the folder that `gpt2 experiments list` shows."""
    names = (results.EXPERIMENT_FILE, status.NAME)
    below_it, below_default = (
        {path for name in names for path in run_status.run_folders(root, name)}
        for root in (folder, DEFAULT_FOLDER)
    )
    beside = {path.parent for name in names for path in folder.parent.glob(f"*/{name}")}
    known = sorted(map(str, below_it or beside or below_default))
    if not known:
        return "; `gpt2 experiments list DIR` shows those in DIR"
    more = f" and {len(known) - MAX_KNOWN} more" if len(known) > MAX_KNOWN else ""
    return f"; there are {', '.join(known[:MAX_KNOWN])}{more}"


def below(root: Path) -> list[StoredExperiment]:
    """The experiments in `root` and its subfolders."""
    found = []
    for folder in run_status.run_folders(root, results.EXPERIMENT_FILE):
        try:
            found.append(read(folder))
        except CheckpointError as error:  # one damaged folder does not hide the others
            logger.warning("%s", error)
    return found


def print_list(root: Path, out: Console) -> None:
    """Prints the experiments in `root` and its subfolders, and the trainings that are not part of
    one, the newest last."""
    rows: list[tuple[float, list[str | Text]]] = []
    for item in below(root):
        done = f"{item.done:,} of {item.description.total:,}"
        failed = Text(f"{len(item.failures):,}", "red" if item.failures else "")
        kind = item.description.kind
        rows.append((item.updated, [str(item.folder), _styled(item.state), done, failed, kind]))
    experiments = set(run_status.run_folders(root, results.EXPERIMENT_FILE))
    for folder in run_status.run_folders(root, status.NAME):
        training = status.read(folder)
        if training is not None and not experiments & {folder, *folder.parents}:
            run = run_status.Run(folder, training)
            steps = f"step {training.step:,} of {training.plan.total_steps:,}"
            rows.append((training.time, [str(folder), _styled(run.state), steps, "", "training"]))
    if not rows:
        out.print(f"No experiments in {root}")
        return
    cells = [
        [*row, duration(time.time() - at), f"{datetime.fromtimestamp(at):%F %R}"]
        for at, row in sorted(rows, key=lambda item: item[0])
    ]
    columns = ("folder", "state", "done", "failed", "kind", "ago", "when")
    out.print(fitted(f"Experiments in {root}", columns, cells, out.width, "folder", least=30))


def _styled(name: str) -> Text:
    return Text(name, style=STYLES.get(name, ""))


def print_experiment(item: StoredExperiment, out: Console, last: int | None) -> None:
    """Prints the state of an experiment, its slots, the newest `last` jobs and why jobs failed."""
    out.print(f"{item.folder}: {one_line(item.description.kind)}, {item.state}", soft_wrap=True)
    done = f"{item.done:,} of {item.description.total:,} done"
    out.print(f"  {done}, {len(item.failures):,} failed")
    if now := item.current:
        since, age = f"{datetime.fromtimestamp(now.began):%F %R}", time.time() - now.written
        out.print(f"  process {now.pid} on {now.host}, since {since}, updated {duration(age)} ago")
        for slot in now.slots:
            if slot.log:
                out.print(f"  log of {slot.slot} {slot.log}", soft_wrap=True)
        if not now.is_over:  # of a dead one, what it last did
            out.print()
            at = now.written if item.state == "dead" else time.time()
            out.print(rendering.view(now, at, out.width))
    if item.results:
        out.print()
        out.print(jobs_table(item.results, out.width, last))
    if item.failures:
        print_failures(item, out, MAX_REASONS, with_tracebacks=False)
        command = f"gpt2 experiments show {shlex.quote(str(item.folder))} --failed"
        out.print(f"{command} prints the tracebacks", soft_wrap=True)


def jobs_table(ended: Sequence[JobResult], width: int, last: int | None = None) -> Table:
    """The newest `last` jobs with the numbers that they returned."""
    shown = ended[-last:] if last else ended
    found = {name for result in shown for name in result.numbers}
    names = [*(name for name in FIRST_RESULTS if name in found), *sorted(found - {*FIRST_RESULTS})]
    rows: list[list[str | Text]] = []
    for result in shown:
        took, numbers = duration(result.elapsed_s), result.numbers
        cells = [four_digits(numbers[name]) if name in numbers else "-" for name in names]
        state = _styled(result.state)
        rows.append([result.job, state, took, f"{result.attempt}", *cells, result.slot])
    title = "Jobs"
    if len(shown) < len(ended):
        title = f"Jobs: the last {len(shown):,} of {len(ended):,}; --last None shows all"
    columns = ["job", "state", "took", "attempt", *names, "slot"]
    return fitted(title, columns, rows, width, elastic="job", least=24)


def print_failures(
    item: StoredExperiment, out: Console, last: int | None, *, with_tracebacks: bool = True
) -> None:
    """Prints why the jobs failed whose failures are the newest `last` ones."""
    if not item.failures:
        out.print(f"No job of {item.folder} has failed")
    for result in item.failures[-last:] if last else item.failures:
        when = f"{datetime.fromtimestamp(result.time):%F %T}"
        attempt = rendering.attempt_suffix(result.attempt)
        words = f"{result.job}, {when} on {result.slot}{attempt}: {one_line(result.reason)}"
        out.print(Text(words, "red"), soft_wrap=True)
        for line in result.traceback.splitlines() if with_tracebacks else ():
            out.print(f"  {line}", soft_wrap=True)


def summary_json(item: StoredExperiment) -> dict[str, Any]:
    """State and counts, as `gpt2 experiments list --json` prints them."""
    return {
        "folder": str(item.folder),
        "state": item.state,
        "kind": item.description.kind,
        "total": item.description.total,
        "done": item.done,
        "failed": len(item.failures),
        "time": item.updated,
    }


def full_json(item: StoredExperiment) -> dict[str, Any]:
    """The summary with state and jobs, as `gpt2 experiments show --json` prints it."""
    return {
        **summary_json(item),
        "fixed": item.description.fixed,
        "now": state.as_json(item.current) if item.current else None,
        "jobs": [asdict(result) for result in item.results],
    }
