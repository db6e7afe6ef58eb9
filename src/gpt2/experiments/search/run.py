"""Runs a search on the pool and sums it up."""

import contextlib
import time
from collections.abc import Sequence

from rich.console import Console

from gpt2.base.text import counted
from gpt2.experiments import results
from gpt2.experiments.pool.job import Event, Slot
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Limits, Scheduler, worker_logs
from gpt2.experiments.progress.live_view import showing_progress
from gpt2.experiments.progress.state import StateTracker
from gpt2.experiments.search import space as spaces
from gpt2.experiments.search import study as studies
from gpt2.experiments.search import summary
from gpt2.experiments.search.spec import Search
from gpt2.experiments.search.trials import ENDED, Trials
from gpt2.experiments.training import training_job


def run(search: Search, engine: Engine, limits: Limits, out: Console) -> int:
    """Runs the trials that are missing; the exit code: 1 if there are less than were asked for,
    128 and the signal's number if it was stopped."""
    training_job.require_data(search.run, search.ranks)
    with contextlib.ExitStack() as stack:
        opened = results.opened(search.folder, search.description(), search.differences)
        store = stack.enter_context(opened)
        stack.enter_context(studies.errors_explained())
        study = studies.opened(search)
        stack.enter_context(studies.errors_explained(study))
        patiently = studies.Patience(lambda text: out.print(text, style="yellow", soft_wrap=True))
        source = Trials(study, search, store, patiently)
        source.catch_up()
        done = source.done
        _introduce(search, engine.slots, done, out)
        number = 0
        if done < search.n_trials:
            number = _run_pool(search, source, engine, limits, out, patiently)
        store.save(space=spaces.described(search.space))
        return summary.conclude(search, study, source, number, out)


def _run_pool(
    search: Search,
    source: Trials,
    engine: Engine,
    limits: Limits,
    out: Console,
    patiently: studies.Patience,
) -> int:
    log = search.log_dir / f"search_{time.strftime('%Y%m%d_%H%M%S')}.log"
    tracker = StateTracker("search", search.n_trials, engine.slots, before=source.done)
    named: set[str] = set()
    with showing_progress(tracker, search.folder, log=log, out=out) as on_event:

        def told(event: Event) -> None:
            on_event(source.shown(event))
            if event.kind in ENDED and search.is_shared:
                tracker.set_done(source.done)  # others' trials count, too
            if event.kind == "started" and event.slot.name not in named and out.is_terminal:
                named.add(event.slot.name)  # elsewhere every start is a line
                out.print(f"  - worker {event.slot.name}: process {event.pid}, log {event.log}")

        log_of = worker_logs(search.log_dir)
        pool = Scheduler(engine, source, told, log_of=log_of, limits=limits)
        patiently.is_stopping = lambda: pool.stop_requested
        number = pool.run()
        if search.is_shared:
            tracker.set_done(source.done)
        return number


def _introduce(search: Search, places: Sequence[Slot], done: int, out: Console) -> None:
    slots = ", ".join(slot.name for slot in places)
    slots += f", {search.ranks} ranks each" if search.ranks > 1 else ""
    out.print(f"Search: {counted(search.n_trials, 'trial')}, {len(places)} at a time on {slots}")
    if done:
        out.print(f"  - done already: {min(done, search.n_trials)}")
    for name, values in spaces.described(search.space).items():
        out.print(f"  - {name}: {values}")
    if (count := spaces.combinations(search.space)) < search.n_trials:
        out.print(f"  - these are only {counted(int(count), 'combination')}: trials will be alike")
    out.print(f"  - trials {search.folder}/trial_*, study {studies.where(search)}")
    out.print(f"  - logs {search.log_dir}/worker_{places[0].name}_*.log, one for each slot")
