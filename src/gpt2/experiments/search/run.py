"""Runs a search on the scheduler, and summarizes it."""

import contextlib
import time
from collections.abc import Callable, Sequence

from rich.console import Console

from gpt2.base.text import counted
from gpt2.experiments import results
from gpt2.experiments.pool.job import Event, Job, Slot
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Limits, Scheduler, worker_logs
from gpt2.experiments.progress.live_view import showing_progress
from gpt2.experiments.progress.state import StateTracker
from gpt2.experiments.results import ExperimentDescription
from gpt2.experiments.search import ownership, space, spec, study, summary, trial
from gpt2.experiments.search.spec import Search
from gpt2.experiments.search.trial_source import TrialSource


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
    about = search.description()

    def differences(before: ExperimentDescription) -> list[str]:
        return spec.differences(before.fixed, about.fixed)

    with contextlib.ExitStack() as stack:
        store = stack.enter_context(results.opened(search.folder, about, differences))
        stack.enter_context(study.storage_errors())
        optuna_study = study.open_study(search)
        heartbeat = ownership.Heartbeat(optuna_study, search.folder)
        stack.callback(heartbeat.end)
        source = TrialSource(optuna_study, search, store, heartbeat, make_job)
        source.catch_up()
        done = source.done
        _print_plan(search, engine.slots, done, out)
        signal_number = 0
        if done < search.n_trials:
            signal_number = _run_trials(search, source, engine, limits, out)
        store.save(space=space.describe(search.space))
        return summary.summarize(search, optuna_study, source, signal_number, out)


def _run_trials(
    search: Search, source: TrialSource, engine: Engine, limits: Limits, out: Console
) -> int:
    """Runs the trials of the source; the number of the signal that stopped them, or 0."""
    log = search.log_dir / f"search_{time.strftime('%Y%m%d_%H%M%S')}.log"
    tracker = StateTracker("search", search.n_trials, engine.slots, before=source.done)
    announced: set[str] = set()
    with showing_progress(tracker, search.folder, log=log, out=out) as show:

        def on_event(event: Event) -> None:
            show(source.as_in_study(event))
            # Without a terminal, the lines about started jobs have process and log.
            if event.kind == "started" and event.slot.name not in announced and out.is_terminal:
                announced.add(event.slot.name)
                out.print(f"  - worker {event.slot.name}: process {event.pid}, log {event.log}")

        log_of = worker_logs(search.log_dir)
        scheduler = Scheduler(engine, source, on_event, log_of=log_of, limits=limits)
        source.retry.is_stopping = lambda: scheduler.stop_requested
        return scheduler.run()


def _print_plan(search: Search, slots: Sequence[Slot], done: int, out: Console) -> None:
    names = ", ".join(slot.name for slot in slots)
    names += f", {search.ranks} ranks each" if search.ranks > 1 else ""
    out.print(f"Search: {counted(search.n_trials, 'trial')}, {len(slots)} at a time on {names}")
    if done:
        out.print(f"  - done already: {min(done, search.n_trials)}")
    for name, values in space.describe(search.space).items():
        out.print(f"  - {name}: {values}")
    if (count := space.combinations(search.space)) < search.n_trials:
        only = counted(int(count), "combination")
        out.print(f"  - the space has only {only}: some trials will have the same values")
    out.print(f"  - trials {search.folder}/trial_*, study {study.location(search)}")
    out.print(f"  - logs {search.log_dir}/worker_{slots[0].name}_*.log, one for each slot")
