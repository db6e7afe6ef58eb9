"""The scheduler: gives the jobs of a source to worker processes, one at a time per slot.

It runs in the owner, the process of the command. `Scheduler.run` starts workers through the engine
(`process.WorkerProcess` on this machine, `ray_engine.RemoteWorker` on a cluster), sends them jobs
and answers their reports; `worker.serve` is the other side. A worker that dies, hangs, runs out of
memory or raises costs its own job only.
"""

import contextlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from gpt2.base.errors import TrainingError
from gpt2.distributed.signals import StopRequest
from gpt2.experiments.pool import worker
from gpt2.experiments.pool.job import Event, EventKind, Job, JobSource, Slot
from gpt2.experiments.pool.messages import JobEnded, JobLoaded, JobReported, Message, Reply
from gpt2.experiments.pool.process import Engine, Worker
from gpt2.train.report import Answer

POLL_S = 0.2
"""how soon a signal and a timeout are noticed"""
WAITING_EVENT_S = 5.0
"""how often the source gets a `waiting` event while nothing happens"""
STACK_S = 1.0
"""for a worker that hangs, to write its stacks before it is killed"""
LOADING_S = 120.0
"""for a worker to start and import, in addition to --job_timeout"""
IDLE_EXIT_S = 10.0
"""for a worker without a job to end by itself"""
DEATH_S = 15.0
"""for SIGKILL to work: a process that waits for a broken device does not die"""
LOSSES_OF_BAD_SLOT = 3
"""workers lost in a row, while other slots make progress, that take a slot out of service"""
MAX_LOST_MACHINES = 5
"""machines that a job may lose without a report in between"""


@dataclass(frozen=True)
class Limits:
    """What a job may cost."""

    retries: int = 1
    """more attempts for a job whose worker died, hung or ran out of memory"""
    job_timeout: float | None = None
    """seconds without a report after which a job counts as hanging; None waits for ever"""
    grace: float = 60.0
    """seconds that jobs have to save and end after Ctrl+C"""


@dataclass(frozen=True)
class _WaitingJob:
    """A job that has not started, or is to run again."""

    job: Job
    attempt: int = 1
    losses: int = 0
    """attempts that ended with the loss of the worker; `Limits.retries` bounds them"""
    lost_machines: int = 0
    """lost since the job last reported"""
    lost_on: int | None = None
    """index of the slot that lost its worker: another slot may be better"""


@dataclass
class _RunningJob:
    """A job that a worker has. All times are monotonic."""

    job: Job
    attempt: int
    losses: int
    lost_machines: int
    """both as in _WaitingJob"""
    started_at: float
    last_message_at: float
    is_announced: bool = False
    """whether the source has its `started` event: not before its worker runs"""
    is_loaded: bool = False
    """whether the worker has imported the function"""


