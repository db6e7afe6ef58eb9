"""The scheduler: gives the jobs of a source to worker processes, one at a time per slot.

It runs in the owner, the process of the command. `Scheduler.run` starts workers through the engine,
sends them jobs and answers their reports; all that happens to them arrives in one inbox. A worker
that dies, hangs, runs out of memory or raises costs its own job only.
"""

import contextlib
import itertools
import math
import queue
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2.base.errors import TrainingError
from gpt2.base.text import brief
from gpt2.distributed.signals import StopRequest
from gpt2.experiments.pool import worker
from gpt2.experiments.pool.job import Event, EventKind, Job, JobSource, Slot
from gpt2.experiments.pool.messages import (
    JobEnded,
    JobPhase,
    JobReported,
    Phase,
    Reply,
    WorkerEnded,
)
from gpt2.experiments.pool.process import Engine, Inbox, Worker
from gpt2.train.report import Answer

POLL_S = 0.2
"""how soon a signal and a timeout are noticed"""
WAITING_EVENT_S = 5.0
"""how often the source gets a `waiting` event while nothing happens"""
STACK_S = 1.0
"""for a worker that hangs, to write its stacks before it is killed"""
LOADING_S = 120.0
"""for a worker to import the job's function, in addition to --job_timeout"""
IDLE_EXIT_S = 10.0
"""for a worker without a job to end by itself"""
LOSSES_OF_BAD_SLOT = 3
"""workers lost in a row, while other slots make progress, that take a slot out of service"""


@dataclass(frozen=True)
class Limits:
    """What a job may cost."""

    retries: int = 1
    """more attempts for a job whose worker died, hung or ran out of memory"""
    job_timeout: float | None = None
    """seconds without a report after which a job counts as hanging; None waits for ever"""
    grace: float = 60.0
    """seconds that jobs have to save and end after Ctrl+C"""


@dataclass
class _Attempt:
    """A job that waits for a slot, or that a worker has. All times are monotonic."""

    job: Job
    number: int = 1
    lost_on: int | None = None
    """index of the slot that lost the attempt before: another slot may be better"""
    phase: Phase = "waiting"
    started_at: float = 0.0
    last_message_at: float = 0.0


@dataclass
class _ManagedSlot:
    """A slot with its worker, and the attempt at a job that this makes."""

    spec: Slot
    worker: Worker | None = None
    attempt: _Attempt | None = None
    kill_at: float | None = None
    """when the worker is killed, unless it has ended"""
    kill_reason: str = ""
    in_service: bool = True
    loss_times: list[float] = field(default_factory=list)
    """when it lost workers, since its last result"""
    last_progress: float = 0.0
    """when it last had a report or a result"""

    @property
    def is_idle(self) -> bool:
        """Whether it has neither a job nor a worker that is about to end."""
        return self.attempt is None and self.kill_at is None

    def kill_after(self, seconds: float, reason: str = "") -> None:
        self.kill_at = time.monotonic() + seconds
        self.kill_reason = self.kill_reason or reason


