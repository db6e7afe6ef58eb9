"""A search: an Optuna study whose trials are trainings, on all slots at once.

The study is the truth, and this process alone writes to it: it asks for a trial when a slot is
free, reports each validation, and tells how the trial ended. What a killed owner left RUNNING is
taken up again, with its number, its folder and its checkpoint.

What counts towards `n_trials`: COMPLETE and PRUNED. A trial that is stopped by `patience` is
COMPLETE with its best value, one that diverges is PRUNED, so that the sampler learns of both. A
FAILED one is replaced by another, until FAILURES in a row say that it is not the trial's fault.

Others may write to the study, too: a trial that they have ended there ends here, values that they
enqueue and that cannot be are a FAILED trial.
"""

import contextlib
import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from rich.console import Console

from gpt2.config import RunConfig
from gpt2.errors import ConfigError
from gpt2.experiments import best, conclusion, judging, members, report, studies, training
from gpt2.experiments import ledger as ledgers
from gpt2.experiments import space as spaces
from gpt2.experiments import trial as trials
from gpt2.experiments.board import Board
from gpt2.experiments.ledger import About, Ledger, Record
from gpt2.experiments.members import OWNER
from gpt2.experiments.plan import Answer, Event, Job, Slot
from gpt2.experiments.pool import Limits, Pool, worker_logs
from gpt2.experiments.process import Engine
from gpt2.experiments.space import Space
from gpt2.experiments.view import watched
from gpt2.tables import counted

FAILURES = 5
"""trials that fail one after another until no more is begun"""
LEFT_ALONE_S = 60.0
"""age of a trial without an owner: whoever asked for it has died in that moment"""
IDLE_S = 5.0
"""after which a study that needed no trial is asked again, if nothing happens before"""
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)
ENDED = ("finished", "pruned", "failed")
ENDING, RESULT, REASON, KEEPS = "ending", "result", "reason", "keeps_checkpoints"
"""what a trial keeps beside its parameters"""
ELSEWHERE = "elsewhere"
"""the ending of a trial that somebody else has told the study"""


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
    ranks: int = 1
    """GPUs of each trial, or processes on the CPU"""

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
    def is_shared(self) -> bool:
        """Whether other machines may have trials of the study."""
        return self.storage is not None


@dataclass
class Live:
    """A trial that runs, or is to run."""

    trial: Trial
    run: RunConfig
    losses: dict[int, float] = field(default_factory=dict)
    """validations so far, by their place"""
    ending: str = ""
    """why it is to end: pruned, patience, diverged, elsewhere"""
    is_over: bool = False


