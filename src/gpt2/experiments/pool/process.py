"""A worker process as its owner sees it: started, sent jobs, and ended with all that it started.

A pidfd shows its death: the end of a pipe, or `Process.sentinel`, shows nothing while a grandchild
is alive. Each worker has a pipe of its own: a queue that several processes share blocks for ever
when a writer is killed in the middle of a put.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

from gpt2.base import regular_file
from gpt2.experiments.pool import worker
from gpt2.experiments.pool.job import Job, Slot
from gpt2.experiments.pool.messages import Message, Reply, WorkerEnded

PROGRAM = """
import sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
owner, sys.path[:], sys.argv = connection.recv()
from gpt2.experiments.pool import worker
worker.serve(connection, owner)
"""
"""what the new process runs"""
# As `multiprocessing` gets them, such as -O, -W and -X. -P: what the process imports first is not
# in the current folder.
OPTIONS = [*subprocess._args_from_interpreter_flags(), "-P"]  # type: ignore[attr-defined]
"""those of the Python that this process runs in"""
DEATH_S = 15.0
"""for SIGKILL to work: a process that waits for a broken device does not die"""


class Worker(Protocol):
    """What the scheduler needs of a worker process, here or on another machine.

    It puts what the process sends into the scheduler's inbox, and WorkerEnded at the end, whatever
    happens. None of the methods waits or raises an error if the process is dead.
    """

    log: Path
    pid: int
    """known when a job is loading"""
    host: str
    """its machine; empty if that is the owner's"""

    def send(self, message: Job | Reply | None) -> None:
        """None lets it end as soon as it has no job."""
        ...

    def signal(self, number: int) -> None:
        """SIGTERM requests its job to stop, `worker.SHOW_STACK` shows where it hangs, and SIGKILL
        also ends all that it started."""
        ...


Inbox = SimpleQueue[tuple[Worker, Message]]


class WorkerProcess:
    """A new process on a slot of this machine; it runs `worker.serve`."""

    host = ""

    def __init__(self, slot: Slot, log: Path | None, inbox: Inbox) -> None:
        """Starts it; raises OSError if the system cannot start another process, or open the log.

        Without a log it is a part of this process: it writes to the same files, is in the same
        process group, and must be ended before this process ends.
        """
        self.log = log or Path(os.devnull)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._connection, its_end = multiprocessing.Pipe()
        self._killed_at: float | None = None
        # The worker cannot handle these signals at first, and the thread never should.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, worker.SIGNALS)
        try:
            with its_end, regular_file.open_to_append(self.log) as output:
                self._process = subprocess.Popen(
                    [sys.executable, *OPTIONS, "-c", PROGRAM, str(its_end.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=output if log else None,
                    stderr=output if log else None,
                    env=os.environ | slot.environment,
                    pass_fds=[its_end.fileno()],
                    # Ctrl+C reaches the owner alone, which requests its workers to stop.
                    start_new_session=log is not None,
                )
            self.pid = self._process.pid
            self._death = os.pidfd_open(self.pid)
            """becomes readable when it dies"""
            weakref.finalize(self, os.close, self._death)
            with contextlib.suppress(OSError):  # it is dead
                self._connection.send((os.getpid() if log else None, sys.path, sys.argv))
            threading.Thread(target=self._receive, args=(inbox,), daemon=True).start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)

    def send(self, message: Job | Reply | None) -> None:
        with contextlib.suppress(OSError):  # it is dead
            self._connection.send(message)

    def signal(self, number: int) -> None:
        if number == signal.SIGKILL:
            self._killed_at = self._killed_at or time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._death, number)

    def _receive(self, inbox: Inbox) -> None:
        """The thread: receives until the process is dead, and ends what it has left running."""
        sources: list[object] = [self._connection, self._death]
        while (ready := wait(sources, DEATH_S)) != [self._death]:  # type: ignore[arg-type]
            if ready:
                try:
                    inbox.put((self, self._connection.recv()))
                except (EOFError, OSError):
                    sources.remove(self._connection)
            elif self._killed_at and time.monotonic() > self._killed_at + DEATH_S:
                reason = f"process {self.pid} cannot be killed"
                return inbox.put((self, WorkerEnded(reason, lost="slot")))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(EOFError, OSError):
            while self._connection.poll():  # sent since `wait` looked at the pipe
                inbox.put((self, self._connection.recv()))
        inbox.put((self, _ended(self._process.wait())))


@dataclass(frozen=True)
class Engine:
    """Where the jobs of an experiment run: this machine, or a cluster (`ray_engine.connected`)."""

    slots: Sequence[Slot]
    start_worker: Callable[[Slot, Path, Inbox], Worker] = WorkerProcess
    """starts a worker on a slot, which writes to the log; raises OSError if it cannot be started"""


def _ended(exit_code: int) -> WorkerEnded:
    if exit_code == worker.UNGUARDED:
        script = getattr(sys.modules["__main__"], "__file__", None) or "the script"
        reason = (
            f"{script} starts jobs when it is imported, which every worker does; {worker.GUARD}"
        )
        return WorkerEnded(reason, lost="script")
    if exit_code >= 0:
        return WorkerEnded(f"its process ended with exit code {exit_code}")
    is_named = -exit_code in {*signal.Signals}  # most of the real-time signals are not
    name = signal.Signals(-exit_code).name if is_named else f"signal {-exit_code}"
    note = " (as the kernel does when the memory runs out)" if name == "SIGKILL" else ""
    return WorkerEnded(f"its process was killed by {name}{note}")
