"""A search: an Optuna study whose trials are trainings, on all slots at once.

The study is the truth, and this process alone writes to it: it asks for a trial when a slot is
free, reports each validation, and tells how the trial ended. What a killed owner left RUNNING is
taken up again, with its number, its folder and its checkpoint.

What counts towards `n_trials`: COMPLETE and PRUNED. A trial that is stopped by `patience` is
COMPLETE with its best value, one that diverges is PRUNED, so that the sampler learns of both. A
FAILED one is replaced by another, until FAILURES in a row say that it is not the trial's fault.
"""

import math
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from rich.console import Console

from gpt2 import config
from gpt2.config import RunConfig
from gpt2.errors import ConfigError
from gpt2.experiments import best, report, studies, training
from gpt2.experiments import ledger as ledgers
from gpt2.experiments import space as spaces
from gpt2.experiments import trial as trials
from gpt2.experiments.board import Board
from gpt2.experiments.ledger import About, Ledger, Record
from gpt2.experiments.plan import Answer, Event, Job, Slot
from gpt2.experiments.pool import Limits, Pool, worker_logs
from gpt2.experiments.process import Engine
from gpt2.experiments.space import Dimension, Space
from gpt2.experiments.view import watched
from gpt2.tables import counted

FAILURES = 5
"""trials that fail one after another until no more is begun"""
LEFT_ALONE_S = 60.0
"""age of a trial without an owner: whoever asked for it has died in that moment"""
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)
OWNER, ENDING, RESULT, REASON = "owner", "ending", "result", "reason"
"""what a trial keeps beside its parameters"""


@dataclass(frozen=True)
class Search:
    """What is searched, and how."""

    run: RunConfig
    """the training that the space changes"""
    space: Space
    n_trials: int = 24
    """in all, those of earlier starts included"""
    patience: int | None = 15
    """validations in a row without a better one, after which a trial ends"""
    prune: bool = True
    startup_trials: int = 5
    """trials that have finished before any is pruned"""
    folder: Path = Path("checkpoints/search")
    log_dir: Path = Path("logs")
    storage: str | None = None
    """URL of a data base that several machines share; None is a file in `folder`"""
    study_name: str = "search"
    keep_checkpoints: bool = False

    def __post_init__(self) -> None:
        training.require_fresh_start(self.run)
        if self.run.evaluation.eval_interval is None:
            raise ConfigError("--eval_interval None: a search compares validation losses")

    def about(self) -> About:
        """What all trials have in common; more of them may be added later."""
        searched = spaces.described(self.space)
        decisive = training.decisive(self.run).items()
        fixed = {name: value for name, value in decisive if name not in searched}
        if {"total_batch_size", "block_size"} & searched.keys():
            # The tokens of a trial, and of a validation, are counted in what the options say.
            fixed["tokens_per_step"] = self.run.data.total_batch_size
            fixed["eval_tokens"] = self.run.eval_rows * self.run.model.block_size
        return About("search", {**fixed, "space": searched}, total=self.n_trials)

    def differences(self, before: About) -> list[str]:
        """What another search had otherwise."""
        return studies.differences(before.fixed, self.about().fixed)

    @property
    def owner(self) -> str:
        """Names this process's part in a study that several share."""
        return f"{socket.gethostname()}:{self.folder.resolve()}"


@dataclass
class Live:
    """A trial that runs, or is to run."""

    trial: Trial
    run: RunConfig
    losses: dict[int, float] = field(default_factory=dict)
    """validations so far, by their place"""
    ending: str = ""
    """why it is to end: pruned, patience, diverged"""
    is_over: bool = False