class Trials:
    """The source of the trainings; the only one that touches the study."""

    def __init__(
        self,
        study: Study,
        search: Search,
        ledger: Ledger,
        patiently: studies.Patience | None = None,
    ) -> None:
        self._study, self._search, self._ledger = study, search, ledger
        self.patiently = patiently or studies.Patience()
        self._id = members.id_of(search.folder)
        self._live: dict[str, Live] = {}
        self.failed_in_a_row = 0
        self._adopted = [item for item in self.all(TrialState.RUNNING) if self._is_mine(item)]
        self._idle_until = 0.0

    def all(self, *states: TrialState) -> list[FrozenTrial]:
        return self.patiently(lambda: self._study.get_trials(deepcopy=False, states=states or None))

    @property
    def done(self) -> int:
        return len(self.all(*COUNTED))

    @property
    def elsewhere(self) -> int:
        """Trials that other machines train."""
        owners = [item.user_attrs.get(OWNER, self._id) for item in self.all(TrialState.RUNNING)]
        return sum(owner != self._id for owner in owners)

    @property
    def ownerless(self) -> int:
        """Trials that another machine is about to begin, or was when it was killed."""
        running = self.all(TrialState.RUNNING)
        return sum(OWNER not in item.user_attrs and not self._is_mine(item) for item in running)

    @property
    def is_broken(self) -> bool:
        """Whether so many trials have failed that others would, too."""
        return self.failed_in_a_row >= FAILURES

    def next(self) -> Job | None:
        if time.monotonic() < self._idle_until:
            return None
        with studies.errors_explained(self._study):
            while found := self._adopt() or self._ask():
                with contextlib.suppress(UpdateFinishedTrialError):  # ended by somebody meanwhile
                    if job := self._begin(*found):
                        return job
        self._idle_until = time.monotonic() + IDLE_S
        return None

    def event(self, event: Event) -> Answer:
        if event.job is None:
            return "go"
        live = self._live[event.job.name]
        if event.kind in ENDED:
            self._idle_until = 0.0
        with studies.errors_explained(self._study):
            try:
                if event.kind == "reported":
                    return self._judge(live, event.metrics)
                if event.kind in ENDED:
                    self._end(live, event)
            except UpdateFinishedTrialError:
                return self._let_go(live, event)
        return "go"

    def shown(self, event: Event) -> Event:
        """The event as it is to be seen: as the study has it."""
        live = self._live.get(event.job.name) if event.job else None
        if event.job is None or live is None or event.kind not in ENDED:
            return event
        record = self._ledger.records[event.job.name]
        return replace(event, kind=record.state, reason=record.reason)

    def catch_up(self) -> None:
        """Does what an owner has left undone that died between the study and what follows."""
        mine = [item for item in self.all(*COUNTED, TrialState.FAIL) if self._is_mine(item)]
        for item in mine:
            if trials.name_of(item.number) not in self._ledger.records:
                self._enter(item, Record(trials.name_of(item.number), "failed", {}))
        ended = [item for item in mine if item.state in COUNTED]
        self._drop(item.number for item in ended if not item.user_attrs.get(KEEPS))

    def _is_mine(self, item: FrozenTrial) -> bool:
        return members.is_mine(item, self._id, self._search.is_shared)

    def _give_up_ownerless(self) -> None:
        """What nobody owns is told FAIL, so that it is replaced."""
        for item in self.all(TrialState.RUNNING):
            if OWNER in item.user_attrs or self._is_mine(item) or item.datetime_start is None:
                continue
            # It is local time where it began: hours away on a machine in another zone.
            if abs(time.time() - item.datetime_start.timestamp()) > LEFT_ALONE_S:
                self._tell(item.number, TrialState.FAIL)

    def _adopt(self) -> tuple[Trial, FrozenTrial] | None:
        """A trial that was left; not if less trials are wanted than when it began."""
        mine = sum(not live.is_over for live in self._live.values())
        if not self._adopted or self.is_broken or self.done + mine >= self._search.n_trials:
            return None
        left = self._adopted.pop(0)
        return self.patiently(lambda: Trial(self._study, left._trial_id)), left

    def _ask(self) -> tuple[Trial, None] | None:
        """A new trial, if one is missing."""
        wanted = self._search.n_trials
        self._give_up_ownerless()
        if self.is_broken or len(self.all(*COUNTED, TrialState.RUNNING)) >= wanted:
            return None
        trial = self.patiently(self._study.ask)
        with contextlib.suppress(UpdateFinishedTrialError):
            self._note(trial, OWNER, self._id)
        asked = self.all(*COUNTED, TrialState.RUNNING)
        if sum(item.number < trial.number for item in asked) < wanted:
            return trial, None
        # Another machine has asked for the last one at the same time.
        self._tell(trial.number, TrialState.FAIL)
        return None

    def _begin(self, trial: Trial, left: FrozenTrial | None) -> Job | None:
        """The job of a trial; of one that was left, with what is known of it. None if its values
        cannot be."""
        space, name = self._search.space, trials.name_of(trial.number)
        try:
            drawn = self.patiently(
                lambda: {item.name: judging.suggest(trial, item) for item in space}
            )
            run_config = spaces.fitted(self._search.run, space, drawn)
        except (ValueError, TypeError, ArithmeticError) as error:
            self._refuse(trial, f"its values cannot be: {error}")
            return None
        folder = self._search.folder / name
        if left is None and folder.exists() and any(folder.iterdir()):
            self._refuse(trial, f"{folder} is there already, and not of this trial; move it away")
            return None
        used = judging.values_of(run_config, space)
        for option, value in used.items():
            if value != drawn[option]:
                self._note(trial, f"{report.USED}{option}", value)
        known = dict(left.intermediate_values) if left else {}
        ending = left.user_attrs.get(ENDING, "") if left else ""
        self._live[name] = Live(trial, run_config, known, ending)
        return trials.job(trial.number, run_config, self._search.folder, used, self._search.ranks)

    def _refuse(self, trial: Trial, reason: str) -> None:
        """Tells that a trial has failed before it began. Whoever enqueues one with bad values says
        nothing about others."""
        self._note(trial, REASON, reason)
        told = self._tell(trial.number, TrialState.FAIL)
        self._enter(told, Record(trials.name_of(trial.number), "failed", {}))
        self.failed_in_a_row += "fixed_params" not in told.system_attrs
        self.patiently.say(f"FAILED {trials.name_of(trial.number)}: {reason}")

    def _judge(self, live: Live, metrics: Mapping[str, Any]) -> Answer:
        """What the trial is to do after a report: once it is to end, that stays so."""
        step = metrics.get("step", 0)
        if live.ending or "val_loss" not in metrics or step == 0:  # 0: nothing is learnt yet
            return "prune" if live.ending else "go"
        loss = metrics["val_loss"]
        place = judging.place_of(step, live.run, self._search.run)
        if loss is None or not math.isfinite(loss):
            return self._decide(live, "diverged")
        if place not in live.losses:  # it has gone back to a checkpoint before that
            self.patiently(lambda: live.trial.report(loss, place))
            live.losses[place] = loss
        if step >= metrics.get("total_steps", math.inf):
            return "go"
        if judging.is_exhausted(live.losses, self._search.patience):
            return self._decide(live, "patience")
        if self._search.prune and self.patiently(live.trial.should_prune):
            return self._decide(live, "pruned")
        return "go"

    def _decide(self, live: Live, ending: str) -> Answer:
        self._note(live.trial, ENDING, ending)
        live.ending = ending
        return "prune"

    def _end(self, live: Live, event: Event) -> None:
        """Tells the study, and only then the ledger: what the study knows is never done again."""
        result = dict(event.result or {})
        reason = event.reason or result.get("diverged", "")
        state, reason = judging.outcome(live.losses, live.ending, event.kind, reason)
        self._note(live.trial, RESULT, result)
        if reason:
            self._note(live.trial, REASON, reason)
        if self._search.keep_checkpoints:
            self._note(live.trial, KEEPS, True)
        value = min(live.losses.values()) if state == TrialState.COMPLETE else None
        told = self._tell(live.trial.number, state, value)
        live.is_over = True
        self._enter(told, Record.of(replace(event, kind="failed", reason=reason), {}))
        self.failed_in_a_row = self.failed_in_a_row + 1 if state == TrialState.FAIL else 0
        if state == TrialState.COMPLETE:
            with contextlib.suppress(OSError, ValueError):  # tried again at the end, which says so
                self.patiently(lambda: best.keep(self._study, self._search.folder))
        if state != TrialState.FAIL and not self._search.keep_checkpoints:
            self._drop([live.trial.number])

    def _let_go(self, live: Live, event: Event) -> Answer:
        """Somebody else has ended the trial in the study: its training ends, and what stands there
        is so."""
        name = trials.name_of(live.trial.number)
        if live.ending != ELSEWHERE:
            live.ending = ELSEWHERE
            self.patiently.say(f"{name} was ended in the study by somebody else")
        if event.kind in ENDED:
            live.is_over = True
            told = next(item for item in self.all() if item.number == live.trial.number)
            reason = "ended in the study by somebody else"
            self._enter(told, Record.of(replace(event, kind="failed", reason=reason), {}))
        return "prune"

    def _note(self, trial: Trial, name: str, value: Any) -> None:
        self.patiently(lambda: trial.set_user_attr(name, value))

    def _tell(self, number: int, state: TrialState, value: float | None = None) -> FrozenTrial:
        """The trial as the study has it then: as it is told, or as somebody has told before."""
        return self.patiently(lambda: self._study.tell(number, value, state, skip_if_finished=True))

    def _drop(self, numbers: Iterable[int]) -> None:
        """Removes the checkpoints of trials. Gigabytes take long, and others wait for answers."""
        folders = [self._search.folder / trials.name_of(number) for number in numbers]

        def drop() -> None:
            for folder in folders:
                with contextlib.suppress(OSError):  # somebody removes the folder just now
                    trials.drop_checkpoints(folder)

        threading.Thread(target=drop).start()

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


