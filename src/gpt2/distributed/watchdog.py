"""Ends the other ranks soon, with a reason, when one rank fails, hangs or loses torchrun.

A rank that fails writes its failure to the store that torchrun keeps for all ranks, before its
connections close. A rank that only notices a lost connection waits for that, so that all name the
same one, the first that failed. A rank that hangs is the one that has not noticed that a reply is
missing. A thread on every rank reads the store once per second, because the main thread may wait in
a collective for ever. The same thread notices when torchrun or another rank on this machine has
died, and when Ctrl+C is pressed twice: while the main thread waits in C, it does not run Python's
signal handlers.
"""

import contextlib
import ctypes
import faulthandler
import json
import logging
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from gpt2.base import addresses
from gpt2.base.errors import UserError, described
from gpt2.base.process_identity import ProcessIdentity
from gpt2.distributed import lost_rank

if TYPE_CHECKING:  # torch takes seconds to import, and `end_with_torchrun` must not wait for it
    from torch._C._distributed_c10d import Store

logger = logging.getLogger(__name__)
T = TypeVar("T")

FAILURE_KEY = "gpt2/failed"
PROCESS_KEY, LEFT_KEY, NOTICED_KEY = "gpt2/process", "gpt2/left", "gpt2/noticed"
"""with the number of a rank: its ProcessIdentity, that it ended as it should, and that it waited
for another rank in vain"""
PR_SET_PDEATHSIG = 1  # linux/prctl.h
POLL_S = 1.0
SAVE_GRACE_S = 30.0
"""time to save after torchrun has died; torchrun itself grants as much"""
EXIT_GRACE_S, WRITING_GRACE_S = 4.0, 25.0
"""time for the main thread to exit after another rank has failed: normally, and while it writes"""
STORE_TIMEOUT_S = 3.0
"""for a reply of the store, which may have died, or hang, as well"""
TORCHRUN_IS_GONE = signal.SIGUSR2
NOTICED_S = 3 * POLL_S
"""time for the failure of a lost rank to be recorded: by itself, or by the ranks on its machine"""
NOTICED_POLL_S = 0.1


@dataclass(frozen=True)
class Failure:
    """Which rank failed, and why."""

    rank: int
    reason: str
    hangs: bool = False
    """whether other ranks say so, as this one does not answer"""

    def __str__(self) -> str:
        """One line; some reasons have more, such as those of errors in CUDA kernels."""
        return f"rank {self.rank}: {self.reason.partition(chr(10))[0]}"


