"""Runs a search on the scheduler, prints its best trials, and says what is left to do."""

import contextlib
import logging
import shlex
import time
from collections.abc import Callable, Sequence

from optuna.study import Study
from rich.console import Console

from gpt2.base import addresses
from gpt2.base.errors import UserError
from gpt2.base.text import counted, one_line
from gpt2.config import gpu_list
from gpt2.experiments import results
from gpt2.experiments.pool.job import Job, Slot
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Limits, Scheduler, worker_logs
from gpt2.experiments.progress.live_view import showing_progress
from gpt2.experiments.progress.state import ExperimentState
from gpt2.experiments.search import best, space, spec, study, trial, trial_report
from gpt2.experiments.search.spec import Search
from gpt2.experiments.search.trial_source import TrialSource

logger = logging.getLogger(__name__)


def run(
    search: Search,
    engine: Engine,
    limits: Limits,
    out: Console,
    make_job: Callable[..., Job] = trial.job,
) -> int:
    """Runs the missing trials of the search, and prints and writes its summary.

    `make_job` has the parameters of `trial.job`. Returns the exit code: 1 if there are fewer trials
    than requested, 128 plus the signal's number if the search was stopped.
    """
    with contextlib.ExitStack() as stack:
        opened = results.opened(search.folder, search.description(), spec.differences)
        store = stack.enter_context(opened)
        stack.enter_context(study.storage_errors())
        optuna_study = study.open_study(search)
        heartbeat = study.Heartbeat(optuna_study, search.folder)
        stack.callback(heartbeat.end)
        source = TrialSource(optuna_study, search, store, heartbeat, make_job)
        source.catch_up()
        done = source.done
        _print_plan(search, engine.slots, done, out)
        signal_number = 0
        if done < search.n_trials:
            signal_number = _run_trials(search, source, engine, limits, out)
        store.save(space=space.describe(search.space))
        return summarize(search, optuna_study, source, signal_number, out)


def _run_trials(
    search: Search, source: TrialSource, engine: Engine, limits: Limits, out: Console
) -> int:
    """Runs the trials of the source; the number of the signal that stopped them, or 0."""
    log = search.log_dir / f"search_{time.strftime('%Y%m%d_%H%M%S')}.log"
    begun = ExperimentState.at_start("search", search.n_trials, engine.slots, before=source.done)
    with showing_progress(begun, search.folder, log=log, out=out) as progress:
        scheduler = Scheduler(
            engine,
            source,
            lambda event: progress.report(source.as_in_study(event)),
            log_of=worker_logs(search.log_dir),
            limits=limits,
        )
        source.is_stopping = lambda: scheduler.stop_requested
        return scheduler.run()


def _print_plan(search: Search, slots: Sequence[Slot], done: int, out: Console) -> None:
    names = ", ".join(slot.name for slot in slots)
    names += f", {search.ranks} ranks each" if search.ranks > 1 else ""
    out.print(f"Search: {counted(search.n_trials, 'trial')}, {len(slots)} at a time on {names}")
    if done:
        out.print(f"  - done already: {min(done, search.n_trials)}")
    if missing := max(0, search.n_trials - done):
        out.print(f"  - {per_gpu(missing, slots, search.ranks)}")
    for name, values in space.describe(search.space).items():
        out.print(f"  - {name}: {values}")
    out.print(f"  - trials {search.folder}/trial_*, study {study.location(search)}")
    out.print(f"  - logs {search.log_dir}/worker_{slots[0].name}_*.log, one for each slot")


def per_gpu(trials: int, slots: Sequence[Slot], ranks: int) -> str:
    """`12 trials per GPU`: the share of each GPU, group of GPUs, or slot without a GPU."""
    gpus = {slot.environment.get(gpu_list.VARIABLE, "") for slot in slots} - {""}
    unit = "slot" if not gpus else "GPU" if ranks == 1 else f"{ranks} GPUs"
    least, left = divmod(trials, len(gpus) or len(slots))
    share = f"{least} or {least + 1} trials" if left else counted(least, "trial")
    return f"{share} per {unit}"


def summarize(
    search: Search, optuna_study: Study, source: TrialSource, signal_number: int, out: Console
) -> int:
    """Prints and writes the results of the search; returns the exit code.

    `signal_number` is that of the signal that stopped the search, or 0.
    """
    trials = source.retry(lambda: optuna_study.get_trials(deepcopy=False))
    if finished := trial_report.best_first(trials):
        out.print(trial_report.best_trials_table(trials, out))
    for item in trials:
        if item.state.name == "FAIL" and (reason := item.user_attrs.get("reason")):
            out.print(one_line(f"FAILED {trial.name_of(item.number)}: {reason}"), style="red")
    try:
        command = best.export(trials, search.folder)
        written = source.retry(lambda: trial_report.write(optuna_study, search.folder, command))
        if written:
            names = ", ".join(path.name for path in written)
            out.print(f"Summary: {search.folder / trial_report.FOLDER} ({names})")
        if command:
            out.print(f"Best model: {search.folder / best.FOLDER}; training in full:")
            out.print(f"  {command}", soft_wrap=True)
        elif finished:
            location = study.location_of(optuna_study, finished[0], search.folder)
            out.print(f"Best trial: {location}, without files in {search.folder}", soft_wrap=True)
    except (OSError, UserError) as error:
        logger.warning("the summary could not be written completely: %s", error)
    address = addresses.without_secrets(search.storage or study.url(search.folder))
    out.print(f"Look into it: {shlex.join(['optuna-dashboard', address])}", soft_wrap=True)
    return _print_remaining(search, source, signal_number, out)


def _print_remaining(search: Search, source: TrialSource, signal_number: int, out: Console) -> int:
    """Prints how many trials are left, and why; returns the exit code."""
    if (left := search.n_trials - source.done) <= 0:
        return 0
    reason = "Stopped" if signal_number else "Ended"
    if source.has_given_up:
        reason += f", as {source.failed_in_a_row} trials failed one after another"
    out.print(f"{reason}: {counted(left, 'trial')} left; run the same command to continue")
    return 128 + signal_number if signal_number else 1
