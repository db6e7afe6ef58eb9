"""A worker process as its owner sees it: started, spoken to, and ended with all that it started.

Its death is known by a pidfd: a pipe's end and `Process.sentinel` tell nothing while a grandchild
lives. It has a socket of its own: a shared queue hangs for ever when a writer is killed in a put.
"""

import contextlib
import json
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
from typing import Any, Protocol

from gpt2.experiments.pool import worker
from gpt2.experiments.pool.job import Slot

RECEIVE_BYTES = 1 << 18


class Worker(Protocol):
    """What a pool knows of a worker process, here or on another machine."""

    log: Path
    pid: int
    """0 until it runs: another machine may have no room for it yet"""
    host: str
    """the machine that it runs on; empty if that is this one"""
    machine_is_lost: bool
    """whether it has ended because its machine has, which no job is to blame for"""

    @property
    def handles(self) -> list[int]:
        """What becomes readable when the worker says something, runs, or dies."""
        ...

    @property
    def has_ended(self) -> bool: ...

    def send(self, message: Any) -> None: ...

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come whole."""
        ...

    def signal(self, number: int) -> None: ...

    def end_when_idle(self) -> None:
        """Lets it end when it has nothing to do."""
        ...

    def kill(self) -> None:
        """SIGKILL to the worker and to all that it started."""
        ...

    def collect_exit_status(self) -> str:
        """Ends what a dead worker has started, and says how it died."""
        ...


class WorkerProcess:
    """A fresh process on a slot of this machine that runs the jobs which it is sent."""

    host = ""
    machine_is_lost = False

    def __init__(self, slot: Slot, log: Path) -> None:
        """Starts it; raises OSError if the system has no room for one more."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self._channel, theirs = socket.socketpair()
        self._process = multiprocessing.get_context("spawn").Process(
            target=worker.serve, args=(theirs, os.getpid(), log.resolve(), sys.path), name=slot.name
        )
        self._received: list[bytes] = []
        self._has_hung_up = False
        resource_tracker.ensure_running()  # its start would unblock the signal again
        with theirs, _environment(slot.environment):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until it has a session
            try:
                try:
                    self._process.start()
                except BrokenPipeError:  # it was killed before it had read what it is to do
                    self._process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)
        """becomes readable when it dies"""

    @property
    def handles(self) -> list[int]:
        """What becomes readable when the worker says something or dies."""
        return [self.pidfd] if self._has_hung_up else [self.pidfd, self._channel.fileno()]

    @property
    def has_ended(self) -> bool:
        return bool(wait([self.pidfd], 0))

    def send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # it is dead: its pidfd tells
            self._channel.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come whole; part of one, from a worker that was killed, is
        none."""
        lines: list[bytes] = []
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while data := self._channel.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT):
                self._received.append(data)
                if b"\n" in data:
                    *more, rest = b"".join(self._received).split(b"\n")
                    lines += more
                    self._received = [rest]
            self._has_hung_up = True
        return [json.loads(line) for line in lines]

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def end_when_idle(self) -> None:
        """Lets it end when it has nothing to do."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """SIGKILL to the worker and to all that it started."""
        self.signal(signal.SIGKILL)  # before it has a group of its own, too
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def collect_exit_status(self) -> str:
        """Ends what a dead worker has started, and says how it died."""
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
    """Where the jobs of an experiment run."""

    slots: Sequence[Slot]
    start_worker: Callable[[Slot, Path], Worker] = WorkerProcess
    """starts a worker on a slot that writes to the log; raises OSError if there is no room"""
    is_fixed: bool = True
    """whether a slot is always the same GPU or cores, which may be broken"""


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