class Watchdog:
    """A context in which this rank and the others learn of each other's failures.

    A run of one rank has no store. A run without torchrun has nothing to watch.
    """

    def __init__(
        self,
        rank: int,
        store: "Store | None",
        timeout_s: float,
        on_failure: Callable[[Exception], None] | None = None,
        size: int = 1,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`timeout_s` is the timeout of collectives, for messages. `size` is the number of ranks.

        `on_failure` is called before this process exits, with the error that ends it. It is called
        only on the rank that fails first, and not for a UserError, which is raised instead.
        `report` is called on every rank that the watchdog ends, with the first failure of all.
        """
        self._rank, self._store, self._timeout_s = rank, store, timeout_s
        self._on_failure, self._report = on_failure, report
        self._others = [other for other in range(size) if other != rank]
        self._processes: dict[int, ProcessIdentity] = {}
        """of other ranks, as far as they are known"""
        self._is_writing: Callable[[], bool] = lambda: False
        self._before_exit: Callable[[str], None] = lambda _reason: None
        self._parent = os.getppid()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if is_under_torchrun():
            faulthandler.enable()  # also when NCCL's own watchdog aborts the process
            if self._others and self._store:
                own = json.dumps(asdict(ProcessIdentity.own()))
                self._store.set(f"{PROCESS_KEY}/{self._rank}", own)
            # Python writes the number of each signal to it at once, also while it waits in C.
            self._signal_reader, self._signal_writer = socket.socketpair()
            self._signal_writer.setblocking(False)
            signal.set_wakeup_fd(self._signal_writer.fileno(), warn_on_full_buffer=False)
            self._thread.start()
            _set_parent_death_signal(0)
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _where: TracebackType | None,
    ) -> None:
        if self._store and isinstance(error, Exception) and not isinstance(error, UserError):
            self._exit_process(error)
        if is_under_torchrun():
            if error is None:
                self._query(lambda store: store.set(f"{LEFT_KEY}/{self._rank}", ""))
            self._is_over.set()
            signal.set_wakeup_fd(-1)
            self._signal_writer.close()  # wakes the thread
            self._thread.join(STORE_TIMEOUT_S)
            self._signal_reader.close()

    def wait_while(self, is_writing: Callable[[], bool]) -> None:
        """Extends the time to exit after another rank's failure to WRITING_GRACE_S while
        `is_writing()` is true, so that a file that is nearly complete is not lost.

        `is_writing` is called by the watchdog's thread.
        """
        self._is_writing = is_writing

    def call_before_exit(self, function: Callable[[str], None]) -> None:
        """Lets the watchdog's thread call `function` with the reason before it ends the process,
        because the main thread does not exit after another rank's failure."""
        self._before_exit = function

    def first_to_fail(self, reason: str) -> "Failure | None":
        """Records the failure of this rank and returns the first failure of any rank.

        None if there is no store, or it does not reply.
        """
        return self._first_failure(Failure(self._rank, reason))

    def reason(self, error: BaseException) -> str:
        """Why this rank ends with `error`: another rank's failure if `error` is a lost rank."""
        first = self._others_failure(error) if self._has_noticed(error) else None
        return f"rank {first.rank}: {first.reason}" if first else self._description(error)

    def _has_noticed(self, error: BaseException) -> bool:
        """Whether `error` says that another rank, which this run has, died or hangs."""
        return self._store is not None and lost_rank.is_lost(error)

    def _description(self, error: BaseException) -> str:
        """What this rank says of `error`, of which no other rank says the cause."""
        if not self._has_noticed(error):
            return described(error)
        return lost_rank.described(error, self._timeout_s)

    def _first_failure(self, failure: Failure) -> Failure | None:
        """Records `failure` unless there is an earlier one; returns the first."""
        text = json.dumps(asdict(failure))
        first = self._query(lambda store: store.compare_set(FAILURE_KEY, "", text))
        return Failure(**json.loads(first)) if first else None

    def _query(self, query: "Callable[[Store], T]") -> T | None:
        """What `query` reads from the store, within STORE_TIMEOUT_S."""
        if (store := self._store) is None:
            return None
        replies: queue.SimpleQueue[T] = queue.SimpleQueue()

        def run() -> None:
            with contextlib.suppress(Exception):  # the store died with torchrun, or its machine
                replies.put(query(store))

        threading.Thread(target=run, daemon=True).start()
        try:
            return replies.get(timeout=STORE_TIMEOUT_S)
        except queue.Empty:
            return None

    def _others_failure(self, error: BaseException) -> Failure | None:
        """The failure that this rank has noticed by `error`, once it is recorded within NOTICED_S;
        else that of the rank that hangs, if it is known."""

        def recorded(store: "Store") -> Failure | None:
            store.set(f"{NOTICED_KEY}/{self._rank}", "")
            return _recorded(store)

        is_hang = lost_rank.is_without_reply(error)
        # A missing reply closes the connections, by which others notice it: they wait for longer.
        deadline = time.monotonic() + NOTICED_S - is_hang * POLL_S
        while (found := self._query(recorded)) is None and time.monotonic() < deadline:
            self._is_over.wait(NOTICED_POLL_S)
        if found is None and is_hang and (silent := self._query(self._silent_ranks)):
            who = "".join(f", nor from rank {other}" for other in silent[1:])
            reason = f"it hangs: no reply from it{who} within {self._timeout_s:g} s"
            found = self._first_failure(Failure(silent[0], reason, hangs=True))
        return found

    def _silent_ranks(self, store: "Store") -> list[int]:
        """The ranks that run and have not noticed that a reply is missing. Empty if several are all
        others: then this one may be cut off."""
        silent = [
            other
            for other in self._others
            if not store.check([f"{NOTICED_KEY}/{other}"])
            and not store.check([f"{LEFT_KEY}/{other}"])
        ]
        return silent if len(silent) < max(2, len(self._others)) else []

    def _exit_process(self, error: Exception) -> None:
        """Ends this process with exit code 1. Logs the traceback if this rank failed first."""
        is_lost = self._has_noticed(error)
        own = Failure(self._rank, self._description(error))
        found = self._others_failure(error) if is_lost else None
        first = found or self._first_failure(own) or own
        trace = addresses.without_secrets("".join(traceback.format_exception(error)).rstrip())
        if is_lost and lost_rank.is_without_reply(error):
            # Every rank that still runs logs this. The rank that hangs logs nothing.
            logger.error(
                "rank %d got no reply from another rank within %g s (--collective_timeout): %s. "
                "This rank waited here:\n%s",
                self._rank,
                self._timeout_s,
                first if found else "a rank hangs",
                trace,
            )
        elif first.rank != self._rank:
            logger.error("rank %d exits because of %s", self._rank, first)
        elif is_lost:
            logger.error("rank %d %s:\n%s", self._rank, lost_rank.LOST, error)
        else:
            logger.error("rank %d failed:\n%s", self._rank, trace)
            if self._on_failure is not None:
                self._attempt(self._on_failure, error)
        self._exit(1, first)  # an orderly exit would wait for ranks that no longer run

    def _exit(self, code: int, first: Failure | None) -> None:
        """Exits at once, after the report of the first failure."""
        if first is not None:
            self._attempt(self._report, str(first))
        os._exit(code)

    def _attempt(self, function: Callable[[T], None], argument: T) -> None:
        """Calls `function`; logs its error, because the process must exit in any case."""
        try:
            function(argument)
        except Exception:
            logger.exception("rank %d: reporting the failure failed, too", self._rank)

    def _poll(self) -> None:
        """The thread: ends this process when torchrun has died, another rank has failed or died,
        or Ctrl+C is pressed twice."""
        store = self._store
        interrupted = False
        while True:
            for number in self._signals_within(POLL_S):
                if interrupted and number in second_interrupts():
                    self._end_unless_main_thread_exits("Ctrl+C", 128 + signal.SIGINT)
                interrupted |= number == signal.SIGINT
            if self._is_over.is_set():
                return
            if os.getppid() != self._parent:
                logger.error("rank %d: torchrun has died", self._rank)
                os.kill(os.getpid(), TORCHRUN_IS_GONE)  # a run in its loop saves, any other ends
                if not self._is_over.wait(SAVE_GRACE_S):
                    os._exit(1)
                return
            try:
                if store is not None and (gone := self._gone_rank(store)) is not None:
                    self._first_failure(Failure(gone, "its process was killed"))
                failure = _recorded(store) if store is not None else None
            except Exception:  # the machine with the store is down; collectives will fail, too
                store = None
                continue
            if failure is not None:
                if failure.hangs and failure.rank == self._rank:
                    logger.error("rank %d: its main thread is here:\n%s", self._rank, _main_trace())
                self._end_unless_main_thread_exits(str(failure), 1, failure)
                return

    def _signals_within(self, timeout_s: float) -> bytes:
        """The numbers of the signals that have arrived; waits for the first one."""
        if not select.select([self._signal_reader], [], [], timeout_s)[0]:
            return b""
        return self._signal_reader.recv(1024)

    def _gone_rank(self, store: "Store") -> int | None:
        """A rank on this machine whose process has ended and recorded no reason."""
        for other in self._others:
            if other not in self._processes:
                if not store.check([key := f"{PROCESS_KEY}/{other}"]):
                    continue
                self._processes[other] = ProcessIdentity(**json.loads(store.get(key)))
            if self._processes[other].is_gone and not store.check([f"{LEFT_KEY}/{other}"]):
                return other
        return None

    def _end_unless_main_thread_exits(
        self, cause: str, exit_code: int, failure: Failure | None = None
    ) -> None:
        if not self._main_thread_exits():
            logger.error("rank %d is ended because of this: %s", self._rank, cause)
            if failure is not None:
                self._attempt(self._before_exit, f"rank {failure.rank}: {failure.reason}")
            self._exit(exit_code, failure)

    def _main_thread_exits(self) -> bool:
        """Whether the main thread leaves the context by itself, within the time granted."""
        noticed = time.monotonic()
        while time.monotonic() < noticed + WRITING_GRACE_S:
            if time.monotonic() > noticed + EXIT_GRACE_S and not self._is_writing():
                return False
            if self._is_over.wait(POLL_S):
                return True
        return False


def end_with_torchrun() -> None:
    """Until a `Watchdog` is entered: SIGKILL for this process when torchrun dies.

    Without torchrun it does nothing: such a run outlives its shell.
    """
    if not is_under_torchrun():
        return
    parent = os.getppid()
    _set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def second_interrupts() -> tuple[int, ...]:
    """The signals that mean Ctrl+C if there was one before: torchrun forwards it as SIGTERM."""
    return (signal.SIGINT, signal.SIGTERM if is_under_torchrun() else signal.SIGINT)


def is_under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _recorded(store: "Store") -> Failure | None:
    """The first failure of a rank, if there is one."""
    return Failure(**json.loads(store.get(FAILURE_KEY))) if store.check([FAILURE_KEY]) else None


def _main_trace() -> str:
    """Where the main thread of this process is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)).rstrip()


def _set_parent_death_signal(number: int) -> None:
    """Sets the signal that the kernel sends when a thread of the parent dies; 0 is none."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