class Trials:
    """The source of the trainings; the only one that touches the study."""

    def __init__(self, study: Study, search: Search, ledger: Ledger) -> None:
        self._study, self._search, self._ledger = study, search, ledger
        self._live: dict[str, Live] = {}
        self._failed_in_a_row = 0
        self._adopted = [item for item in self.all(TrialState.RUNNING) if self._is_mine(item)]

    def all(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states or None)

    @property
    def done(self) -> int:
        return len(self.all(*COUNTED))

    @property
    def elsewhere(self) -> int:
        """Trials that other machines train."""
        if self._search.storage is None:
            return 0
        mine = self._search.owner
        running = self.all(TrialState.RUNNING)
        return sum(item.user_attrs.get(OWNER, mine) != mine for item in running)

    @property
    def is_broken(self) -> bool:
        """Whether so many trials have failed that others would, too."""
        return self._failed_in_a_row >= FAILURES

    def next(self) -> Job | None:
        with studies.errors_explained():
            if self._adopted:
                return self._adopt()
            trial = self._ask()
            return None if trial is None else self._begin(trial, None)

    def event(self, event: Event) -> Answer:
        if event.job is None:
            return "go"
        with studies.errors_explained():
            live = self._live[event.job.name]
            if event.kind == "reported":
                return self._judge(live, event.metrics)
            if event.kind in ("finished", "pruned", "failed"):
                self._end(live, event)
        return "go"

    def shown(self, event: Event) -> Event:
        """The event as it is to be seen: a trial without further progress has finished."""
        live = self._live.get(event.job.name) if event.job else None
        if event.kind == "pruned" and live and live.ending == "patience":
            return replace(event, kind="finished")
        return event

    def catch_up(self) -> None:
        """Enters what the study knows and the ledger does not: an owner died between the two."""
        for item in self.all(*COUNTED, TrialState.FAIL):
            known = self._ledger.records.get(trials.name_of(item.number))
            if known is None and self._is_mine(item):
                self._enter(item, Record(trials.name_of(item.number), "failed", {}))

    def _is_mine(self, item: FrozenTrial) -> bool:
        """Whether it is to go on here; one that nobody owns is told FAIL, so that it is replaced.
        The data base in an experiment's own folder has no other owner."""
        if self._search.storage is None or item.user_attrs.get(OWNER) == self._search.owner:
            return True
        began = item.datetime_start.timestamp() if item.datetime_start else 0.0
        is_left = OWNER not in item.user_attrs and time.time() > began + LEFT_ALONE_S
        if is_left and not item.state.is_finished():
            self._study.tell(item.number, state=TrialState.FAIL, skip_if_finished=True)
        return False

    def _adopt(self) -> Job | None:
        """A trial that was left; not if less trials are wanted than when it began."""
        mine = sum(not live.is_over for live in self._live.values())
        if self.is_broken or self.done + mine >= self._search.n_trials:
            return None
        left = self._adopted.pop(0)
        return self._begin(Trial(self._study, left._trial_id), left)

    def _ask(self) -> Trial | None:
        """A new trial, if one is missing."""
        wanted = self._search.n_trials
        if self.is_broken or len(self.all(*COUNTED, TrialState.RUNNING)) >= wanted:
            return None
        trial = self._study.ask()
        trial.set_user_attr(OWNER, self._search.owner)
        before = [
            item for item in self.all(*COUNTED, TrialState.RUNNING) if item.number < trial.number
        ]
        if len(before) < wanted:
            return trial
        # Another machine has asked for the last one at the same time.
        self._study.tell(trial.number, state=TrialState.FAIL)
        return None

    def _begin(self, trial: Trial, left: FrozenTrial | None) -> Job:
        """The job of a trial; of one that was left, with what is known of it."""
        space = self._search.space
        drawn = {item.name: suggest(trial, item) for item in space}
        run_config = spaces.fitted(self._search.run, space, drawn)
        used = values_of(run_config, space)
        for name, value in used.items():
            if value != drawn[name]:
                trial.set_user_attr(f"used_{name}", value)
        known = dict(left.intermediate_values) if left else {}
        ending = left.user_attrs.get(ENDING, "") if left else ""
        name = trials.name_of(trial.number)
        self._live[name] = Live(trial, run_config, known, ending)
        return trials.job(trial.number, run_config, self._search.folder, used)

    def _judge(self, live: Live, metrics: Mapping[str, Any]) -> Answer:
        """What the trial is to do after a report: once it is to end, that stays so."""
        step = metrics.get("step", 0)
        if live.ending or "val_loss" not in metrics or step == 0:  # 0: nothing is learnt yet
            return "prune" if live.ending else "go"
        loss, place = metrics["val_loss"], place_of(step, live.run, self._search.run)
        if loss is None or not math.isfinite(loss):
            return self._decide(live, "diverged")
        if place not in live.losses:  # it has gone back to a checkpoint before that
            live.trial.report(loss, place)
            live.losses[place] = loss
        if step >= metrics.get("total_steps", math.inf):
            return "go"
        if is_exhausted(live.losses, self._search.patience):
            return self._decide(live, "patience")
        if self._search.prune and live.trial.should_prune():
            return self._decide(live, "pruned")
        return "go"

    def _decide(self, live: Live, ending: str) -> Answer:
        live.trial.set_user_attr(ENDING, ending)
        live.ending = ending
        return "prune"

    def _end(self, live: Live, event: Event) -> None:
        """Tells the study, and only then the ledger: what the study knows is never done again."""
        result = dict(event.result or {})
        state, reason = outcome(live, event.kind, event.reason or result.get("diverged", ""))
        live.trial.set_user_attr(RESULT, result)
        if reason:
            live.trial.set_user_attr(REASON, reason)
        value = min(live.losses.values()) if state == TrialState.COMPLETE else None
        told = self._study.tell(live.trial.number, value, state)
        live.is_over = True
        ended = replace(event, kind="failed", reason=reason)
        self._enter(told, Record.of(ended, {}))
        self._failed_in_a_row = self._failed_in_a_row + 1 if state == TrialState.FAIL else 0
        if state == TrialState.COMPLETE:
            best.keep(self._study, self._search.folder)
        if state != TrialState.FAIL and not self._search.keep_checkpoints:
            folder = self._search.folder / trials.name_of(live.trial.number)
            # Gigabytes take long, and others wait for their answers.
            threading.Thread(target=trials.drop_checkpoints, args=(folder,)).start()

    def _enter(self, item: FrozenTrial, record: Record) -> None:
        """The trial as the ledger keeps it: `record` with what the study knows."""
        states = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned"}
        state: Any = states.get(item.state, "failed")
        losses = list(item.intermediate_values.values())
        result = {"val_loss": min(losses, default=None), **item.user_attrs.get(RESULT, {})}
        result |= {"val_loss": item.value if state == "finished" else result["val_loss"]}
        values = report.used(item)
        reason = item.user_attrs.get(REASON, record.reason)
        self._ledger.add(replace(record, state=state, values=values, result=result, reason=reason))


