"""The owner of an experiment: gives the jobs of a source to worker processes, one for each slot.

A worker that dies, hangs, runs out of memory or raises costs its own job only.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from gpt2.base.errors import TrainingError
from gpt2.distributed.signals import StopRequest
from gpt2.experiments.pool import worker
from gpt2.experiments.pool.job import Event, EventKind, Job, JobSource, Slot
from gpt2.experiments.pool.process import Engine, Worker
from gpt2.train.report import Answer

POLL_S = 0.2
"""how soon a signal and a timeout are noticed"""
TICK_S = 5.0
"""how often the source hears something, though nothing happens"""
STACK_S = 1.0
"""for a worker that hangs, to write where it is"""
LOADING_S = 120.0
"""for a worker that starts, beside --job_timeout"""
FAREWELL_S = 10.0
"""for a worker without a job, to end by itself"""
DEATH_S = 15.0
"""for SIGKILL to work: a process that waits for a broken device does not die"""
BAD_SLOT = 3
"""workers lost in a row, while the other slots lose none, that take a slot out of service"""
LOST_MACHINES = 5
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
class _Waiting:
    """A job that cannot begin yet."""

    job: Job
    attempt: int = 1
    losses: int = 0
    """attempts that were lost with their worker, which `Limits.retries` allows"""
    machines: int = 0
    """machines that were lost, since it last made progress"""
    died_on: int | None = None
    """the slot where its worker was lost: another one may be better"""


@dataclass
class _Task:
    """A job that a worker has."""

    job: Job
    attempt: int
    losses: int
    machines: int
    """both as in _Waiting"""
    began: float
    """monotonic, as all times here"""
    heard: float
    """when its worker last said something"""
    is_told: bool = False
    """whether the source knows that a worker has it"""
    has_begun: bool = False
    """whether its worker has loaded what it needs"""


@dataclass
class _Seat:
    """A slot and who works there."""

    slot: Slot
    worker: Worker | None = None
    task: _Task | None = None
    deadline: float | None = None
    """when the worker is killed, if it has not ended"""
    killed: float | None = None
    verdict: str = ""
    """why it is killed"""
    in_service: bool = True
    losses: list[float] = field(default_factory=list)
    """when it lost workers, since its last result"""
    progressed: float = 0.0
    """when it last had a report or a result"""

    @property
    def is_free(self) -> bool:
        return self.worker is None or (self.task is None and self.deadline is None)

    @property
    def waits_for_room(self) -> bool:
        """Whether it has a job, but no machine of the cluster has room for its worker yet."""
        return self.task is not None and not self.task.is_told

    def kill(self, why: str) -> None:
        assert self.worker is not None
        self.verdict = self.verdict or why
        self.killed = self.killed or time.monotonic()
        self.worker.kill()


class Scheduler:
    """Runs the jobs of `source` on an engine's slots, until there are none left or somebody says
    stop.

    `on_event` hears everything that `source` hears, and what concerns the pool itself, for whoever
    watches. `log_of` says which log a worker on a slot writes to, by the job that it is started
    for; by default a slot has one.
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
        self._engine, self._seats = engine, [_Seat(slot) for slot in engine.slots]
        self._source, self._on_event = source, on_event
        self._log_of, self._limits = log_of or worker_logs(Path("logs")), limits
        self._waiting: list[_Waiting] = []
        self._stopping = False
        self._stop = StopRequest()
        self._told = time.monotonic()

    @property
    def stop_requested(self) -> bool:
        """Whether a signal has come; a source that waits for something gives up then."""
        return self._stop.number != 0

    def run(self) -> int:
        """The number of the signal that stopped it, or 0 when every job has ended.

        The first Ctrl+C asks every job to stop, which trainings do by saving; a second one, or the
        end of the time for that, kills them. They save, too, if the source raises an error.
        """
        with self._stop as stop:
            try:
                while not self._is_done():
                    self._take_in()
                    self._keep_deadlines()
                    if stop.number and not self._stopping:
                        self._begin_stop("again" if stop.number == signal.SIGINT else "twice")
                return stop.number
            except KeyboardInterrupt:
                self._stopping = True
                return signal.SIGINT
            except BaseException:
                self._source, self._on_event = _Nobody(), lambda _: None
                self._begin_stop("twice")
                while any(seat.task for seat in self._seats):
                    self._take_in()
                    self._keep_deadlines()
                raise
            finally:
                self._end_workers()

    def _begin_stop(self, more: str) -> None:
        self._stopping = True
        grace = self._limits.grace
        for seat in self._seats:
            if seat.worker and seat.task:
                seat.worker.signal(signal.SIGTERM)
                seat.deadline = time.monotonic() + grace
        reason = f"every job saves and ends, {grace:g} s at most; Ctrl+C {more} ends at once"
        self._show(Event("stopping", self._seats[0].slot, reason=reason))

    def _is_done(self) -> bool:
        """Whether nobody works, though every slot was offered a job."""
        if not self._stopping:
            self._fill()
        if any(seat.task for seat in self._seats):
            return False
        return self._stopping or all(seat.is_free for seat in self._seats if seat.in_service)

    def _fill(self) -> None:
        """Gives a job to every slot that is free, as long as there are jobs."""
        for seat in self._seats:
            if seat.in_service and seat.is_free:
                if chosen := self._next_for(seat):
                    self._begin(seat, chosen)
                elif seat.worker and any(other.waits_for_room for other in self._seats):
                    self._dismiss(seat)

    def _next_for(self, seat: _Seat) -> _Waiting | None:
        """What waits for this slot, or the source's next job that may run here, or else a job whose
        worker was lost here."""
        here = seat.slot.index
        serving = [other.slot.index for other in self._seats if other.in_service]

        def may_run(item: _Waiting) -> bool:
            return item.job.slot == here or item.job.slot not in serving

        def taken(wanted: Callable[[_Waiting], bool]) -> _Waiting | None:
            item = next((item for item in self._waiting if may_run(item) and wanted(item)), None)
            if item is not None:
                self._waiting.remove(item)
            return item

        if item := taken(lambda item: item.died_on != here):
            return item
        while job := self._asked():
            item = _Waiting(job)
            if may_run(item):
                return item
            self._waiting.append(item)
        free_elsewhere = any(
            other.in_service and other.is_free for other in self._seats if other is not seat
        )
        return taken(lambda item: item.job.slot == here or not free_elsewhere)

    def _asked(self) -> Job | None:
        began = time.monotonic()
        job = self._source.next()
        self._excuse(began)
        return job

    def _begin(self, seat: _Seat, chosen: _Waiting) -> None:
        """Gives the slot the job; if its worker must end before that, the job waits for it."""
        job = chosen.job
        if seat.worker and job.own_process:
            self._waiting.insert(0, chosen)
            self._dismiss(seat)
            return
        if seat.worker is None:
            try:
                seat.worker = self._engine.start_worker(seat.slot, self._log_of(seat.slot, job))
            except OSError as error:
                raise TrainingError(
                    f"cannot start a worker for {job.name}: {error}; the same command goes on"
                ) from error
        now = time.monotonic()
        counts = chosen.attempt, chosen.losses, chosen.machines
        seat.task, seat.verdict = _Task(job, *counts, began=now, heard=now), ""
        seat.worker.send(asdict(job))
        self._tell_start(seat)

    def _tell_start(self, seat: _Seat) -> None:
        """Tells that a worker has the job, once it runs."""
        task = seat.task
        if task and not task.is_told and seat.worker and seat.worker.pid:
            task.began = task.heard = time.monotonic()
            task.is_told = True
            self._tell(seat, task, "started")

    def _take_in(self) -> None:
        """Waits for something to happen to a worker, and deals with it."""
        seats = {
            handle: seat for seat in self._seats if seat.worker for handle in seat.worker.handles
        }
        ready = wait(list(seats), POLL_S)
        for seat in {id(seats[handle]): seats[handle] for handle in ready}.values():  # type: ignore[index]
            assert seat.worker is not None
            has_ended = seat.worker.has_ended  # before its last words are read
            messages = seat.worker.receive()
            self._tell_start(seat)
            for message in messages:
                self._on_message(seat, message)
            if has_ended:
                self._on_death(seat)
        if time.monotonic() > self._told + TICK_S:
            self._told = time.monotonic()
            self._source.event(Event("waiting", self._seats[0].slot))

    def _on_message(self, seat: _Seat, message: Mapping[str, Any]) -> None:
        task, hired = seat.task, seat.worker
        assert task is not None and hired is not None
        task.heard = time.monotonic()
        if "begun" in message:
            task.has_begun = True
        elif "report" in message:
            seat.progressed, task.machines = task.heard, 0
            answer = self._tell(seat, task, "reported", metrics=message["report"])
            hired.send("stop" if self._stopping else answer)
        else:
            seat.task, seat.deadline = None, None
            self._on_outcome(seat, task, message)
            if task.job.own_process or message.get("recycle"):
                self._dismiss(seat)

    def _on_outcome(self, seat: _Seat, task: _Task, message: Mapping[str, Any]) -> None:
        traceback = message.get("traceback", "")
        if "stopped" in message or "lost" in message:
            if self._stopping:
                self._tell(seat, task, "stopped", reason=message.get("lost", ""))
            else:
                reason = message.get("lost", "somebody else asked it to stop")
                self._on_loss(seat, task, reason)
        elif message.get("out_of_memory"):  # perhaps by what jobs before it left
            reason = f"out of memory: {message['failed']}"
            self._on_loss(seat, task, reason, traceback)
        elif "failed" in message:
            self._tell(seat, task, "failed", reason=message["failed"], traceback=traceback)
            if message["on_device"]:
                self._blame(seat)
        else:
            kind: EventKind = "pruned" if "pruned" in message else "finished"
            self._tell(seat, task, kind, result=message[kind])
            seat.losses, seat.progressed = [], task.heard

    def _on_loss(self, seat: _Seat, task: _Task, reason: str, traceback: str = "") -> None:
        """The job's worker is lost: the job begins again from its own checkpoint, or has failed."""
        assert seat.worker is not None
        losses, machines = task.losses, task.machines
        if seat.worker.machine_is_lost:
            machines += 1
        else:
            losses += 1
        if losses > self._limits.retries or machines > LOST_MACHINES:
            self._tell(seat, task, "failed", reason=reason, traceback=traceback)
        else:
            self._tell(seat, task, "retried", reason=reason, traceback=traceback)
            again = _Waiting(task.job, task.attempt + 1, losses, machines, seat.slot.index)
            self._waiting.append(again)
        self._blame(seat)

    def _on_death(self, seat: _Seat) -> None:
        """The slot's worker is dead, or was given up."""
        assert seat.worker is not None
        task, seat.task = seat.task, None
        how = (
            seat.worker.collect_exit_status()
            if seat.worker.has_ended
            else "its process cannot be killed"
        )
        if task and self._stopping:
            why = how if task.has_begun else ""  # one that still loads dies of the signal, as meant
            self._tell(seat, task, "stopped", reason=seat.verdict or why)
        elif task:
            self._on_loss(seat, task, seat.verdict or how)
        seat.worker = seat.deadline = seat.killed = None
        seat.verdict = ""

    def _keep_deadlines(self) -> None:
        now, timeout = time.monotonic(), self._limits.job_timeout
        for seat in self._seats:
            if seat.worker is None:
                continue
            if seat.killed and now > seat.killed + DEATH_S and self._may_be_back(seat):
                seat.killed = now
                seat.worker.kill()
            elif seat.killed and now > seat.killed + DEATH_S:
                self._close(seat, f"process {seat.worker.pid} there cannot be killed")
                self._on_death(seat)
            elif seat.deadline and now > seat.deadline:
                seat.kill(f"it did not end within {self._limits.grace:g} s (--grace)")
            elif seat.task and seat.task.is_told and timeout and not seat.deadline:
                loading_s = 0.0 if seat.task.has_begun else LOADING_S
                if now > seat.task.heard + timeout + loading_s:
                    seat.verdict = f"no report for {timeout:g} s (--job_timeout)"
                    seat.worker.signal(worker.SHOW_STACK)
                    seat.deadline = now + STACK_S

    def _may_be_back(self, seat: _Seat) -> bool:
        """Whether a worker that does not die may be one of a machine that cannot be reached: its
        job waits until that is back or lost, or else two workers would have it at a time."""
        return not self._engine.is_fixed and not self._stopping

    def _blame(self, seat: _Seat) -> None:
        """A slot that loses one worker after another is bad, if no other slot does the same."""
        if not self._engine.is_fixed:
            return
        seat.losses.append(time.monotonic())
        if len(seat.losses) < BAD_SLOT:
            return
        since = seat.losses[-BAD_SLOT]
        others = [other for other in self._seats if other is not seat and other.in_service]
        all_good = all(not other.losses or other.losses[-1] < since for other in others)
        if all_good and any(other.progressed > since for other in others):
            self._close(seat, f"{BAD_SLOT} workers lost in a row, while other slots get on")

    def _close(self, seat: _Seat, reason: str) -> None:
        seat.in_service = False
        self._show(Event("slot_lost", seat.slot, reason=reason))

    def _dismiss(self, seat: _Seat) -> None:
        """Lets a worker end that has no job; its slot is free when it has."""
        assert seat.worker is not None
        seat.worker.end_when_idle()
        seat.deadline = time.monotonic() + FAREWELL_S

    def _end_workers(self) -> None:
        """No worker outlives its owner."""
        self._stopping = True
        for seat in self._seats:
            if seat.worker and seat.task:
                seat.kill("its owner has ended")
            elif seat.worker and seat.deadline is None:
                self._dismiss(seat)
        while left := [seat for seat in self._seats if seat.worker]:
            wait([handle for seat in left if seat.worker for handle in seat.worker.handles], POLL_S)
            for seat in left:
                if seat.worker:
                    seat.worker.receive()  # nobody hears it any more
                if seat.worker and seat.worker.has_ended:
                    self._on_death(seat)
            self._keep_deadlines()

    def _tell(self, seat: _Seat, task: _Task, kind: EventKind, **facts: Any) -> Answer:
        assert seat.worker is not None
        event = Event(
            kind,
            seat.slot,
            task.job,
            seat.worker.pid,
            task.attempt,
            time.monotonic() - task.began,
            log=str(seat.worker.log),
            host=seat.worker.host,
            **facts,
        )
        self._told = time.monotonic()
        answer = self._source.event(event)
        self._excuse(self._told)
        self._show(event)
        return answer

    def _excuse(self, since: float) -> None:
        """The source has taken its time: nobody's report was read meanwhile."""
        waited_s = time.monotonic() - since
        for seat in self._seats:
            if seat.task:
                seat.task.heard += waited_s

    def _show(self, event: Event) -> None:
        with contextlib.suppress(OSError):  # a terminal that is gone ends no experiment
            self._on_event(event)


class _Nobody:
    """In the place of a source that has raised an error: jobs end, and nobody hears how."""

    def next(self) -> Job | None:
        return None

    def event(self, _event: Event) -> Answer:
        return "stop"


def worker_logs(folder: Path) -> Callable[[Slot, Job], Path]:
    """A log for each slot: `worker_gpu0_20261121_130000.log` in `folder`."""
    begun = time.strftime("%Y%m%d_%H%M%S")
    return lambda slot, _job: folder / f"worker_{slot.name}_{begun}.log"
