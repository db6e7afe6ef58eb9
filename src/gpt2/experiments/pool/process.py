"""A worker process as its owner sees it: started, sent jobs, and ended with all that it started.

A pidfd shows its death: the end of a pipe, or `Process.sentinel`, shows nothing while a grandchild
is alive. Each worker has a socket of its own: a queue that several processes share blocks for ever
when a writer is killed in the middle of a put.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Protocol

from gpt2.experiments.pool import worker
from gpt2.experiments.pool.channel import Channel
from gpt2.experiments.pool.job import Slot
from gpt2.experiments.pool.messages import Message


class Worker(Protocol):
    """What the scheduler needs of a worker process, here or on another machine."""

    log: Path
    pid: int
    """0 until it runs: no machine of a cluster may have room for it yet"""
    host: str
    """its machine; empty if that is the owner's"""
    machine_is_lost: bool
    """whether it ended because its machine did, which is not the job's fault"""

    @property
    def handles(self) -> list[int]:
        """File descriptors that become readable when the worker sends a message, starts or dies."""
        ...

    @property
    def has_ended(self) -> bool: ...

    def send(self, message: Message) -> None:
        """Does nothing if the worker is dead."""
        ...

    def receive(self) -> list[Message]:
        """The messages that have arrived whole, without waiting."""
        ...

    def signal(self, number: int) -> None: ...

    def end_when_idle(self) -> None:
        """Lets it end as soon as it has no job."""
        ...

    def kill(self) -> None:
        """Sends SIGKILL to the worker and to all that it started."""
        ...

    def collect_exit_status(self) -> str:
        """For a worker that has ended: kills what it left running, and says how it ended."""
        ...


class WorkerProcess:
    """A new process on a slot of this machine; it runs `worker.serve`."""

    host = ""
    machine_is_lost = False

    def __init__(self, slot: Slot, log: Path) -> None:
        """Starts it; raises OSError if the system cannot start another process."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        own_end, its_end = socket.socketpair()
        self._channel = Channel(own_end)
        self._process = multiprocessing.get_context("spawn").Process(
            target=worker.serve,
            args=(its_end, os.getpid(), log.resolve(), sys.path),
            name=slot.name,
        )
        resource_tracker.ensure_running()  # its start would unblock the signal again
        with its_end, _environment(slot.environment):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until it has a session
            try:
                try:
                    self._process.start()
                except BrokenPipeError:  # it was killed before it read what it is to run
                    self._process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)
        """becomes readable when it dies"""

    @property
    def handles(self) -> list[int]:
        return [self.pidfd] if self._channel.is_closed else [self.pidfd, self._channel.fileno()]

    @property
    def has_ended(self) -> bool:
        return bool(wait([self.pidfd], 0))

    def send(self, message: Message) -> None:
        with contextlib.suppress(OSError):  # it is dead, which its pidfd shows
            self._channel.send(message)

    def receive(self) -> list[Message]:
        return self._channel.receive()

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def end_when_idle(self) -> None:
        self._channel.end_sending()

    def kill(self) -> None:
        self.signal(signal.SIGKILL)  # also before it has a process group of its own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def collect_exit_status(self) -> str:
        self.kill()
        self._process.join()
        code = self._process.exitcode or 0
        self._process.close()
        self._channel.close()
        os.close(self.pidfd)
        if code >= 0:
            return f"its process ended with exit code {code}"
        name = signal.Signals(-code).name
        note = " (as the kernel does when the memory runs out)" if name == "SIGKILL" else ""
        return f"its process was killed by {name}{note}"


@dataclass(frozen=True)
class Engine:
    """Where the jobs of an experiment run: this machine, or a cluster (`ray_engine.connected`)."""

    slots: Sequence[Slot]
    start_worker: Callable[[Slot, Path], Worker] = WorkerProcess
    """starts a worker on a slot, which writes to the log; raises OSError if it cannot be started"""
    is_fixed: bool = True
    """whether a slot is always the same GPU or cores, which may be broken"""


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables within the block."""
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