def suggest(trial: Trial, dimension: Dimension) -> Any:
    """A value of the dimension; a trial that has one already keeps it."""
    name, low, high = dimension.name, dimension.low, dimension.high
    if dimension.choices:
        return trial.suggest_categorical(name, dimension.choices)
    assert low is not None and high is not None
    if dimension.is_whole:
        step = int(dimension.step or 1)
        return trial.suggest_int(name, int(low), int(high), step=step, log=dimension.log)
    return trial.suggest_float(name, low, high, step=dimension.step, log=dimension.log)


def values_of(run_config: RunConfig, space: Space) -> dict[str, Any]:
    """What the training has for each option of the space."""
    plain = run_config.to_dict()
    places = {item.name: config.locate(item.name)[0] for item in space}
    return {name: plain[part][name] for name, part in places.items()}


def place_of(step: int, run_config: RunConfig, base: RunConfig) -> int:
    """A validation's step in terms of `base`: validations of trials with batches of other sizes
    have the same place when they have seen the same tokens."""
    every, everywhere = run_config.evaluation.eval_interval, base.evaluation.eval_interval
    assert every is not None and everywhere is not None
    return -(-step // every) * everywhere


def is_exhausted(losses: Mapping[int, float], patience: int | None) -> bool:
    """Whether the last `patience` validations were all no better than one before them."""
    ordered = [losses[place] for place in sorted(losses)]
    if patience is None or len(ordered) <= patience:
        return False
    return min(ordered[-patience:]) >= min(ordered[:-patience])


def outcome(live: Live, kind: str, reason: str) -> tuple[TrialState, str]:
    """The state that the study is told, and why."""
    if kind == "failed":
        return TrialState.FAIL, reason
    if reason or live.ending == "diverged":
        return TrialState.PRUNED, reason or "its validation loss is no finite number"
    if kind == "pruned" and live.ending == "pruned":
        return TrialState.PRUNED, ""
    if not live.losses:
        return TrialState.FAIL, "it ended without a validation; use a smaller --eval_interval"
    return TrialState.COMPLETE, ""


def run(search: Search, engine: Engine, limits: Limits, out: Console) -> int:
    """Runs the trials that are missing; the exit code: 1 if there are less than were asked for,
    128 and the signal's number if it was stopped."""
    training.require_data(search.run)
    with ledgers.opened(search.folder, search.about(), search.differences) as ledger:
        with studies.errors_explained():
            study = studies.opened(search)
            source = Trials(study, search, ledger)
            source.catch_up()
            done = source.done
        _introduce(search, engine.slots, done, out)
        number = 0
        if done < search.n_trials:
            number = _run_pool(search, source, engine, limits, out)
        ledger.save(space=spaces.described(search.space))
        return _conclude(search, study, source, number, out)


def _run_pool(search: Search, source: Trials, engine: Engine, limits: Limits, out: Console) -> int:
    log = search.log_dir / f"search_{time.strftime('%Y%m%d_%H%M%S')}.log"
    board = Board("search", search.n_trials, engine.slots, before=source.done)
    named: set[str] = set()
    with watched(board, search.folder, log=log, out=out) as on_event:

        def told(event: Event) -> None:
            on_event(source.shown(event))
            if event.kind == "started" and event.slot.name not in named and out.is_terminal:
                named.add(event.slot.name)  # elsewhere every start is a line
                out.print(f"  - worker {event.slot.name}: process {event.pid}, log {event.log}")

        log_of = worker_logs(search.log_dir)
        return Pool(engine, source, told, log_of=log_of, limits=limits).run()


def _introduce(search: Search, places: Sequence[Slot], done: int, out: Console) -> None:
    slots = ", ".join(slot.name for slot in places)
    out.print(f"Search: {counted(search.n_trials, 'trial')}, {len(places)} at a time on {slots}")
    if done:
        out.print(f"  - {min(done, search.n_trials)} of them are done already")
    for name, values in spaces.described(search.space).items():
        out.print(f"  - {name}: {values}")
    where = search.storage and studies.without_password(search.storage)
    out.print(f"  - trials {search.folder}/trial_*, study {where or studies.path(search.folder)}")
    out.print(f"  - logs {search.log_dir}/worker_{places[0].name}_*.log, one for each slot")


def _conclude(search: Search, study: Study, source: Trials, number: int, out: Console) -> int:
    """The best trials on the console, and everything in files."""
    done, wanted = source.done, search.n_trials
    rows = report.rows(study, search.folder)
    if any(row.value is not None for row in rows):
        out.print(report.listing(rows))
    for row in rows:
        if row.state == "FAIL" and row.reason:
            out.print(f"FAILED {trials.name_of(row.number)}: {row.reason}", style="red")
    command = best.keep(study, search.folder)
    try:
        written = report.write(rows, search.folder, command)
        names = ", ".join(path.name for path in written)
        out.print(f"Summary: {search.folder / report.FOLDER} ({names})")
    except (ConfigError, OSError) as error:
        out.print(f"WARNING: not everything could be written: {error}")
    if command:
        out.print(f"Best model: {search.folder / best.FOLDER}; training in full:")
        out.print(f"  {command}", soft_wrap=True)
    storage = search.storage and studies.without_password(search.storage)
    out.print(f"Look into it: optuna-dashboard {storage or studies.url(search.folder)}")
    if done >= wanted:
        return 0
    if number:
        out.print(f"Stopped: {counted(wanted - done, 'trial')} left; the same command goes on")
        return 128 + number
    if source.is_broken:
        out.print(
            f"Ended: {FAILURES} trials have failed one after another; mend the cause, then the "
            f"same command goes on with the {counted(wanted - done, 'trial')} left",
            style="red",
        )
        return 1
    if elsewhere := source.elsewhere:
        out.print(f"Nothing left to begin here; {counted(elsewhere, 'trial')} go on elsewhere")
        return 0
    return 1
