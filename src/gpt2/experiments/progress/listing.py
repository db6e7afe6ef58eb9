"""Experiments on the disk, as a person or a script asks for them: what ran, runs and has failed."""

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
from gpt2.base.text import figure, fitted, one_line
from gpt2.config.flops import duration
from gpt2.experiments import results as ledger
from gpt2.experiments.grid import point_name
from gpt2.experiments.progress import rendering
from gpt2.experiments.progress import state as board
from gpt2.experiments.progress.state import Picture, is_number
from gpt2.experiments.results import ExperimentDescription, JobResult
from gpt2.inspection import runs
from gpt2.inspection.runs import Run
from gpt2.train import status

STYLES = {"running": "green", "failed": "red", "dead": "red", "stopped": "yellow"}
FIRST_RESULTS = ("val_loss", "best_val_loss", "loss", "train_loss", "hellaswag", "tokens_per_s")
SHOWN_REASONS = 10
NAMED = 8


@dataclass(frozen=True)
class Experiment:
    """An experiment as its folder tells."""

    folder: Path
    about: ExperimentDescription
    picture: Picture | None
    """as its owner last kept it"""
    records: Mapping[str, JobResult]
    """the last one of each job, by its name"""
    state: str
    """running, stopping, finished, stopped; dead if it says running and is not there"""

    @property
    def done(self) -> int:
        """Jobs that need not run again."""
        return len(self.records) - self.failed

    @property
    def failed(self) -> int:
        return len(self.failures)

    @property
    def failures(self) -> list[JobResult]:
        return [record for record in self.records.values() if record.state == "failed"]

    @property
    def places(self) -> list[board.Place]:
        """Slots with a job that runs, or ran when its owner died."""
        return [place for place in self.picture.places if place.job] if self.picture else []

    @property
    def heard(self) -> float:
        """When it last said something."""
        files = [
            self.folder / name
            for name in (board.NAME, ledger.RESULT_LINES_FILE, ledger.EXPERIMENT_FILE)
        ]
        return max(file.stat().st_mtime for file in files if file.exists())


def find(folder: Path) -> Experiment | None:
    """The experiment in `folder`, if there is one."""
    about = ledger.read_description(folder)
    if about is None:
        return None
    records = {record.job: record for record in ledger.read_results(folder)}
    picture = board.read(folder)
    return Experiment(folder, about, picture, records, _state(folder, picture))


def _state(folder: Path, picture: Picture | None) -> str:
    if folder_lock.is_held(folder):
        return "stopping" if picture and picture.state == "stopping" else "running"
    if picture is None:
        return "dead"
    silent_s = time.time() - picture.written
    elsewhere = picture.host != socket.gethostname() and silent_s < status.SILENCE_S
    return picture.state if picture.is_over or elsewhere else "dead"


def require(folder: Path) -> Experiment:
    """The experiment in `folder`; raises CheckpointError, naming what there is to show."""
    if found := find(folder):
        return found
    root = next((at for at in (folder, folder.parent) if at.is_dir() and at != Path()), None)
    root = root or Path("checkpoints")
    found_there = [*_folders(root), *(run.folder for run in trainings(root))]
    names = [str(path) for path in sorted(found_there)]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    there = f"there are {', '.join(names[:NAMED])}{more}" if names else "nor anywhere near it"
    raise CheckpointError(f"no experiment or training in {folder}; {there}")


def below(root: Path) -> list[Experiment]:
    """The experiments in `root` and below it."""
    return [found for folder in _folders(root) if (found := find(folder))]


def trainings(root: Path) -> list[Run]:
    """The trainings in `root` and below it that are no part of an experiment."""
    experiments = set(_folders(root))
    found = [
        (folder, status.read(folder))
        for folder in runs.run_folders(root, status.NAME)
        if not experiments & {folder, *folder.parents}
    ]
    return [Run(folder, said) for folder, said in found if said is not None]


def _folders(root: Path) -> list[Path]:
    return runs.run_folders(root, ledger.EXPERIMENT_FILE)


def print_list(root: Path, out: Console) -> None:
    """Every experiment in `root` and below it, and every single training, the newest last."""
    rows = [(item.heard, _experiment_row(item)) for item in below(root)]
    rows += [(run.status.time, _training_row(run)) for run in trainings(root)]
    if not rows:
        out.print(f"No experiments in {root}")
        return
    columns = ("folder", "state", "done", "failed", "ago", "kind", "when")
    cells = [
        [*row[:4], duration(time.time() - heard), row[4], f"{datetime.fromtimestamp(heard):%F %R}"]
        for heard, row in sorted(rows, key=lambda item: item[0])
    ]
    out.print(fitted(f"Experiments in {root}", columns, cells, out.width, "folder", least=30))


def _experiment_row(item: Experiment) -> list[str | Text]:
    failed = Text(f"{item.failed:,}", style="red" if item.failed else "")
    done = f"{item.done:,} of {item.about.total:,}"
    return [str(item.folder), _word(item.state), done, failed, item.about.kind]


def _training_row(run: Run) -> list[str | Text]:
    steps = f"step {run.status.step:,} of {run.status.plan.total_steps:,}"
    return [str(run.folder), _word(run.state), steps, "", "training"]


def _word(state: str) -> Text:
    return Text(state, style=STYLES.get(state, ""))


