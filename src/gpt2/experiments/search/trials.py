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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from gpt2.base.errors import UserError
from gpt2.config.run import RunConfig
from gpt2.experiments.pool.job import Event, Job
from gpt2.experiments.results import JobResult, ResultsStore
from gpt2.experiments.search import best, outcome, ownership, report
from gpt2.experiments.search import space as spaces
from gpt2.experiments.search import study as studies
from gpt2.experiments.search import trial as trials
from gpt2.experiments.search.ownership import OWNER
from gpt2.experiments.search.spec import Search
from gpt2.train.report import Answer

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
        store: ResultsStore,
        patiently: studies.Patience | None = None,
    ) -> None:
        self._study, self._search, self._store = study, search, store
        self.patiently = patiently or studies.Patience()
        self._id = ownership.id_of(search.folder)
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
        record = self._store.results[event.job.name]
        return replace(event, kind=record.state, reason=record.reason)

    def catch_up(self) -> None:
        """Does what an owner has left undone that died between the study and what follows."""
        mine = [item for item in self.all(*COUNTED, TrialState.FAIL) if self._is_mine(item)]
        for item in mine:
            if trials.name_of(item.number) not in self._store.results:
                self._enter(item, JobResult(trials.name_of(item.number), "failed", {}))
        ended = [item for item in mine if item.state in COUNTED]
        self._drop(item.number for item in ended if not item.user_attrs.get(KEEPS))

    def _is_mine(self, item: FrozenTrial) -> bool:
        return ownership.is_mine(item, self._id, self._search.is_shared)

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
                lambda: {item.name: outcome.suggest(trial, item) for item in space}
            )
            run_config = spaces.fitted(self._search.run, space, drawn)
        except (UserError, ValueError, TypeError, ArithmeticError) as error:
            self._refuse(trial, f"its values cannot be: {error}")
            return None
        folder = self._search.folder / name
        if left is None and folder.exists() and any(folder.iterdir()):
            self._refuse(trial, f"{folder} is there already, and not of this trial; move it away")
            return None
        used = outcome.values_of(run_config, space)
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
        self._enter(told, JobResult(trials.name_of(trial.number), "failed", {}))
        self.failed_in_a_row += "fixed_params" not in told.system_attrs
        self.patiently.say(f"FAILED {trials.name_of(trial.number)}: {reason}")

    def _judge(self, live: Live, metrics: Mapping[str, Any]) -> Answer:
        """What the trial is to do after a report: once it is to end, that stays so."""
        step = metrics.get("step", 0)
        if live.ending or "val_loss" not in metrics or step == 0:  # 0: nothing is learnt yet
            return "prune" if live.ending else "go"
        loss = metrics["val_loss"]
        place = outcome.place_of(step, live.run, self._search.run)
        if loss is None or not math.isfinite(loss):
            return self._decide(live, "diverged")
        if place not in live.losses:  # it has gone back to a checkpoint before that
            self.patiently(lambda: live.trial.report(loss, place))
            live.losses[place] = loss
        if step >= metrics.get("total_steps", math.inf):
            return "go"
        if outcome.is_exhausted(live.losses, self._search.patience):
            return self._decide(live, "patience")
        if self._search.prune and self.patiently(live.trial.should_prune):
            return self._decide(live, "pruned")
        return "go"

    def _decide(self, live: Live, ending: str) -> Answer:
        self._note(live.trial, ENDING, ending)
        live.ending = ending
        return "prune"

    def _end(self, live: Live, event: Event) -> None:
        """Tells the study, and only then the store: what the study knows is never done again."""
        result = dict(event.result or {})
        reason = event.reason or result.get("diverged", "")
        state, reason = outcome.outcome(live.losses, live.ending, event.kind, reason)
        self._note(live.trial, RESULT, result)
        if reason:
            self._note(live.trial, REASON, reason)
        if self._search.keep_checkpoints:
            self._note(live.trial, KEEPS, True)
        value = min(live.losses.values()) if state == TrialState.COMPLETE else None
        told = self._tell(live.trial.number, state, value)
        live.is_over = True
        self._enter(told, JobResult.from_event(replace(event, kind="failed", reason=reason), {}))
        self.failed_in_a_row = self.failed_in_a_row + 1 if state == TrialState.FAIL else 0
        if state == TrialState.COMPLETE:
            # Tried again at the end, which reports the error.
            with contextlib.suppress(OSError, ValueError, UserError):
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
            self._enter(
                told, JobResult.from_event(replace(event, kind="failed", reason=reason), {})
            )
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

    def _enter(self, item: FrozenTrial, record: JobResult) -> None:
        """The trial as the results store keeps it: `record` with what the study knows."""
        states = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned"}
        state: Any = states.get(item.state, "failed")
        losses = list(item.intermediate_values.values())
        result = {"val_loss": min(losses, default=None), **item.user_attrs.get(RESULT, {})}
        result |= {"val_loss": item.value if state == "finished" else result["val_loss"]}
        values = report.used(item)
        reason = item.user_attrs.get(REASON, record.reason)
        self._store.add(replace(record, state=state, values=values, result=result, reason=reason))