class Scheduler:
    """Runs the jobs of `source` on an engine's slots, until none is left or a signal stops it.

    `on_event` receives what `source` does, and the events of the pool itself; it only shows them.
    `log_of` names the log of a worker on a slot by the job that it is started for; by default each
    slot has one log.
    """

    def __init__(
        self,
        engine: Engine,
        source: JobSource,
        on_event: Callable[[Event], None],
        *,
        log_of: Callable[[Slot, Job], Path] | None = None,
        limits: Limits = Limits(),
    ) -> None:
        worker.require_not_importing()
        self._engine, self._slots = engine, [_ManagedSlot(slot) for slot in engine.slots]
        self._source, self._on_event = source, on_event
        self._log_of, self._limits = log_of or worker_logs(Path("logs")), limits
        self._inbox: Inbox = queue.SimpleQueue()
        self._waiting: list[_Attempt] = []
        self._stopping = False
        self._is_broken = False
        """whether the source, or another part of the owner, has raised an error"""
        self._stop = StopRequest()
        self._last_event_at = time.monotonic()

    @property
    def stop_requested(self) -> bool:
        """Whether a signal has arrived; a source that waits for something gives up then."""
        return self._stop.number != 0

    def run(self) -> int:
        """The number of the signal that stopped it, or 0 when every job has ended.

        The first Ctrl+C requests every job to stop: trainings save. A second one kills them, and so
        does the end of `Limits.grace`. Jobs also stop and save if the source raises an error.
        """
        with self._stop as stop:
            try:
                while self._give_jobs():
                    self._handle_messages()
                    if stop.number and not self._stopping:
                        self._begin_stop("again" if stop.number == signal.SIGINT else "twice")
                return stop.number
            except KeyboardInterrupt:
                return stop.number or signal.SIGINT
            except BaseException:
                self._is_broken = True
                self._begin_stop("twice")
                while any(slot.attempt for slot in self._slots):
                    self._handle_messages()
                raise
            finally:
                self._end_workers()

    def _begin_stop(self, more: str) -> None:
        self._stopping = True
        grace = self._limits.grace
        for slot in self._slots:
            if slot.worker and slot.attempt:
                slot.worker.signal(signal.SIGTERM)
                slot.kill_after(grace)
        reason = f"every job saves and ends, {grace:g} s at most; Ctrl+C {more} ends at once"
        self._show(Event("stopping", self._slots[0].spec, reason=reason))

    def _give_jobs(self) -> bool:
        """Gives jobs to free slots, and lets workers end for which there is none now; whether any
        worker is left."""
        is_ending = self._stopping or self.stop_requested
        for slot in self._slots:
            if not slot.is_idle:
                continue
            attempt = self._next_for(slot) if slot.in_service and not is_ending else None
            if slot.worker and (attempt is None or attempt.job.own_process):
                if attempt:
                    self._waiting.insert(0, attempt)
                slot.worker.send(None)
                slot.kill_after(IDLE_EXIT_S)
            elif attempt:
                self._start(slot, attempt)
        return any(slot.worker for slot in self._slots)

    # Jobs to slots

    def _next_for(self, slot: _ManagedSlot) -> _Attempt | None:
        """A waiting job that may run on this slot, else the source's next one, else a job that was
        lost here, unless another slot can take that."""
        here = slot.spec.index
        serving = [other.spec.index for other in self._slots if other.in_service]

        def may_run(attempt: _Attempt) -> bool:
            return attempt.job.slot == here or attempt.job.slot not in serving

        waiting = [attempt for attempt in self._waiting if may_run(attempt)]
        chosen = next((attempt for attempt in waiting if attempt.lost_on != here), None)
        while chosen is None and (job := self._source.next()):
            if may_run(attempt := _Attempt(job)):
                return attempt
            self._waiting.append(attempt)
        free = [other for other in self._slots if other.in_service and other.is_idle]
        lost_here = (item for item in waiting if item.job.slot == here or free == [slot])
        chosen = chosen or next(lost_here, None)
        if chosen:
            self._waiting.remove(chosen)
        return chosen

    def _start(self, slot: _ManagedSlot, attempt: _Attempt) -> None:
        """Sends the job to the slot's worker, or to a new one."""
        job = attempt.job
        if slot.worker is None:
            log = self._log_of(slot.spec, job)
            try:
                slot.worker = self._engine.start_worker(slot.spec, log, self._inbox)
            except OSError as error:
                raise TrainingError(
                    f"cannot start a worker for {job.name}: {error}; run the same command to "
                    "continue"
                ) from error
        slot.attempt, slot.kill_reason = attempt, ""
        attempt.started_at = time.monotonic()
        slot.worker.send(job)

    # What workers send, and how they end

    def _handle_messages(self) -> None:
        """Waits for a message, POLL_S at most, and handles all that have arrived; then enforces the
        deadlines."""
        received = []
        with contextlib.suppress(queue.Empty):
            received.append(self._inbox.get(timeout=POLL_S))
        now = time.monotonic()
        # One at a time: those after a KeyboardInterrupt are left for `_end_workers`.
        others = (self._inbox.get() for _ in range(self._inbox.qsize()))
        for sender, message in itertools.chain(received, others):
            slot = next(slot for slot in self._slots if slot.worker is sender)
            if isinstance(message, WorkerEnded):
                self._on_death(slot, message)
            else:
                self._on_message(slot, message)
        if now > self._last_event_at + WAITING_EVENT_S:
            self._tell_source(Event("waiting", self._slots[0].spec))
        # As of `now`: the source may have taken long, while messages waited that show progress.
        self._enforce_deadlines(now)

    def _on_message(self, slot: _ManagedSlot, message: JobPhase | JobReported | JobEnded) -> None:
        attempt, sender = slot.attempt, slot.worker
        assert attempt is not None and sender is not None
        match message:
            case JobPhase(phase):
                attempt.phase = phase
                if phase == "loading":
                    attempt.started_at = time.monotonic()
                    self._notify(slot, attempt, "started")
            case JobReported(metrics):
                slot.last_progress = time.monotonic()
                answer: Answer = "stop"
                try:
                    answer = self._notify(slot, attempt, "reported", metrics=metrics)
                finally:
                    sender.send(Reply("stop" if self._stopping else answer))
            case JobEnded():
                slot.attempt = slot.kill_at = None
                if message.takes_no_more:
                    slot.kill_after(IDLE_EXIT_S)
                self._on_end(slot, attempt, message)
        attempt.last_message_at = time.monotonic()

    def _on_end(self, slot: _ManagedSlot, attempt: _Attempt, ended: JobEnded) -> None:
        """A job that was lost runs again, a training from its newest checkpoint; or it has failed,
        if it was lost too often."""
        kind: EventKind = "failed"
        reason, is_lost = ended.reason, ended.state in ("lost", "stopped")
        if ended.state == "finished" or ended.state == "pruned":
            kind = ended.state
            slot.loss_times, slot.last_progress = [], time.monotonic()
        elif is_lost and self._stopping:
            kind, reason = "stopped", slot.kill_reason or reason
        elif is_lost:
            unasked = "its worker got a stop signal that this command did not send"
            reason = slot.kill_reason or reason or unasked
            if attempt.number <= self._limits.retries:
                kind = "retried"
                self._waiting.append(_Attempt(attempt.job, attempt.number + 1, slot.spec.index))
        values = {"result": ended.result, "reason": reason, "traceback": ended.traceback}
        self._notify(slot, attempt, kind, **values)
        if ended.is_device_error or (is_lost and not self._stopping):
            self._count_loss(slot)

    def _on_death(self, slot: _ManagedSlot, ended: WorkerEnded) -> None:
        """The slot has no worker any more."""
        attempt, slot.attempt = slot.attempt, None
        try:
            if ended.lost == "script" and not self._stopping:
                raise TrainingError(ended.reason)
            if ended.lost == "engine" and not self._stopping:
                raise TrainingError(f"{ended.reason}; run the same command to continue")
            if ended.lost == "slot":
                self._take_out_of_service(slot, ended.reason)
            if attempt:
                self._on_end(slot, attempt, JobEnded("lost", reason=ended.reason))
        finally:  # also after KeyboardInterrupt: this message does not come again
            slot.worker, slot.kill_at, slot.kill_reason = None, None, ""

    # Deadlines, bad slots, and the end of workers

    def _enforce_deadlines(self, now: float) -> None:
        timeout = self._limits.job_timeout
        for slot in self._slots:
            attempt = slot.attempt
            if slot.worker is None:
                continue
            if slot.kill_at is not None:
                if now > slot.kill_at:
                    grace = self._limits.grace
                    slot.kill_after(math.inf, f"it did not end within {grace:g} s (--grace)")
                    slot.worker.signal(signal.SIGKILL)
            elif timeout and attempt and attempt.phase != "waiting":
                loading_s = LOADING_S if attempt.phase == "loading" else 0.0
                if now > attempt.last_message_at + timeout + loading_s:
                    slot.kill_after(STACK_S, f"no report for {timeout:g} s (--job_timeout)")
                    slot.worker.signal(worker.SHOW_STACK)

    def _count_loss(self, slot: _ManagedSlot) -> None:
        """Takes a slot out of service that loses one worker after another while others do not."""
        slot.loss_times.append(time.monotonic())
        if len(slot.loss_times) < LOSSES_OF_BAD_SLOT:
            return
        since = slot.loss_times[-LOSSES_OF_BAD_SLOT]
        others = [other for other in self._slots if other is not slot and other.in_service]
        all_good = all(not other.loss_times or other.loss_times[-1] < since for other in others)
        if all_good and any(other.last_progress > since for other in others):
            reason = f"{LOSSES_OF_BAD_SLOT} workers lost in a row, while other slots make progress"
            self._take_out_of_service(slot, reason)

    def _take_out_of_service(self, slot: _ManagedSlot, reason: str) -> None:
        slot.in_service = False
        self._show(Event("slot_lost", slot.spec, reason=reason))

    def _end_workers(self) -> None:
        """Kills those that are left; returns when none is."""
        self._stopping = True
        for slot in self._slots:
            if slot.attempt:
                slot.kill_after(0.0, "its owner has ended")
        while self._give_jobs():
            self._handle_messages()

    # Events

    def _notify(
        self,
        slot: _ManagedSlot,
        attempt: _Attempt,
        kind: EventKind,
        *,
        reason: str = "",
        **values: Any,
    ) -> Answer:
        """Sends an event of a job to the source, whose answer it returns, and shows it."""
        assert slot.worker is not None
        event = Event(
            kind,
            slot.spec,
            attempt.job,
            slot.worker.pid,
            attempt.number,
            time.monotonic() - attempt.started_at,
            log=str(slot.worker.log),
            host=slot.worker.host,
            reason=brief(reason, slot.worker.log),
            **values,
        )
        answer = self._tell_source(event)
        self._show(event)
        return answer

    def _tell_source(self, event: Event) -> Answer:
        self._last_event_at = time.monotonic()
        return "stop" if self._is_broken else self._source.event(event)

    def _show(self, event: Event) -> None:
        if not self._is_broken:
            with contextlib.suppress(OSError):  # a terminal that is gone ends no experiment
                self._on_event(event)


def worker_logs(folder: Path) -> Callable[[Slot, Job], Path]:
    """A log for each slot: `worker_gpu0_20261121_130000.log` in `folder`."""
    started = time.strftime("%Y%m%d_%H%M%S")
    return lambda slot, _job: folder / f"worker_{slot.name}_{started}.log"
