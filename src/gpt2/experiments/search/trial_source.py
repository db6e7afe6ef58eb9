"""The trials of an Optuna study as a source of jobs, run on all slots at once.

The study decides what has run. This process calls `ask` when a slot is free, `report` for each
validation, and `tell` when a trial has ended. A trial that a killed process left RUNNING continues
with its number, its folder and its checkpoint.

COMPLETE and PRUNED trials count towards `n_trials`. A trial that ends by `patience` is COMPLETE
with its best value; one that diverges is PRUNED, so that the sampler learns from both. A FAILED
trial is replaced, until MAX_FAILURES in a row show that the trials are not the cause. A person may
end a trial in the study, with Optuna's dashboard: it keeps that state, and its training ends.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from gpt2.base import retry
from gpt2.base.errors import UserError
from gpt2.base.text import brief
from gpt2.config import options
from gpt2.experiments.pool.job import Event, Job
from gpt2.experiments.results import JobResult, ResultsStore
from gpt2.experiments.search import best, space, study, trial, trial_report
from gpt2.experiments.search.spec import Search
from gpt2.experiments.search.study import ENDING, REASON, RESULT
from gpt2.train.report import Answer

MAX_FAILURES = 5
"""failed trials in a row after which no more are started"""
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)
ENDED = ("finished", "pruned", "failed")
BY_OTHERS = "ended in the study by another process"

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass
class RunningTrial:
    """A trial whose job this process has created."""

    trial: Trial
    eval_interval: int | None
    losses: dict[int, float]
    """validation losses so far, by the step of the search's own options at the same tokens"""
    ending: str = ""
    """why the trial is to end: pruned, patience or diverged"""


