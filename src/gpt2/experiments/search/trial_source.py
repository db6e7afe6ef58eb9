"""The trials of an Optuna study as a source of jobs, run on all slots at once.

The study decides what has run. This process calls `ask` when a slot is free, `report` for each
validation, and `tell` when a trial has ended. A trial that a killed process left RUNNING continues
with its number, its folder and its checkpoint.

COMPLETE and PRUNED trials count towards `n_trials`. A trial that ends by `patience` is COMPLETE
with its best value; one that diverges is PRUNED, so that the sampler learns from both. A FAILED
trial is replaced, until MAX_FAILURES in a row show that the trials are not the cause.

Other processes may write to the study, too: a trial that they end there is ended here, and an
enqueued trial with invalid values is FAILED.
"""

import contextlib
import logging
import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from gpt2.base.errors import ConfigError, UserError
from gpt2.config.run import RunConfig
from gpt2.experiments.pool.job import Event, Job
from gpt2.experiments.results import JobResult, ResultsStore
from gpt2.experiments.search import best, outcome, ownership, space, study, trial, trial_report
from gpt2.experiments.search.ownership import OWNER
from gpt2.experiments.search.spec import Search
from gpt2.train.report import Answer

MAX_FAILURES = 5
"""failed trials in a row after which no more are started"""
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)
ENDED = ("finished", "pruned", "failed")
ENDING, RESULT, REASON, KEEPS_CHECKPOINTS = "ending", "result", "reason", "keeps_checkpoints"
"""attributes of a trial in the study"""
ENDED_IN_STUDY = "ended in the study"
"""the ending of a trial whose state another process has set in the study"""

logger = logging.getLogger(__name__)


@dataclass
class RunningTrial:
    """A trial whose job this process has created."""

    trial: Trial
    run: RunConfig
    losses: dict[int, float] = field(default_factory=dict)
    """validation losses so far by their reference step"""
    ending: str = ""
    """why the trial is to end: pruned, patience, diverged or ENDED_IN_STUDY"""
    is_over: bool = False