def print_experiment(item: Experiment, out: Console, last: int | None) -> None:
    """How it stands, its slots, the newest `last` of its jobs, and why some have failed."""
    out.print(f"{item.folder}: {one_line(item.about.kind)}, {item.state}", soft_wrap=True)
    now = item.picture
    running = item.state in ("running", "stopping")
    counts = [f"{item.done:,} of {item.about.total:,} done", f"{item.failed:,} failed"]
    if running and item.places:
        counts.append(f"{len(item.places)} running")
    out.print(f"  {', '.join(counts)}")
    if now:
        since = f"{datetime.fromtimestamp(now.began):%F %R}"
        heard = duration(time.time() - now.written)
        out.print(f"  process {now.pid} on {now.host}, since {since}, last heard of {heard} ago")
        if running and (left := now.left_s(time.time())) is not None:
            out.print(f"  {duration(left)} left")
    for place in now.places if now else ():
        if place.log:
            out.print(f"  log of {place.slot} {place.log}", soft_wrap=True)
    if now and running:
        columns = rendering.columns_of(now, time.time())
        out.print(rendering.places_table(now, time.time(), out.width, columns))
    if item.records or item.places:
        out.print(_jobs(item, out.width, last))
    _print_reasons(item, out)


def _jobs(item: Experiment, width: int, last: int | None) -> Table:
    """The table of jobs: those that have ended, in this order, and those that run."""
    records = [*item.records.values()]
    shown = records[-last:] if last else records
    values, results = _values(shown), _results(shown)
    rows = [
        _job_row(record.job, record.state, record.elapsed_s, record.attempt)
        + [_cell(record.values.get(name)) for name in values]
        + [_cell(_numbers(record.result).get(name)) for name in results]
        + [record.slot]
        for record in shown
    ]
    for place in item.places:
        assert item.picture is not None and place.job is not None
        is_dead = item.state == "dead"
        until = item.picture.written if is_dead else time.time()
        state = "dead" if is_dead else "running"
        rows.append(
            _job_row(place.job, state, until - place.began, place.attempt)
            + [""] * len(values)
            + [_cell(place.number(name)) for name in results]
            + [place.slot]
        )
    title = "Jobs"
    if len(shown) < len(records):
        title = f"Jobs: the last {len(shown):,} of {len(records):,}; --last None shows all"
    columns = ["job", "state", "took", "attempt", *values, *results, "slot"]
    return fitted(title, columns, rows, width, elastic="job", least=24)


def _job_row(job: str, state: str, elapsed_s: float, attempt: int) -> list[str | Text]:
    took = duration(elapsed_s) if elapsed_s >= 10 else f"{elapsed_s:.2f}s"
    return [job, _word(state), took, f"{attempt}"]


def _values(records: Sequence[JobResult]) -> list[str]:
    """The values that the jobs' names do not tell."""
    names = dict.fromkeys(
        name
        for record in records
        for name, value in record.values.items()
        if point_name({name: value}) not in record.job
    )
    return [*names]


def _results(records: Sequence[JobResult]) -> list[str]:
    """The numbers that the jobs' results have: the best known first, then those that differ."""
    found: dict[str, set[float]] = {}
    for record in records:
        for name, value in _numbers(record.result).items():
            found.setdefault(name, set()).add(value)

    def rank(name: str) -> tuple[int, bool]:
        known = FIRST_RESULTS.index(name) if name in FIRST_RESULTS else len(FIRST_RESULTS)
        return known, len(found[name]) == 1

    return sorted(found, key=rank)


def _numbers(result: Any) -> dict[str, float]:
    """The numbers of a result by name; a number alone is the result."""
    named = result if isinstance(result, dict) else {"result": result}
    return {name: value for name, value in named.items() if is_number(value)}


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return figure(value) if is_number(value) else f"{value}"


def _print_reasons(item: Experiment, out: Console) -> None:
    """Why jobs have failed, in a line each."""
    for record in item.failures[-SHOWN_REASONS:]:
        words = f"{record.job}: {one_line(record.reason)}"
        out.print(Text(words, style="red"), soft_wrap=True)
    if item.failures:
        hidden = max(0, item.failed - SHOWN_REASONS)
        more = f"and {hidden:,} more; " if hidden else ""
        out.print(
            f"{more}gpt2 experiments show {shlex.quote(str(item.folder))} --failed prints the "
            "tracebacks",
            soft_wrap=True,
        )


def print_failures(item: Experiment, out: Console, last: int | None) -> None:
    """The newest `last` failures with their tracebacks, as far as the jobs raised."""
    if not item.failures:
        out.print(f"No job of {item.folder} has failed")
    for record in item.failures[-last:] if last else item.failures:
        when = f"{datetime.fromtimestamp(record.time):%F %T}"
        words = f"{record.job}, {when} on {record.slot}{rendering.attempt(record.attempt)}: "
        out.print(Text(words + one_line(record.reason), style="red"), soft_wrap=True)
        for line in record.traceback.splitlines():
            out.print(f"  {line}", soft_wrap=True)


def brief_facts(item: Experiment) -> dict[str, Any]:
    """How it stands, in JSON's terms."""
    return {
        "folder": str(item.folder),
        "state": item.state,
        "kind": item.about.kind,
        "total": item.about.total,
        "done": item.done,
        "failed": item.failed,
        "time": item.heard,
    }


def facts(item: Experiment) -> dict[str, Any]:
    """All of it, in JSON's terms."""
    return {
        **brief_facts(item),
        "fixed": item.about.fixed,
        "now": asdict(item.picture) if item.picture else None,
        "jobs": [asdict(record) for record in item.records.values()],
    }