class TrialSource:
    """Gives the trials of a study to the scheduler; the only writer of the study here.

    While the database is unreachable, `next` and `event` are called again as a whole: they do what
    is left to do, as another process would after a kill.
    """

    def __init__(
        self,
        optuna_study: Study,
        search: Search,
        store: ResultsStore,
        heartbeat: study.Heartbeat,
        make_job: Callable[..., Job] = trial.job,
    ) -> None:
        self._study, self._search, self._store = optuna_study, search, store
        self._heartbeat, self._make_job = heartbeat, make_job
        self.pauses_s = study.PAUSES_S
        self.is_stopping: Callable[[], bool] = lambda: False
        """whether the search is to end, so that retrying ends, too"""
        self._running: dict[str, RunningTrial] = {}
        self.failed_in_a_row = 0
        self._needs_none = False  # more trials, until a job ends

    def retry(self, action: Callable[[], T]) -> T:
        """What `action` returns, which is called again while the database is unreachable.

        Raises TrainingError if the outage lasts too long, or if the study was deleted.
        """
        with study.storage_errors():
            return retry.call(
                action, self.pauses_s, study.is_outage, study.log_outage, self.is_stopping
            )

    @property
    def done(self) -> int:
        """Trials that count towards `n_trials`."""
        return len(self.retry(lambda: self._trials(*COUNTED)))

    @property
    def has_given_up(self) -> bool:
        """Whether so many trials have failed in a row that no more are started."""
        return self.failed_in_a_row >= MAX_FAILURES

    def next(self) -> Job | None:
        return self.retry(self._next)

    def event(self, event: Event) -> Answer:
        return self.retry(lambda: self._event(event))

    def as_in_study(self, event: Event) -> Event:
        """The event with the outcome that the study has for the trial, for the live view."""
        if event.job is None or event.kind not in ENDED:
            return event
        result = self._store.results[event.job.name]
        return replace(event, kind=result.state, reason=result.reason)

    def catch_up(self) -> None:
        """Does what is left to do for trials that have ended in the study, if their process was
        killed right then."""
        for item in self.retry(lambda: self._trials(*COUNTED, TrialState.FAIL)):
            if trial.name_of(item.number) not in self._store.results:
                self._clear_and_store(item)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials of the study in these states; all of them if none is given."""
        return self._study.get_trials(deepcopy=False, states=states or None)

    def _next(self) -> Job | None:
        while not self._needs_none:
            if (found := self._next_trial()) is None:
                self._needs_none = True
            elif job := self._start(found):
                return job
        return None

    def _next_trial(self) -> Trial | None:
        """A RUNNING trial that does not run here, else a new one; None if none is needed."""
        begun = len(self._trials(*COUNTED)) + len(self._running)
        if self.has_given_up or begun >= self._search.n_trials:
            return None
        for item in self._trials(TrialState.RUNNING):
            if trial.name_of(item.number) not in self._running:
                return Trial(self._study, item._trial_id)
        return self._study.ask()

    def _start(self, started: Trial) -> Job | None:
        """The job of a trial, with what the study knows of it if it was interrupted.

        None if it cannot run: its values are invalid, or its folder holds other files.
        """
        search, name = self._search, trial.name_of(started.number)
        item, folder = self._trials()[started.number], search.folder / name
        is_new = study.TRIAL_FOLDER not in item.user_attrs
        if is_new and folder.exists() and any(folder.iterdir()):
            self._reject(started, f"{folder} exists and is not of this trial; move it away")
            return None
        try:
            drawn = space.suggest(started, search.space)
            run_config = space.apply(search.run, search.space, drawn)
        except (UserError, ValueError, OverflowError) as error:
            self._reject(started, f"invalid values: {error}")
            return None
        plain = run_config.to_dict()
        used = {name: plain[options.locate(name)[0]][name] for name in drawn}
        for option, value in used.items():
            if value != drawn[option]:
                started.set_user_attr(space.USED + option, value)
        started.set_user_attr(study.TRIAL_FOLDER, study.folder_id(search.folder))
        self._running[name] = RunningTrial(
            started,
            run_config.evaluation.eval_interval,
            dict(item.intermediate_values),
            item.user_attrs.get(ENDING, ""),
        )
        return self._make_job(started.number, run_config, search.folder, used, search.ranks)

    def _reject(self, rejected: Trial, reason: str) -> None:
        """Fails a trial that cannot run. An enqueued one does not count as failed in a row."""
        item = self._conclude(rejected, TrialState.FAIL, brief(reason, "what the search printed"))
        self.failed_in_a_row += "fixed_params" not in item.system_attrs
        logger.warning("%s failed: %s", trial.name_of(item.number), reason)

    def _event(self, event: Event) -> Answer:
        self._heartbeat.beat()
        if event.job is None:
            return "go"
        if event.kind == "reported":
            return self._answer(self._running[event.job.name], event.metrics)
        if event.kind in ENDED:
            self._end(self._running[event.job.name], event)
            del self._running[event.job.name]
            self._needs_none = False
        return "go"

    def _answer(self, running: RunningTrial, metrics: Mapping[str, Any]) -> Answer:
        """The answer to a report of the trial; once it is "prune", it stays so."""
        is_validation = "val_loss" in metrics and metrics.get("step", 0) > 0  # 0 is untrained
        if is_validation and not running.ending:
            try:
                if ending := self._ending(running, metrics):
                    running.trial.set_user_attr(ENDING, ending)
            except UpdateFinishedTrialError:  # ended in the study by a person
                ending = "pruned"
            running.ending = ending
        return "prune" if running.ending else "go"

    def _ending(self, running: RunningTrial, metrics: Mapping[str, Any]) -> str:
        """Tells the study the loss of a validation; why the trial is to end now, or nothing."""
        step, loss = metrics["step"], metrics["val_loss"]
        if loss is None or not math.isfinite(loss):
            return "diverged"
        interval, reference = running.eval_interval, self._search.run.evaluation.eval_interval
        assert interval is not None and reference is not None
        # Trials with other batch sizes are compared after the same number of tokens.
        compared_at = -(-step // interval) * reference
        if compared_at not in running.losses:  # known if it continues from an earlier checkpoint
            running.trial.report(loss, compared_at)
            running.losses[compared_at] = loss
        if step >= metrics.get("total_steps", math.inf):
            return ""
        if is_patience_exhausted(running.losses, self._search.patience):
            return "patience"
        return "pruned" if self._search.prune and running.trial.should_prune() else ""

    def _end(self, running: RunningTrial, event: Event) -> None:
        reason = event.reason or brief((event.result or {}).get("diverged", ""), event.log)
        state, reason = trial_outcome(running.losses, running.ending, event.kind, reason)
        value = min(running.losses.values()) if state == TrialState.COMPLETE else None
        item = self._conclude(running.trial, state, reason, value, event)
        if item.state != state:
            logger.warning("%s was %s", trial.name_of(item.number), BY_OTHERS)
        self.failed_in_a_row = self.failed_in_a_row + 1 if item.state == TrialState.FAIL else 0

    def _conclude(
        self,
        ended: Trial,
        state: TrialState,
        reason: str,
        value: float | None = None,
        event: Event | None = None,
    ) -> FrozenTrial:
        """Ends a trial in the study, unless it has ended there, and only then stores its result:
        what the study knows never runs again. Returns the trial as the study has it."""
        with contextlib.suppress(UpdateFinishedTrialError):
            ended.set_user_attr(RESULT, dict(event.result or {}) if event else {})
            ended.set_user_attr(REASON, reason)
        item = self._study.tell(ended.number, value, state, skip_if_finished=True)
        if item.state == TrialState.COMPLETE:
            # The summary tries this again at the end, and reports the error.
            with contextlib.suppress(OSError, UserError):
                best.export(self._trials(), self._search.folder)
        self._clear_and_store(item, event)
        return item

    def _clear_and_store(self, item: FrozenTrial, event: Event | None = None) -> None:
        """Removes the checkpoints of a trial, and stores its result as the study has it; `event` is
        the end of its job."""
        name = trial.name_of(item.number)
        if item.state in COUNTED and not self._search.keep_checkpoints:
            trial.drop_checkpoints(self._search.folder / name)
        ended = JobResult.from_event(event, {}) if event else JobResult(name, "failed", {})
        state, values = trial_report.OUTCOMES[item.state.name], space.used_values(item)
        reason = "" if state == "finished" else item.user_attrs.get(REASON, BY_OTHERS)
        result = item.user_attrs.get(RESULT, {}) | {"val_loss": trial_report.loss_of(item)}
        self._store.add(replace(ended, state=state, values=values, result=result, reason=reason))


def is_patience_exhausted(losses: Mapping[int, float], patience: int | None) -> bool:
    """Whether none of the last `patience` validations has a lower loss than one before them."""
    ordered = [losses[step] for step in sorted(losses)]
    if patience is None or len(ordered) <= patience:
        return False
    return min(ordered[-patience:]) >= min(ordered[:-patience])


def trial_outcome(
    losses: Mapping[int, float], ending: str, kind: str, reason: str
) -> tuple[TrialState, str]:
    """The state of an ended trial in the study, and the reason if it is not COMPLETE.

    `ending` is the search's decision to end it, `kind` the event with which its job ended.
    """
    if kind == "failed":
        return TrialState.FAIL, reason
    if reason or ending == "diverged":
        return TrialState.PRUNED, reason or "its validation loss is NaN or infinite"
    if kind == "pruned" and ending == "pruned":
        return TrialState.PRUNED, ""
    if not losses:
        return TrialState.FAIL, "it ended without a validation; use a smaller --eval_interval"
    return TrialState.COMPLETE, ""
