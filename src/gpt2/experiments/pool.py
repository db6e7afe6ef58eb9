"""The owner of an experiment: gives the jobs of a source to worker processes, one for each slot.

A worker that dies, hangs, runs out of memory or raises costs its own job only. Death is watched
through pidfds: a pipe's end and `Process.sentinel` tell nothing while a grandchild lives. Each
worker has a socket of its own: a shared queue hangs for ever when a writer is killed while it puts.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from gpt2.distributed import StopRequest
from gpt2.experiments import worker
from gpt2.experiments.plan import Event, Job, Kind, Slot, Source

POLL_S = 0.2
"""how soon a signal and a timeout are noticed"""
STACK_S = 1.0
"""for a worker that hangs, to write where it is"""
LOADING_S = 120.0
"""for a worker that starts, beside --job_timeout"""
FAREWELL_S = 10.0
"""for a worker without a job, to end by itself"""
BAD_SLOT = 3
"""failures in a row, while another slot succeeds, that take a slot out of service"""
RECEIVE_BYTES = 1 << 16


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
class _Worker:
    """A worker process, as its owner sees it."""

    process: multiprocessing.process.BaseProcess
    pid: int
    pidfd: int
    channel: socket.socket
    log: Path
    job: Job | None = None
    attempt: int = 1
    began: float = 0.0
    """monotonic, when it got its job"""
    has_begun: bool = False
    """whether it has loaded what the job needs"""
    heard: float = 0.0
    """monotonic, when it last said something"""
    deadline: float | None = None
    """monotonic, when it is killed"""
    verdict: str = ""
    """why it is killed"""
    received: bytes = b""
    has_hung_up: bool = False

    @property
    def loading_s(self) -> float:
        """What --job_timeout leaves for the start of a process and its modules."""
        return 0.0 if self.has_begun else LOADING_S

    def kill(self) -> None:
        """SIGKILL to the worker and to all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # before it has a group of its own, too
            os.killpg(self.pid, signal.SIGKILL)

    def tell(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


@dataclass
class _Seat:
    """A slot and who works there."""

    slot: Slot
    worker: _Worker | None = None
    in_service: bool = True
    failures: list[float] = field(default_factory=list)
    """monotonic times of the failures in a row"""
    progressed: float = 0.0
    """monotonic time of the last report or result"""

    @property
    def is_free(self) -> bool:
        return self.worker is None or (self.worker.job is None and self.worker.deadline is None)


@dataclass(frozen=True)
class _Waiting:
    """A job that cannot begin yet."""

    job: Job
    attempt: int = 1
    died_on: int | None = None
    """the slot where its worker was lost: another one may be better"""


class Pool:
    """Runs the jobs of `source` on `slots`, until there are none left or somebody says stop.

    `on_event` hears everything that `source` hears, and what concerns the pool itself, for whoever
    watches. `log_of` says which log a worker on a slot writes to, by the job that it is started
    for; by default a slot has one.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        source: Source,
        on_event: Callable[[Event], None],
        *,
        log_of: Callable[[Slot, Job], Path] | None = None,
        limits: Limits = Limits(),
    ) -> None:
        self._seats = [_Seat(slot) for slot in slots]
        self._source, self._on_event = source, on_event
        self._log_of, self._limits = log_of or worker_logs(Path("logs")), limits
        self._waiting: list[_Waiting] = []
        self._stopping = False

    def run(self) -> int:
        """The number of the signal that stopped it, or 0 when every job has ended.

        The first Ctrl+C asks every job to stop, which trainings do by saving; a second one, or the
        end of the time for that, kills them.
        """
        with StopRequest() as stop:
            try:
                while True:
                    if stop.number and not self._stopping:
                        self._begin_stop()
                    self._fill()
                    if self._is_done():
                        return stop.number
                    self._take_in()
                    self._keep_deadlines()
            except KeyboardInterrupt:
                self._stopping = True
                return signal.SIGINT
            finally:
                self._end_workers(at_once=sys.exc_info()[0] is not None)

    def _begin_stop(self) -> None:
        self._stopping = True
        for worker_ in self._workers():
            if worker_.job:
                worker_.tell(signal.SIGTERM)
                worker_.deadline = time.monotonic() + self._limits.grace
        reason = f"jobs have {self._limits.grace:g} s to save and end"
        self._show(Event("stopping", self._seats[0].slot, reason=reason))

    def _is_done(self) -> bool:
        """Whether nobody works, though every slot could have had a job."""
        if any(worker_.job for worker_ in self._workers()):
            return False
        return self._stopping or all(seat.is_free for seat in self._seats if seat.in_service)

    def _fill(self) -> None:
        """Gives a job to every slot that is free, as long as there are jobs."""
        for seat in self._seats:
            if not self._stopping and seat.in_service and seat.is_free:
                chosen = self._next_for(seat)
                if chosen is not None:
                    self._begin(seat, chosen)

    def _next_for(self, seat: _Seat) -> _Waiting | None:
        """What waits for this slot, or the source's next job that may run here, or else a job that
        died here."""
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
        while job := self._source.next():
            item = _Waiting(job)
            if may_run(item):
                return item
            self._waiting.append(item)
        free_elsewhere = any(
            other.in_service and other.is_free for other in self._seats if other is not seat
        )
        return taken(lambda item: item.job.slot == here or not free_elsewhere)

    def _begin(self, seat: _Seat, chosen: _Waiting) -> None:
        """Gives the slot the job; if its worker must end before that, the job waits for it."""
        job = chosen.job
        if seat.worker and job.own_process:
            self._waiting.insert(0, chosen)
            self._retire(seat.worker)
            return
        message = json.dumps(asdict(job)).encode() + b"\n"  # a job that is not plain is our mistake
        if seat.worker is None:
            log = self._log_of(seat.slot, job)
            seat.worker = _start_worker(seat.slot, log)
        hired = seat.worker
        hired.job, hired.attempt = job, chosen.attempt
        hired.began = hired.heard = time.monotonic()
        hired.has_begun = False
        with contextlib.suppress(OSError):  # it is dead: its pidfd tells
            hired.channel.sendall(message)
        self._tell(seat, "started")

    def _take_in(self) -> None:
        """Waits for something to happen to a worker, and deals with it."""
        seats = {}
        for seat in self._seats:
            if seat.worker:
                seats[seat.worker.pidfd] = seat
                if not seat.worker.has_hung_up:
                    seats[seat.worker.channel.fileno()] = seat
        ready = wait(list(seats), POLL_S)
        for seat in {id(seats[handle]): seats[handle] for handle in ready}.values():  # type: ignore[index]
            assert seat.worker is not None
            for message in _receive(seat.worker):
                self._on_message(seat, message)
            if seat.worker.pidfd in ready:
                self._on_death(seat)

    def _on_message(self, seat: _Seat, message: Mapping[str, Any]) -> None:
        hired = seat.worker
        assert hired is not None
        hired.heard = time.monotonic()
        if "begun" in message:
            hired.has_begun = True
            return
        if "report" in message:
            seat.progressed = hired.heard
            answer = self._tell(seat, "reported", metrics=message["report"])
            with contextlib.suppress(OSError):
                hired.channel.sendall(
                    json.dumps("stop" if self._stopping else answer).encode() + b"\n"
                )
            return
        if "stopped" in message:
            if self._stopping:
                self._tell(seat, "stopped")
            else:
                self._on_loss(seat, "it was asked to stop by somebody else")
        elif "failed" in message:
            self._on_failure(seat, message)
        else:
            kind: Kind = "pruned" if "pruned" in message else "finished"
            self._tell(seat, kind, result=message[kind])
            seat.failures, seat.progressed = [], hired.heard
        own_process = hired.job is not None and hired.job.own_process
        hired.job, hired.deadline = None, None
        if own_process or message.get("out_of_memory"):
            self._retire(hired)

    def _on_failure(self, seat: _Seat, message: Mapping[str, Any]) -> None:
        reason, traceback = message["failed"], message["traceback"]
        if message["out_of_memory"]:  # perhaps for what jobs before it left: a fresh process
            self._on_loss(seat, f"out of memory: {reason}", traceback)
            return
        self._tell(seat, "failed", reason=reason, traceback=traceback)
        if not message["known"]:  # a user's mistake is no sign of a bad GPU
            self._count_failure(seat)

    def _on_loss(self, seat: _Seat, reason: str, traceback: str = "") -> None:
        """The job's worker is lost: the job begins again from its own checkpoint, or has failed."""
        hired = seat.worker
        assert hired is not None and hired.job is not None
        if hired.attempt > self._limits.retries:
            self._tell(seat, "failed", reason=reason, traceback=traceback)
        else:
            self._tell(seat, "retried", reason=reason, traceback=traceback)
            again = _Waiting(hired.job, hired.attempt + 1, died_on=seat.slot.index)
            self._waiting.append(again)
        self._count_failure(seat)

    def _on_death(self, seat: _Seat) -> None:
        hired = seat.worker
        assert hired is not None
        how = _bury(hired)
        if hired.job:
            if self._stopping:
                self._tell(seat, "stopped", reason=hired.verdict or how)
            else:
                self._on_loss(seat, hired.verdict or how)
        seat.worker = None

    def _keep_deadlines(self) -> None:
        now, timeout = time.monotonic(), self._limits.job_timeout
        for hired in self._workers():
            if hired.deadline is not None:
                if now > hired.deadline:
                    grace = f"it did not end within {self._limits.grace:g} s (--grace)"
                    hired.verdict = hired.verdict or grace
                    hired.kill()
            elif hired.job and timeout and now > hired.heard + timeout + hired.loading_s:
                hired.verdict = f"no report for {timeout:g} s (--job_timeout)"
                hired.tell(worker.SHOW_STACK)
                hired.deadline = now + STACK_S

    def _count_failure(self, seat: _Seat) -> None:
        seat.failures.append(time.monotonic())
        others = [other for other in self._seats if other is not seat and other.in_service]
        if len(seat.failures) >= BAD_SLOT and any(
            other.progressed > seat.failures[-BAD_SLOT] for other in others
        ):
            seat.in_service = False
            reason = f"{len(seat.failures)} failures in a row, while other slots get on"
            self._show(Event("slot_lost", seat.slot, reason=reason))

    def _retire(self, hired: _Worker) -> None:
        """Lets a worker end that has no job; its slot is free when it has."""
        with contextlib.suppress(OSError):
            hired.channel.shutdown(socket.SHUT_WR)
        hired.deadline = time.monotonic() + FAREWELL_S

    def _end_workers(self, at_once: bool) -> None:
        """No worker outlives its owner."""
        for hired in self._workers():
            if at_once or hired.job:
                hired.kill()
            elif hired.deadline is None:
                self._retire(hired)
        while busy := [seat for seat in self._seats if seat.worker]:
            wait([seat.worker.pidfd for seat in busy if seat.worker], POLL_S)
            for seat in busy:
                assert seat.worker is not None
                if _has_ended(seat.worker):
                    self._on_death(seat)
            self._keep_deadlines()

    def _workers(self) -> Iterator[_Worker]:
        return (seat.worker for seat in self._seats if seat.worker)

    def _tell(self, seat: _Seat, kind: Kind, **facts: Any) -> str:
        hired = seat.worker
        assert hired is not None
        event = Event(
            kind,
            seat.slot,
            hired.job,
            hired.pid,
            hired.attempt,
            time.monotonic() - hired.began,
            log=str(hired.log),
            **facts,
        )
        answer = self._source.event(event)
        self._show(event)
        return answer

    def _show(self, event: Event) -> None:
        with contextlib.suppress(OSError):  # a terminal that is gone ends no experiment
            self._on_event(event)


def worker_logs(folder: Path) -> Callable[[Slot, Job], Path]:
    """A log for each slot: `worker_gpu0_20261121_130000.log` in `folder`."""
    begun = time.strftime("%Y%m%d_%H%M%S")
    return lambda slot, _job: folder / f"worker_{slot.name}_{begun}.log"


def _start_worker(slot: Slot, log: Path) -> _Worker:
    log.parent.mkdir(parents=True, exist_ok=True)
    ours, theirs = socket.socketpair()
    process = multiprocessing.get_context("spawn").Process(
        target=worker.serve, args=(theirs, os.getpid(), log.resolve(), sys.path), name=slot.name
    )
    resource_tracker.ensure_running()  # its start would unblock the signal again
    with _environment(slot.environment):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until it has a session
        try:
            try:
                process.start()
            except BrokenPipeError:  # it was killed before it had read what it is to do
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    theirs.close()
    assert process.pid is not None
    return _Worker(process, process.pid, os.pidfd_open(process.pid), ours, log)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """The variables are set within the block, and as before after it."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _receive(hired: _Worker) -> list[dict[str, Any]]:
    """The whole messages that have come; part of one, from a worker that was killed, is none."""
    with contextlib.suppress(BlockingIOError, ConnectionError):
        while data := hired.channel.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT):
            hired.received += data
        hired.has_hung_up = True
    *lines, hired.received = hired.received.split(b"\n")
    return [json.loads(line) for line in lines]


def _has_ended(hired: _Worker) -> bool:
    return bool(wait([hired.pidfd], 0))


def _bury(hired: _Worker) -> str:
    """Ends what a dead worker has started, and says how it died."""
    hired.kill()  # its group, before its number may become another process's
    hired.process.join()
    code = hired.process.exitcode or 0
    hired.process.close()
    hired.channel.close()
    os.close(hired.pidfd)
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name
    note = " (as the kernel does when the memory runs out)" if name == "SIGKILL" else ""
    return f"its process was killed by {name}{note}"
