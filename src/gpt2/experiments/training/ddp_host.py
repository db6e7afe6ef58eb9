"""A training on several GPUs, hosted by one worker process.

The worker calls `run_on_ranks`, which starts torchrun; torchrun starts the ranks, each of which
runs `ddp_rank.main` and connects to the host. Host and ranks exchange `pool.messages`: a rank sends
RankConnected and gets RunTraining; rank 0 sends JobReported, which the host forwards to the owner,
and gets the owner's Reply; at the end each rank sends RankFinished or RankFailed.

The socket has a name in Linux's abstract namespace, which leaves no file behind when the host is
killed. Host and ranks refuse a peer that the kernel says is another user.
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
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Self

import torch

from gpt2.base import errors
from gpt2.distributed.device import THREADS
from gpt2.distributed.signals import StopRequest
from gpt2.experiments.pool.channel import Channel
from gpt2.experiments.pool.job import JobLost, Stopped
from gpt2.experiments.pool.messages import (
    JobReported,
    Message,
    RankConnected,
    RankFailed,
    RankFinished,
    Reply,
    RunTraining,
    StopTraining,
)
from gpt2.train.report import Answer

RANK_MODULE = "gpt2.experiments.training.ddp_rank"
POLL_S = 0.2
"""how soon a signal is noticed"""
ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        errors.UserError,
        errors.ConfigError,
        errors.DataError,
        errors.TrainingError,
        errors.Diverged,
        errors.FolderInUse,
        errors.CheckpointError,
        Stopped,
        JobLost,
        MemoryError,
        RuntimeError,
        torch.OutOfMemoryError,
    )
}
"""what a rank raises that its host raises again as the same class, by name"""


def run_on_ranks(
    report: Callable[..., Answer], kwargs: Mapping[str, Any], count: int
) -> dict[str, Any]:
    """The result of `training_job.run(report, **kwargs)` on `count` ranks: that of rank 0.

    Raises the first error of a rank, Stopped included, and JobLost if a rank dies.
    """
    with StopRequest() as stop, _Host(report, kwargs, count) as host:
        while not host.is_over:
            host.handle_ranks()
            if stop.number:
                host.stop()
        return host.result()


@dataclass(eq=False)
class _Rank:
    """A rank that has connected."""

    channel: Channel
    death: int
    """pidfd, readable when the rank is dead; its channel may stay open, if a child of it lives"""
    number: int | None = None
    has_ended: bool = False
    """whether it has sent its result or error"""

    def send(self, message: Message) -> None:
        with contextlib.suppress(OSError):  # it is dead, which `death` shows
            self.channel.send(message)

    def close(self) -> None:
        self.channel.close()
        os.close(self.death)


class _Host:
    """torchrun and the channels to its ranks; on exit, what still lives is killed."""

    def __init__(
        self, report: Callable[..., Answer], kwargs: Mapping[str, Any], count: int
    ) -> None:
        self._report, self._kwargs = report, kwargs
        self._ranks: list[_Rank] = []
        """those that are connected"""
        self._result: Mapping[str, Any] | None = None
        self._error: Exception | None = None
        """the first one: others follow from it"""
        self._is_stopping = self._torchrun_has_ended = False
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
        for rank in self._ranks:  # the others die when their channel closes
            rank.close()
        self._listener.close()
        os.close(self._death)

    @property
    def is_over(self) -> bool:
        """Whether torchrun and all ranks have ended. A rank outlives a torchrun that was killed: it
        saves first."""
        return self._torchrun_has_ended and not self._ranks

    def handle_ranks(self) -> None:
        """Waits until a rank connects, sends messages or dies, or torchrun ends, POLL_S at most,
        and handles that."""
        ranks = {handle: rank for rank in self._ranks for handle in (rank.channel, rank.death)}
        sources: list[Any] = [*ranks]
        if not self._torchrun_has_ended:
            sources += [self._listener, self._death]
        for ready in wait(sources, POLL_S):
            if rank := ranks.get(ready):  # type: ignore[arg-type]
                if rank in self._ranks:
                    self._receive(rank, is_dead=ready == rank.death)
            elif ready is self._listener:
                self._accept()
            else:
                self._torchrun.wait()
                self._torchrun_has_ended = True

    def stop(self) -> None:
        """Requests all ranks to stop, once. Not through torchrun, which kills its ranks after 30 s,
        perhaps in the middle of a save: the owner has a time limit of its own (--grace)."""
        if not self._is_stopping:
            self._is_stopping = True
            for rank in self._ranks:
                rank.send(StopTraining())

    def result(self) -> dict[str, Any]:
        """The result, when all is over; raises if there is none."""
        if self._result is not None:  # rank 0 sends it after everything is saved
            return dict(self._result)
        code = self._torchrun.returncode
        if code < 0 and isinstance(self._error, Stopped):  # the death of torchrun stopped them
            name = signal.Signals(-code).name
            raise JobLost(f"torchrun was killed by {name}; the ranks saved")
        raise self._error or JobLost(f"torchrun ended with exit code {code} and without a result")

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        pid, user = peer(connection)
        try:
            death = os.pidfd_open(pid) if user == os.getuid() else None
        except ProcessLookupError:  # it is dead already, which torchrun reports
            death = None
        if death is None:
            connection.close()
            return
        rank = _Rank(Channel(connection), death)
        self._ranks.append(rank)
        rank.send(RunTraining(self._kwargs))
        if self._is_stopping:
            rank.send(StopTraining())

    def _receive(self, rank: _Rank, is_dead: bool) -> None:
        """Handles all that the rank has sent; a dead one sends no more."""
        for message in rank.channel.receive():
            self._on_message(rank, message)
        if is_dead or rank.channel.is_closed:
            self._ranks.remove(rank)
            rank.close()
            if not rank.has_ended:
                name = "a rank" if rank.number is None else f"rank {rank.number}"
                self._error = self._error or JobLost(f"{name} died without reporting an error")

    def _on_message(self, rank: _Rank, message: Message) -> None:
        match message:
            case RankConnected(number):
                rank.number = number
            case JobReported(metrics):
                rank.send(Reply(self._report(**metrics)))
            case RankFinished(result):
                rank.has_ended = True
                if rank.number == 0:
                    self._result = result
            case RankFailed():
                rank.has_ended = True
                self._error = self._error or _error_of(message, rank.number)
            case _:
                raise AssertionError(f"a rank sent {message}")


def _error_of(failed: RankFailed, rank: int | None) -> Exception:
    """The error that the rank raised, or a RuntimeError with its class's name if that is not in
    ERRORS; the rank's traceback is a note of it."""
    kind = ERRORS.get(failed.error)
    error = kind(failed.text) if kind else RuntimeError(f"{failed.error}: {failed.text}")
    error.add_note(f"On rank {rank}:\n{failed.traceback}")
    return error


def command(count: int, address: str) -> list[str]:
    """The command that starts the ranks; they find their host at `address`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return [sys.executable, *launcher, "-m", RANK_MODULE, address]


def connect(address: str) -> Channel:
    """A rank's channel to its host."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"\0{address}")
    if peer(connection)[1] != os.getuid():
        raise PermissionError(f"the socket {address} belongs to another user")
    return Channel(connection)


def peer(connection: socket.socket) -> tuple[int, int]:
    """pid and user id of the process at the other end, from the kernel."""
    size = struct.calcsize("3i")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid, user, _group = struct.unpack("3i", credentials)
    return pid, user


def _same_modules() -> dict[str, str]:
    """Variables with which a Python process finds the modules that this one does, and none that
    only the current folder has."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}


def _same_threads() -> dict[str, str]:
    """The threads of each rank, as the slot sets them."""
    given = os.environ.get("OMP_NUM_THREADS")
    return {THREADS: given} if given else {}