class TrialSource:
    """Gives the trials of a study to the scheduler; the only writer of the study here."""

    def __init__(
        self,
        optuna_study: Study,
        search: Search,
        store: ResultsStore,
        heartbeat: ownership.Heartbeat,
    ) -> None:
        self._study, self._search, self._store = optuna_study, search, store
        self._heartbeat = heartbeat
        self.retry = study.StorageRetry()
        self._folder_id = ownership.folder_id(search.folder)
        self._running: dict[str, RunningTrial] = {}
        self.failed_in_a_row = 0
        self._interrupted = self.trials_in_state(TrialState.RUNNING)
        self._needs_none = False  # more trials, until a job ends

    def trials_in_state(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials of the study in these states; all of them if none is given."""
        return self.retry(lambda: self._study.get_trials(deepcopy=False, states=states or None))

    @property
    def done(self) -> int:
        """Trials that count towards `n_trials`."""
        return len(self.trials_in_state(*COUNTED))

    @property
    def has_given_up(self) -> bool:
        """Whether so many trials have failed in a row that no more are started."""
        return self.failed_in_a_row >= MAX_FAILURES

    def next(self) -> Job | None:
        if self._needs_none:
            return None
        with study.storage_errors(self._study):
            while found := self._next_interrupted() or self._new_trial():
                with contextlib.suppress(UpdateFinishedTrialError):  # ended by another process
                    if job := self._start(*found):
                        return job
        self._needs_none = True
        return None

    def event(self, event: Event) -> Answer:
        with study.storage_errors(self._study):
            self.retry(self._heartbeat.beat)
            if event.job is None:
                return "go"
            running = self._running[event.job.name]
            try:
                if event.kind == "reported":
                    return self._answer(running, event.metrics)
                if event.kind in ENDED:
                    self._needs_none = False
                    self._end(running, event)
            except UpdateFinishedTrialError:
                return self._ended_in_study(running, event)
        return "go"

    def as_in_study(self, event: Event) -> Event:
        """The event with the outcome that the study has for the trial, for the live view."""
        running = self._running.get(event.job.name) if event.job else None
        if event.job is None or running is None or event.kind not in ENDED:
            return event
        result = self._store.results[event.job.name]
        return replace(event, kind=result.state, reason=result.reason)

    def catch_up(self) -> None:
        """Stores the results and drops the checkpoints of trials that have ended in the study, but
        whose process was killed before it did so."""
        ended = self.trials_in_state(*COUNTED, TrialState.FAIL)
        for item in ended:
            if trial.name_of(item.number) not in self._store.results:
                self._store_result(item, JobResult(trial.name_of(item.number), "failed", {}))
        counted = [item for item in ended if item.state in COUNTED]
        self._drop_checkpoints(
            item.number for item in counted if not item.user_attrs.get(KEEPS_CHECKPOINTS)
        )

    def _next_interrupted(self) -> tuple[Trial, FrozenTrial] | None:
        """A trial that an earlier start left RUNNING; None if fewer are requested now."""
        active = sum(not running.is_over for running in self._running.values())
        is_enough = self.done + active >= self._search.n_trials
        if not self._interrupted or self.has_given_up or is_enough:
            return None
        item = self._interrupted.pop(0)
        return self.retry(lambda: Trial(self._study, item._trial_id)), item

    def _new_trial(self) -> tuple[Trial, None] | None:
        """A new trial of the study, if one is missing."""
        known = self.trials_in_state(*COUNTED, TrialState.RUNNING)
        if self.has_given_up or len(known) >= self._search.n_trials:
            return None
        return self.retry(self._study.ask), None

    def _start(self, started: Trial, interrupted: FrozenTrial | None) -> Job | None:
        """The job of a trial, with what the study knows of an interrupted one.

        None if it cannot run: its values are invalid, or its folder holds other files.
        """
        search, name = self._search, trial.name_of(started.number)
        self._set_attribute(started, OWNER, self._folder_id)
        try:
            drawn = self._suggest_all(started)
            run_config = space.apply(search.run, search.space, drawn)
        except UserError as error:
            self._reject(started, f"invalid values: {error}")
            return None
        folder = search.folder / name
        if interrupted is None and folder.exists() and any(folder.iterdir()):
            self._reject(started, f"{folder} exists and is not of this trial; move it away")
            return None
        used = outcome.option_values(run_config, search.space)
        for option, value in used.items():
            if value != drawn[option]:
                self._set_attribute(started, f"{trial_report.USED}{option}", value)
        losses = dict(interrupted.intermediate_values) if interrupted else {}
        ending = interrupted.user_attrs.get(ENDING, "") if interrupted else ""
        self._running[name] = RunningTrial(started, run_config, losses, ending)
        return trial.job(started.number, run_config, search.folder, used, search.ranks)

    def _suggest_all(self, started: Trial) -> dict[str, Any]:
        """The trial's value of each option; raises ConfigError for enqueued ones of other types."""
        try:
            return self.retry(
                lambda: {item.name: outcome.suggest(started, item) for item in self._search.space}
            )
        except (ValueError, OverflowError) as error:
            raise ConfigError(str(error)) from error

    def _reject(self, rejected: Trial, reason: str) -> None:
        """Fails a trial that cannot run. An enqueued one does not count as failed in a row."""
        name = trial.name_of(rejected.number)
        self._set_attribute(rejected, REASON, reason)
        item = self._tell(rejected.number, TrialState.FAIL)
        self._store_result(item, JobResult(name, "failed", {}))
        self.failed_in_a_row += "fixed_params" not in item.system_attrs
        logger.warning("%s failed: %s", name, reason)

    def _answer(self, running: RunningTrial, metrics: Mapping[str, Any]) -> Answer:
        """The answer to a report of the trial; once it is "prune", it stays so."""
        step = metrics.get("step", 0)
        if running.ending or "val_loss" not in metrics or step == 0:  # step 0 is untrained
            return "prune" if running.ending else "go"
        loss = metrics["val_loss"]
        if loss is None or not math.isfinite(loss):
            return self._set_ending(running, "diverged")
        reference = outcome.reference_step(step, running.run, self._search.run)
        if reference not in running.losses:  # known if it continues from an earlier checkpoint
            self.retry(lambda: running.trial.report(loss, reference))
            running.losses[reference] = loss
        if step >= metrics.get("total_steps", math.inf):
            return "go"
        if outcome.is_patience_exhausted(running.losses, self._search.patience):
            return self._set_ending(running, "patience")
        if self._search.prune and self.retry(running.trial.should_prune):
            return self._set_ending(running, "pruned")
        return "go"

    def _set_ending(self, running: RunningTrial, ending: str) -> Answer:
        self._set_attribute(running.trial, ENDING, ending)
        running.ending = ending
        return "prune"

    def _end(self, running: RunningTrial, event: Event) -> None:
        """Tells the study how the trial ended, and only then stores its result: what the study
        knows never runs again."""
        result = dict(event.result or {})
        reason = event.reason or result.get("diverged", "")
        state, reason = outcome.trial_outcome(running.losses, running.ending, event.kind, reason)
        self._set_attribute(running.trial, RESULT, result)
        if reason:
            self._set_attribute(running.trial, REASON, reason)
        if self._search.keep_checkpoints:
            self._set_attribute(running.trial, KEEPS_CHECKPOINTS, True)
        value = min(running.losses.values()) if state == TrialState.COMPLETE else None
        item = self._tell(running.trial.number, state, value)
        running.is_over = True
        self._store_result(item, _failed(event, reason))
        self.failed_in_a_row = self.failed_in_a_row + 1 if state == TrialState.FAIL else 0
        if state == TrialState.COMPLETE:
            # The summary tries this again at the end, and reports the error.
            with contextlib.suppress(OSError, UserError):
                self.retry(lambda: best.export(self._study, self._search.folder))
        if state != TrialState.FAIL and not self._search.keep_checkpoints:
            self._drop_checkpoints([running.trial.number])

    def _ended_in_study(self, running: RunningTrial, event: Event) -> Answer:
        """Ends the training of a trial that another process has ended in the study, and stores the
        outcome that it has there."""
        number = running.trial.number
        if running.ending != ENDED_IN_STUDY:
            running.ending = ENDED_IN_STUDY
            logger.warning("%s was ended in the study by another process", trial.name_of(number))
        if event.kind in ENDED:
            running.is_over = True
            item = next(item for item in self.trials_in_state() if item.number == number)
            self._store_result(item, _failed(event, "ended in the study by another process"))
        return "prune"

    def _set_attribute(self, target: Trial, name: str, value: Any) -> None:
        self.retry(lambda: target.set_user_attr(name, value))

    def _tell(self, number: int, state: TrialState, value: float | None = None) -> FrozenTrial:
        """Sets the state of a trial that has none yet; the trial as the study has it now."""
        return self.retry(lambda: self._study.tell(number, value, state, skip_if_finished=True))

    def _drop_checkpoints(self, numbers: Iterable[int]) -> None:
        """Removes the checkpoints of trials in a thread, as other trials wait for answers."""
        folders = [self._search.folder / trial.name_of(number) for number in numbers]

        def drop() -> None:
            for folder in folders:
                with contextlib.suppress(OSError):  # the user may remove the folder, too
                    trial.drop_checkpoints(folder)

        threading.Thread(target=drop).start()

    def _store_result(self, item: FrozenTrial, result: JobResult) -> None:
        """Stores `result` with the state, the values and the losses that the study has."""
        names = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned"}
        name: Any = names.get(item.state, "failed")
        returned = {"val_loss": trial_report.lowest_loss(item), **item.user_attrs.get(RESULT, {})}
        if name == "finished":
            returned["val_loss"] = item.value
        self._store.add(
            replace(
                result,
                state=name,
                values=trial_report.used_values(item),
                result=returned,
                reason=item.user_attrs.get(REASON, result.reason),
            )
        )


def _failed(event: Event, reason: str) -> JobResult:
    """The result of the event's job as failed; `_store_result` sets the state of the study."""
    return JobResult.from_event(replace(event, kind="failed", reason=reason), {})
