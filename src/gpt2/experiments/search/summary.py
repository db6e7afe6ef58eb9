"""The end of a search: prints its best trials, writes its report, and says what is left to do."""

from __future__ import annotations

import logging
import shlex

from optuna.study import Study
from rich.console import Console

from gpt2.base.errors import UserError
from gpt2.base.text import counted
from gpt2.experiments.search import best, ownership, study, trial, trial_report
from gpt2.experiments.search.spec import Search
from gpt2.experiments.search.trial_source import TrialSource

logger = logging.getLogger(__name__)


def summarize(
    search: Search, optuna_study: Study, source: TrialSource, signal_number: int, out: Console
) -> int:
    """Prints and writes the results of the search; returns the exit code.

    `signal_number` is that of the signal that stopped the search, or 0.
    """
    rows = source.retry(lambda: trial_report.trial_rows(optuna_study, search.folder))
    if any(row.value is not None for row in rows):
        out.print(trial_report.best_trials_table(rows, out))
    for row in rows:
        if row.state == "FAIL" and row.reason:
            out.print(f"FAILED {trial.name_of(row.number)}: {row.reason}", style="red")
    found: best.BestTrial | None = None
    try:
        found = source.retry(lambda: best.export(optuna_study, search.folder))
        if any(row.is_reportable for row in rows):
            written = trial_report.write(rows, search.folder, found.command if found else None)
            names = ", ".join(path.name for path in written)
            out.print(f"Summary: {search.folder / trial_report.FOLDER} ({names})")
    except (OSError, UserError) as error:
        logger.warning("the summary could not be written completely: %s", error)
    if found and found.command:
        out.print(f"Best model: {search.folder / best.FOLDER}; training in full:")
        out.print(f"  {found.command}", soft_wrap=True)
    elif found:
        location = ownership.location_of(optuna_study, found.trial, search.folder)
        out.print(f"Best trial: {location}, without files in {search.folder}", soft_wrap=True)
    address = search.storage or study.url(search.folder)
    command = shlex.join(["optuna-dashboard", study.without_password(address)])
    out.print(f"Look into it: {command}", soft_wrap=True)
    return _print_remaining(search, source, signal_number, out)


def _print_remaining(search: Search, source: TrialSource, signal_number: int, out: Console) -> int:
    """Prints how many trials are left and why; returns the exit code."""
    done = source.done
    left = counted(search.n_trials - done, "trial")
    if done >= search.n_trials:
        return 0
    if signal_number:
        out.print(f"Stopped: {left} left; run the same command to continue")
        return 128 + signal_number
    if source.has_given_up:
        out.print(
            f"Ended: {source.failed_in_a_row} trials failed one after another, {left} left; fix "
            "the cause and run the same command to continue",
            style="red",
        )
        return 1
    out.print(f"Ended: {left} left; run the same command to continue")
    return 1