def run(search: Search, engine: Engine, limits: Limits, out: Console) -> int:
    """Runs the trials that are missing; the exit code: 1 if there are less than were asked for,
    128 and the signal's number if it was stopped."""
    training.require_data(search.run, search.ranks)
    with contextlib.ExitStack() as stack:
        opened = ledgers.opened(search.folder, search.about(), search.differences)
        ledger = stack.enter_context(opened)
        stack.enter_context(studies.errors_explained())
        study = studies.opened(search)
        stack.enter_context(studies.errors_explained(study))
        patiently = studies.Patience(lambda text: out.print(text, style="yellow", soft_wrap=True))
        source = Trials(study, search, ledger, patiently)
        source.catch_up()
        done = source.done
        _introduce(search, engine.slots, done, out)
        number = 0
        if done < search.n_trials:
            number = _run_pool(search, source, engine, limits, out, patiently)
        ledger.save(space=spaces.described(search.space))
        return conclusion.conclude(search, study, source, number, out)


def _run_pool(
    search: Search,
    source: Trials,
    engine: Engine,
    limits: Limits,
    out: Console,
    patiently: studies.Patience,
) -> int:
    log = search.log_dir / f"search_{time.strftime('%Y%m%d_%H%M%S')}.log"
    board = Board("search", search.n_trials, engine.slots, before=source.done)
    named: set[str] = set()
    with watched(board, search.folder, log=log, out=out) as on_event:

        def told(event: Event) -> None:
            on_event(source.shown(event))
            if event.kind in ENDED and search.is_shared:
                board.recount(source.done)  # others' trials count, too
            if event.kind == "started" and event.slot.name not in named and out.is_terminal:
                named.add(event.slot.name)  # elsewhere every start is a line
                out.print(f"  - worker {event.slot.name}: process {event.pid}, log {event.log}")

        log_of = worker_logs(search.log_dir)
        pool = Pool(engine, source, told, log_of=log_of, limits=limits)
        patiently.is_stopping = lambda: pool.is_asked_to_stop
        number = pool.run()
        if search.is_shared:
            board.recount(source.done)
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
