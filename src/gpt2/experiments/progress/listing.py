"""Experiments on disk: a list of all, one with its jobs and failures, a view that follows it."""

import logging
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from gpt2.base import folder_lock
from gpt2.base.errors import CheckpointError
from gpt2.base.text import fitted, four_digits, one_line, shortened
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
MAX_REASONS, MAX_KNOWN, MAX_WATCHED_FAILURES = 10, 10, 8
DEFAULT_FOLDER = Path("checkpoints")


@dataclass(frozen=True)
class StoredExperiment:
    """An experiment, read from its folder."""

    folder: Path
    description: ExperimentDescription
    current: ExperimentState
    """as it is seen from here; without slots and process if `state.json` cannot be read"""
    results: Sequence[JobResult]
    """the last result of each job"""

    @property
    def failures(self) -> list[JobResult]:
        return [result for result in self.results if result.state == "failed"]

    @property
    def done(self) -> int:
        """Jobs that need not run again."""
        return len(self.results) - len(self.failures)


def read(folder: Path) -> StoredExperiment:
    """The experiment in `folder`; raises CheckpointError if there is none, or its files cannot be
    read."""
    description = results.read_description(folder)
    if description is None:
        raise CheckpointError(f"no experiment or training in {folder}{_known(folder)}")
    last = {result.job: result for result in results.read_results(folder)}
    begun = (folder / results.EXPERIMENT_FILE).stat().st_mtime
    unknown = ExperimentState(description.kind, description.total, (), written=begun)
    # The lock of another machine may not be visible here, its signs of life are.
    is_held = folder_lock.is_held(folder) or folder_lock.has_live_owner(folder)
    current = (state.read(folder) or unknown).seen(is_held)
    return StoredExperiment(folder, description, current, [*last.values()])


def _known(folder: Path) -> str:
    """The end of an error message: the experiments and trainings below `folder`, beside it, or in
    the folder that `gpt2 experiments list` shows."""
    names = (results.EXPERIMENT_FILE, status.NAME)
    for root, below_it in ((folder, "**"), (folder.parent, "*"), (DEFAULT_FOLDER, "**")):
        paths = (path for name in names for path in root.glob(f"{below_it}/{name}"))
        if known := sorted({str(path.parent) for path in paths}):
            more = f" and {len(known) - MAX_KNOWN} more" if len(known) > MAX_KNOWN else ""
            return f"; there are {', '.join(known[:MAX_KNOWN])}{more}"
    return "; `gpt2 experiments list DIR` shows those in DIR"


def below(root: Path) -> Iterator[StoredExperiment]:
    """The experiments in `root` and its subfolders."""
    for folder in run_status.run_folders(root, results.EXPERIMENT_FILE):
        try:
            yield read(folder)
        except CheckpointError as error:  # one damaged folder does not hide the others
            logger.warning("%s", error)


def print_list(root: Path, out: Console) -> None:
    """Prints the experiments in `root` and its subfolders, and the trainings that are not part of
    one, the newest last."""
    rows: list[tuple[float, list[str | Text]]] = []
    for item in below(root):
        now, kind = item.current, item.description.kind
        done = f"{item.done:,} of {item.description.total:,}"
        failed = Text(f"{len(item.failures):,}", "red" if item.failures else "")
        rows.append((now.written, [str(item.folder), _styled(now.state), done, failed, kind]))
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
    out.print(
        f"{item.folder}: {one_line(item.description.kind)}, {item.current.state}", soft_wrap=True
    )
    done = f"{item.done:,} of {item.description.total:,} done"
    out.print(f"  {done}, {len(item.failures):,} failed")
    now = item.current
    if now.slots:
        since, age = f"{datetime.fromtimestamp(now.began):%F %R}", time.time() - now.written
        out.print(f"  process {now.pid} on {now.host}, since {since}, updated {duration(age)} ago")
        for slot in now.slots:
            if slot.log:
                out.print(f"  log of {slot.slot} {slot.log}", soft_wrap=True)
        if not now.is_over:  # of a dead one, what it last did
            out.print()
            out.print(rendering.view(now, time.time(), out.width))
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
        "state": item.current.state,
        "kind": item.description.kind,
        "total": item.description.total,
        "done": item.done,
        "failed": len(item.failures),
        "time": item.current.written,
    }


def full_json(item: StoredExperiment) -> dict[str, Any]:
    """The summary with state and jobs, as `gpt2 experiments show --json` prints it."""
    return {
        **summary_json(item),
        "fixed": item.description.fixed,
        "now": state.as_json(item.current) if item.current.slots else None,
        "jobs": [asdict(result) for result in item.results],
    }


class ExperimentView:
    """An experiment, by its `state.json`; a view as `gpt2.inspection.watch` defines it."""

    def __init__(
        self, folder: Path, on_death: Callable[[Path, ExperimentState], None] = lambda *_: None
    ) -> None:
        """`on_death` is called whenever the process is found dead. Raises CheckpointError if there
        is no experiment in `folder`, or none that can be read."""
        self._folder, self._on_death = folder, on_death
        self._current = read(folder).current
        self.state = ""

    def update(self) -> bool:
        current = state.read(self._folder) or self._current
        self._current = current.seen(folder_lock.has_live_owner(self._folder))
        before, self.state = self.state, self._current.state
        is_known = self._current.pid != 0  # not if `state.json` cannot be read
        if is_known and self.state == "dead" != before:
            self._on_death(self._folder, self._current)
        return False

    def render(self, width: int, height: int, *, is_ascii: bool = False) -> RenderableType:
        """The view in `width` cells and, unless it has many slots, at most `height` lines."""
        now, word = self._current, self.state
        title = shortened(one_line(str(self._folder)), max(10, width - len(word) - 2))
        heading = Text.assemble((title, "bold"), "  ", (word, STYLES.get(word, "bold")))
        parts: list[RenderableType] = [heading]
        if word == "dead":
            ago = duration(time.time() - now.written)
            parts.append(Text(f"Its process ended unexpectedly, last seen {ago} ago", "red"))
        parts += [Text(), rendering.view(now, time.time(), width)]
        room = height - len(parts) - len(now.slots) - 4
        if now.failures and room > 0:
            parts += [Text(), Text("failed", "bold")]
            for failure in now.failures[-min(MAX_WATCHED_FAILURES, room) :]:
                words = one_line(f"{failure.job} on {failure.slot}: {failure.reason}")
                parts.append(rendering.cut(words, "red"))
        return Group(*parts)

    def news(self) -> list[str]:
        """A line about the experiment, and one about each running job."""
        now, at = self._current, time.time()
        running = [rendering.slot_line(slot, at) for slot in now.slots if slot.job]
        return [f"{self.state} | {rendering.summary(now, at)}", *running]