@dataclass
class _ManagedSlot:
    """A slot with its worker, and the job that this runs."""

    spec: Slot
    worker: Worker | None = None
    running: _RunningJob | None = None
    kill_at: float | None = None
    """when the worker is killed, unless it has ended"""
    killed_at: float | None = None
    kill_reason: str = ""
    in_service: bool = True
    loss_times: list[float] = field(default_factory=list)
    """when it lost workers, since its last result"""
    last_progress: float = 0.0
    """when it last had a report or a result"""

    @property
    def is_free(self) -> bool:
        return self.worker is None or (self.running is None and self.kill_at is None)

    @property
    def waits_for_room(self) -> bool:
        """Whether it has a job, but no machine of the cluster has room for its worker yet."""
        return self.running is not None and not self.running.is_announced

    def kill(self, reason: str) -> None:
        assert self.worker is not None
        self.kill_reason = self.kill_reason or reason
        self.killed_at = self.killed_at or time.monotonic()
        self.worker.kill()


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
        self._engine, self._slots = engine, [_ManagedSlot(slot) for slot in engine.slots]
        self._source, self._on_event = source, on_event
        self._log_of, self._limits = log_of or worker_logs(Path("logs")), limits
        self._waiting: list[_WaitingJob] = []
        self._stopping = False
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
                while not self._is_done():
                    self._handle_workers()
                    self._enforce_deadlines()
                    if stop.number and not self._stopping:
                        self._begin_stop("again" if stop.number == signal.SIGINT else "twice")
                return stop.number
            except KeyboardInterrupt:
                self._stopping = True
                return stop.number or signal.SIGINT
            except BaseException:
                self._source, self._on_event = _EmptySource(), lambda _: None
                self._begin_stop("twice")
                while any(slot.running for slot in self._slots):
                    self._handle_workers()
                    self._enforce_deadlines()
                raise
            finally:
                self._end_workers()

    def _begin_stop(self, more: str) -> None:
        self._stopping = True
        grace = self._limits.grace
        for slot in self._slots:
            if slot.worker and slot.running:
                slot.worker.signal(signal.SIGTERM)
                slot.kill_at = time.monotonic() + grace
        reason = f"every job saves and ends, {grace:g} s at most; Ctrl+C {more} ends at once"
        self._show(Event("stopping", self._slots[0].spec, reason=reason))

    def _is_done(self) -> bool:
        """Assigns jobs to free slots; whether no job is left and none runs."""
        if not self._stopping:
            self._assign_jobs()
        if any(slot.running for slot in self._slots):
            return False
        return self._stopping or all(slot.is_free for slot in self._slots if slot.in_service)

    # Jobs to slots

    def _assign_jobs(self) -> None:
        for slot in self._slots:
            if slot.in_service and slot.is_free:
                if chosen := self._next_for(slot):
                    self._start(slot, chosen)
                elif slot.worker and any(other.waits_for_room for other in self._slots):
                    self._end_idle_worker(slot)

    def _next_for(self, slot: _ManagedSlot) -> _WaitingJob | None:
        """A waiting job that may run on this slot, else the source's next one, else a job whose
        worker was lost here."""
        here = slot.spec.index
        serving = [other.spec.index for other in self._slots if other.in_service]

        def may_run(item: _WaitingJob) -> bool:
            return item.job.slot == here or item.job.slot not in serving

        def take(wanted: Callable[[_WaitingJob], bool]) -> _WaitingJob | None:
            item = next((item for item in self._waiting if may_run(item) and wanted(item)), None)
            if item is not None:
                self._waiting.remove(item)
            return item

        if item := take(lambda item: item.lost_on != here):
            return item
        while job := self._next_of_source():
            item = _WaitingJob(job)
            if may_run(item):
                return item
            self._waiting.append(item)
        free_elsewhere = any(
            other.in_service and other.is_free for other in self._slots if other is not slot
        )
        return take(lambda item: item.job.slot == here or not free_elsewhere)

    def _next_of_source(self) -> Job | None:
        before = time.monotonic()
        job = self._source.next()
        self._extend_timeouts(before)
        return job

    def _start(self, slot: _ManagedSlot, chosen: _WaitingJob) -> None:
        """Sends the job to the slot's worker; if it wants a new process, the old one ends first."""
        job = chosen.job
        if slot.worker and job.own_process:
            self._waiting.insert(0, chosen)
            self._end_idle_worker(slot)
            return
        if slot.worker is None:
            try:
                slot.worker = self._engine.start_worker(slot.spec, self._log_of(slot.spec, job))
            except OSError as error:
                raise TrainingError(
                    f"cannot start a worker for {job.name}: {error}; run the same command to "
                    "continue"
                ) from error
        now = time.monotonic()
        slot.running = _RunningJob(
            job,
            chosen.attempt,
            chosen.losses,
            chosen.lost_machines,
            started_at=now,
            last_message_at=now,
        )
        slot.kill_reason = ""
        slot.worker.send(job)
        self._announce(slot)

    def _announce(self, slot: _ManagedSlot) -> None:
        """Sends the `started` event, once, as soon as the worker runs."""
        running = slot.running
        if running and not running.is_announced and slot.worker and slot.worker.pid:
            running.started_at = running.last_message_at = time.monotonic()
            running.is_announced = True
            self._notify(slot, running, "started")

    # What workers send, and how they end

    def _handle_workers(self) -> None:
        """Waits until a worker sends messages or dies, POLL_S at most, and handles that."""
        by_handle = {
            handle: slot for slot in self._slots if slot.worker for handle in slot.worker.handles
        }
        ready = wait(list(by_handle), POLL_S)
        for slot in {id(by_handle[handle]): by_handle[handle] for handle in ready}.values():  # type: ignore[index]
            assert slot.worker is not None
            has_ended = slot.worker.has_ended  # before its last messages are read
            received = slot.worker.receive()
            self._announce(slot)
            for message in received:
                self._on_message(slot, message)
            if has_ended:
                self._on_death(slot)
        if time.monotonic() > self._last_event_at + WAITING_EVENT_S:
            self._tell_source(Event("waiting", self._slots[0].spec))

    def _on_message(self, slot: _ManagedSlot, message: Message) -> None:
        running, its_worker = slot.running, slot.worker
        assert running is not None and its_worker is not None
        running.last_message_at = time.monotonic()
        match message:
            case JobLoaded():
                running.is_loaded = True
            case JobReported(metrics):
                slot.last_progress, running.lost_machines = running.last_message_at, 0
                answer = self._notify(slot, running, "reported", metrics=metrics)
                its_worker.send(Reply("stop" if self._stopping else answer))
            case JobEnded():
                slot.running, slot.kill_at = None, None
                self._on_end(slot, running, message)
                if running.job.own_process or message.takes_no_more:
                    self._end_idle_worker(slot)
            case _:
                raise AssertionError(f"a worker sent {message}")

    def _on_end(self, slot: _ManagedSlot, running: _RunningJob, ended: JobEnded) -> None:
        match ended.state:
            case "stopped" | "lost" if self._stopping:
                self._notify(slot, running, "stopped", reason=ended.reason)
            case "stopped":
                reason = "its worker got a stop signal that this command did not send"
                self._on_loss(slot, running, reason)
            case "lost":
                self._on_loss(slot, running, ended.reason)
            case "failed" if ended.is_out_of_memory:  # perhaps because of the jobs before it
                reason = f"out of memory: {ended.reason}"
                self._on_loss(slot, running, reason, ended.traceback)
            case "failed":
                self._notify(
                    slot, running, "failed", reason=ended.reason, traceback=ended.traceback
                )
                if ended.is_device_error:
                    self._count_loss(slot)
            case "finished" | "pruned":
                self._notify(slot, running, ended.state, result=ended.result)
                slot.loss_times, slot.last_progress = [], running.last_message_at

    def _on_loss(
        self, slot: _ManagedSlot, running: _RunningJob, reason: str, traceback: str = ""
    ) -> None:
        """The job's worker is lost: the job runs again, a training from its newest checkpoint; or
        it has failed, if it was lost too often."""
        assert slot.worker is not None
        losses, lost_machines = running.losses, running.lost_machines
        if slot.worker.machine_is_lost:
            lost_machines += 1
        else:
            losses += 1
        if losses > self._limits.retries or lost_machines > MAX_LOST_MACHINES:
            self._notify(slot, running, "failed", reason=reason, traceback=traceback)
        else:
            self._notify(slot, running, "retried", reason=reason, traceback=traceback)
            self._waiting.append(
                _WaitingJob(
                    running.job, running.attempt + 1, losses, lost_machines, slot.spec.index
                )
            )
        self._count_loss(slot)

    def _on_death(self, slot: _ManagedSlot) -> None:
        """The slot's worker is dead, or cannot be killed: the slot has none any more."""
        assert slot.worker is not None
        running, slot.running = slot.running, None
        status = "its process cannot be killed"
        if slot.worker.has_ended:
            status = slot.worker.collect_exit_status()
        if running and self._stopping:
            # While it loads, the signal that requests the stop ends it, which needs no reason.
            reason = slot.kill_reason or (status if running.is_loaded else "")
            self._notify(slot, running, "stopped", reason=reason)
        elif running:
            self._on_loss(slot, running, slot.kill_reason or status)
        slot.worker = slot.kill_at = slot.killed_at = None
        slot.kill_reason = ""

    # Deadlines, bad slots, and the end of workers

    def _enforce_deadlines(self) -> None:
        now, timeout = time.monotonic(), self._limits.job_timeout
        for slot in self._slots:
            if slot.worker is None:
                continue
            running = slot.running
            if slot.killed_at and now > slot.killed_at + DEATH_S:
                if self._may_be_unreachable():
                    slot.killed_at = now
                    slot.worker.kill()
                else:
                    pid = slot.worker.pid
                    self._take_out_of_service(slot, f"process {pid} there cannot be killed")
                    self._on_death(slot)
            elif slot.kill_at and now > slot.kill_at:
                slot.kill(f"it did not end within {self._limits.grace:g} s (--grace)")
            elif running and running.is_announced and timeout and not slot.kill_at:
                loading_s = 0.0 if running.is_loaded else LOADING_S
                if now > running.last_message_at + timeout + loading_s:
                    slot.kill_reason = f"no report for {timeout:g} s (--job_timeout)"
                    slot.worker.signal(worker.SHOW_STACK)
                    slot.kill_at = now + STACK_S

    def _may_be_unreachable(self) -> bool:
        """Whether a worker that does not die may be on a machine that cannot be reached: its job
        waits until the machine is back or lost, because two workers must not have the job."""
        return not self._engine.is_fixed and not self._stopping

    def _count_loss(self, slot: _ManagedSlot) -> None:
        """Takes a slot out of service that loses one worker after another while others do not."""
        if not self._engine.is_fixed:
            return
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

    def _end_idle_worker(self, slot: _ManagedSlot) -> None:
        """Lets a worker without a job end; the slot is free when it has."""
        assert slot.worker is not None
        slot.worker.end_when_idle()
        slot.kill_at = time.monotonic() + IDLE_EXIT_S

    def _end_workers(self) -> None:
        """Returns when no worker is left."""
        self._stopping = True
        for slot in self._slots:
            if slot.worker and slot.running:
                slot.kill("its owner has ended")
            elif slot.worker and slot.kill_at is None:
                self._end_idle_worker(slot)
        while left := [slot for slot in self._slots if slot.worker]:
            wait([handle for slot in left if slot.worker for handle in slot.worker.handles], POLL_S)
            for slot in left:
                if slot.worker:
                    slot.worker.receive()  # dropped
                if slot.worker and slot.worker.has_ended:
                    self._on_death(slot)
            self._enforce_deadlines()

    # Events

    def _notify(
        self, slot: _ManagedSlot, running: _RunningJob, kind: EventKind, **values: Any
    ) -> Answer:
        """Sends an event of a job to the source, whose answer it returns, and shows it."""
        assert slot.worker is not None
        event = Event(
            kind,
            slot.spec,
            running.job,
            slot.worker.pid,
            running.attempt,
            time.monotonic() - running.started_at,
            log=str(slot.worker.log),
            host=slot.worker.host,
            **values,
        )
        answer = self._tell_source(event)
        self._show(event)
        return answer

    def _tell_source(self, event: Event) -> Answer:
        """The source's answer, which may take minutes if its database is unreachable."""
        self._last_event_at = time.monotonic()
        answer = self._source.event(event)
        self._extend_timeouts(self._last_event_at)
        return answer

    def _extend_timeouts(self, since: float) -> None:
        """The time that the source took counts for no job: its reports were not read meanwhile."""
        waited_s = time.monotonic() - since
        for slot in self._slots:
            if slot.running:
                slot.running.last_message_at += waited_s

    def _show(self, event: Event) -> None:
        with contextlib.suppress(OSError):  # a terminal that is gone ends no experiment
            self._on_event(event)


class _EmptySource:
    """Replaces a source that raised an error: the jobs that run are stopped."""

    def next(self) -> Job | None:
        return None

    def event(self, _event: Event) -> Answer:
        return "stop"


def worker_logs(folder: Path) -> Callable[[Slot, Job], Path]:
    """A log for each slot: `worker_gpu0_20261121_130000.log` in `folder`."""
    started = time.strftime("%Y%m%d_%H%M%S")
    return lambda slot, _job: folder / f"worker_{slot.name}_{started}.log"
