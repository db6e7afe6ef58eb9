"""The end of a search: prints its best trials, writes its report, and says what is left to do."""

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
    trials = source.retry(lambda: optuna_study.get_trials(deepcopy=False))
    if any(trial_report.loss_of(item) is not None for item in trials):
        out.print(trial_report.best_trials_table(trials, out))
    for item in trials:
        if item.state.name == "FAIL" and (reason := item.user_attrs.get("reason")):
            out.print(f"FAILED {trial.name_of(item.number)}: {reason}", style="red")
    try:
        found = source.retry(lambda: best.export(optuna_study, search.folder))
        _, command = found or (None, None)
        written = source.retry(lambda: trial_report.write(optuna_study, search.folder, command))
        if written:
            names = ", ".join(path.name for path in written)
            out.print(f"Summary: {search.folder / trial_report.FOLDER} ({names})")
        if command:
            out.print(f"Best model: {search.folder / best.FOLDER}; training in full:")
            out.print(f"  {command}", soft_wrap=True)
        elif found:
            location = ownership.location_of(optuna_study, found[0], search.folder)
            out.print(f"Best trial: {location}, without files in {search.folder}", soft_wrap=True)
    except (OSError, UserError) as error:
        logger.warning("the summary could not be written completely: %s", error)
    address = study.without_password(search.storage or study.url(search.folder))
    out.print(f"Look into it: {shlex.join(['optuna-dashboard', address])}", soft_wrap=True)
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
    else:
        out.print(f"Ended: {left} left; run the same command to continue")
    return 1
