"""A training on several GPUs, hosted by one worker: it starts torchrun, and every rank connects to
it.

A rank says that it is here, and gets what it is to train; rank 0 reports, and each report is
answered through the worker by the owner; at the end each rank tells its result or its error. The
socket has a name in Linux's abstract namespace, which leaves no file behind when the host is
killed; who connects is known to be the same user by the kernel.
"""

import contextlib
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self

from gpt2.distributed.device import THREADS
from gpt2.distributed.signals import StopRequest
from gpt2.experiments.pool.job import JobLost, Stopped
from gpt2.train.report import Answer

RANK = "gpt2.experiments.training.ddp_rank"
POLL_S = 0.2
"""how soon a signal is noticed"""


def on_ranks(report: Callable[..., Answer], work: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The result of `training.run(report, **work)` on `count` ranks, as rank 0 tells it.

    Raises what the first rank has raised that fails, Stopped too; and JobLost if a rank dies.
    """
    with StopRequest() as stop, _Host(report, work, count) as host:
        while not host.is_over:
            host.take_in()
            if stop.number:
                host.stop()
        return host.outcome()


@dataclass(eq=False)
class _Rank:
    """A rank that has connected."""

    connection: Connection
    death: int
    """readable when it is dead; its connection may not end, if something that it started lives"""
    number: int | None = None
    is_done: bool = False
    """whether it has told its result or error"""

    def send(self, word: str, value: Any = None) -> None:
        with contextlib.suppress(OSError):  # it is dead: its end is heard next
            self.connection.send((word, value))

    def close(self) -> None:
        self.connection.close()
        os.close(self.death)


class _Host:
    """torchrun, and the connections of its ranks; what still lives at the end is killed."""

    def __init__(self, report: Callable[..., Answer], work: Mapping[str, Any], count: int) -> None:
        self._report, self._work = report, dict(work)
        self._ranks: list[_Rank] = []
        """those that are connected"""
        self._result: dict[str, Any] | None = None
        self._failure: Exception | None = None
        """the first one: others follow from it"""
        self._is_stopping = self._has_ended = False
        address = f"gpt2-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"\0{address}")
        self._listener.listen(count)
        self._torchrun = subprocess.Popen(
            command(count, address),
            stdin=subprocess.DEVNULL,
            env=os.environ | _same_modules() | _same_threads(),
        )
        self._death = os.pidfd_open(self._torchrun.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _where: TracebackType | None,
    ) -> None:
        self._torchrun.kill()  # ranks that have not connected yet die with it
        self._torchrun.wait()
        for rank in self._ranks:  # the others when their connection ends
            rank.close()
        self._listener.close()
        os.close(self._death)

    @property
    def is_over(self) -> bool:
        """A rank outlives torchrun if somebody kills that: it saves first."""
        return self._has_ended and not self._ranks

    def take_in(self) -> None:
        """Waits for something to happen to a rank or torchrun, and deals with it."""
        ranks = {handle: rank for rank in self._ranks for handle in (rank.connection, rank.death)}
        sources: list[Any] = [*ranks]
        if not self._has_ended:
            sources += [self._listener, self._death]
        for ready in wait(sources, POLL_S):
            if rank := ranks.get(ready):  # type: ignore[arg-type]
                if rank in self._ranks:
                    self._hear(rank, is_dead=ready == rank.death)
            elif ready is self._listener:
                self._let_in()
            else:
                self._torchrun.wait()
                self._has_ended = True

    def stop(self) -> None:
        """Asks all ranks to, once. Not through torchrun, which kills its ranks 30 s later: that
        may be in the middle of a save, and the owner has its own time for it (--grace)."""
        if not self._is_stopping:
            self._is_stopping = True
            for rank in self._ranks:
                rank.send("stop")

    def outcome(self) -> dict[str, Any]:
        """The result, when all is over; raises if there is none."""
        if self._result is not None:  # rank 0 has it when all is done and saved
            return self._result
        code = self._torchrun.returncode
        if code < 0 and isinstance(self._failure, Stopped):  # which is why they have stopped
            raise JobLost(f"torchrun was killed by {signal.Signals(-code).name}; the ranks saved")
        raise self._failure or JobLost(
            f"torchrun ended with exit code {code}, and without a result"
        )

    def _let_in(self) -> None:
        channel, _ = self._listener.accept()
        pid, user = peer(channel)
        try:
            death = os.pidfd_open(pid) if user == os.getuid() else None
        except ProcessLookupError:  # it is dead already: torchrun will say so
            death = None
        if death is None:
            channel.close()
            return
        rank = _Rank(Connection(channel.detach()), death)
        self._ranks.append(rank)
        rank.send("work", self._work)
        if self._is_stopping:
            rank.send("stop")

    def _hear(self, rank: _Rank, is_dead: bool) -> None:
        """All that the rank has said; nothing more comes if it is dead."""
        messages: list[tuple[str, Any]] = []
        try:
            while rank.connection.poll():
                messages.append(rank.connection.recv())
        except (EOFError, OSError):
            is_dead = True
        for word, value in messages:
            self._on_message(rank, word, value)
        if is_dead:
            self._ranks.remove(rank)
            rank.close()
            if not rank.is_done:
                name = "a rank" if rank.number is None else f"rank {rank.number}"
                self._failure = self._failure or JobLost(f"{name} died without a word")

    def _on_message(self, rank: _Rank, word: str, value: Any) -> None:
        if word == "here":
            rank.number = value
        elif word == "report":
            rank.send("answer", self._report(**value))
        else:
            rank.is_done = True
            if word == "raised":
                self._failure = self._failure or value
            elif rank.number == 0:
                self._result = value


def command(count: int, address: str) -> list[str]:
    """What starts the ranks, which find their host at `address`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return [sys.executable, *launcher, "-m", RANK, address]


def connect(address: str) -> Connection:
    """A rank's connection to its host."""
    channel = socket.socket(socket.AF_UNIX)
    channel.connect(f"\0{address}")
    if peer(channel)[1] != os.getuid():
        raise PermissionError(f"the socket {address} belongs to another user")
    return Connection(channel.detach())


def peer(channel: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, as the kernel knows them."""
    size = struct.calcsize("3i")
    credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid, user, _group = struct.unpack("3i", credentials)
    return pid, user


def _same_modules() -> dict[str, str]:
    """Variables with which a Python process finds the modules that this one does, and no others
    that lie in the current folder."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}


def _same_threads() -> dict[str, str]:
    """The threads of each rank: what the slot says."""
    given = os.environ.get("OMP_NUM_THREADS")
    return {THREADS: given} if given else {}
