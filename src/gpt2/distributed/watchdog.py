"""Ends the other ranks soon, with a reason, when one rank fails, hangs or loses torchrun.

A rank that fails writes its failure to the store that torchrun keeps for all ranks, before its
connections close. A thread on every rank reads the store once per second, because the main thread
may wait in a collective for ever. The same thread notices when torchrun has died.
"""

import contextlib
import ctypes
import faulthandler
import json
import logging
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from gpt2.base.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and `end_with_torchrun` must not wait for it
    from torch._C._distributed_c10d import Store

logger = logging.getLogger(__name__)

FAILURE_KEY = "gpt2/failed"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
POLL_S = 1.0
SAVE_GRACE_S = 30.0
"""time to save after torchrun has died; torchrun itself grants as much"""
EXIT_GRACE_S, WRITING_GRACE_S = 5.0, 25.0
"""time for the main thread to exit after another rank has failed: normally, and while it writes"""
STORE_TIMEOUT_S = 3.0
"""for a reply of the store, which may have died, or hang, as well"""
TORCHRUN_IS_GONE = signal.SIGUSR2
CONTACT_LOST = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out")


@dataclass(frozen=True)
class Failure:
    """Which rank failed, and why."""

    rank: int
    reason: str


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
    ) -> None:
        """`timeout_s` is the timeout of collectives, for messages.

        `on_failure` is called before this process exits, with the error that ends it. It is called
        only on the rank that fails first, and not for a UserError, which is raised instead.
        """
        self._rank, self._store, self._timeout_s = rank, store, timeout_s
        self._on_failure = on_failure
        self._is_writing: Callable[[], bool] = lambda: False
        self._parent = os.getppid()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if is_under_torchrun():
            faulthandler.enable()  # also when NCCL's own watchdog aborts the process
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
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join(STORE_TIMEOUT_S)

    def wait_while(self, is_writing: Callable[[], bool]) -> None:
        """Extends the time to exit after another rank's failure to WRITING_GRACE_S while
        `is_writing()` is true, so that a file that is nearly complete is not lost.

        `is_writing` is called by the watchdog's thread.
        """
        self._is_writing = is_writing

    def first_to_fail(self, reason: str) -> "Failure | None":
        """Records the failure of this rank and returns the first failure of any rank.

        None if there is no store, or it does not reply.
        """
        mine = json.dumps(asdict(Failure(self._rank, reason)))
        return self._query(lambda store: store.compare_set(FAILURE_KEY, "", mine))

    def reason(self, error: BaseException) -> str:
        """Why this rank ends with `error`: the other rank's reason if `error` is a lost contact."""
        first = None
        if isinstance(error, Exception) and is_contact_lost(error):
            self._wait_for_others_failure()
            first = self._query(
                lambda store: store.get(FAILURE_KEY) if store.check([FAILURE_KEY]) else b""
            )
        return f"rank {first.rank}: {first.reason}" if first else _description(error)

    def _query(self, query: "Callable[[Store], bytes]") -> "Failure | None":
        """The failure that `query` reads from the store, within STORE_TIMEOUT_S."""
        if (store := self._store) is None:
            return None
        replies: queue.SimpleQueue[Failure] = queue.SimpleQueue()

        def run() -> None:
            with contextlib.suppress(Exception):  # the store died with torchrun, or its machine
                replies.put(Failure(**json.loads(query(store))))

        threading.Thread(target=run, daemon=True).start()
        try:
            return replies.get(timeout=STORE_TIMEOUT_S)
        except queue.Empty:
            return None

    def _wait_for_others_failure(self) -> None:
        """A rank that closed its connection may be about to record why."""
        self._is_over.wait(POLL_S)

    def _exit_process(self, error: Exception) -> None:
        """Ends this process with exit code 1. Logs the traceback if this rank failed first."""
        is_lost = is_contact_lost(error)
        if is_lost:
            self._wait_for_others_failure()
        first = self.first_to_fail(_description(error))
        trace = "".join(traceback.format_exception(error)).rstrip()
        if is_lost and "Timed out" in str(error):
            # Every rank that still runs logs this. The rank that hangs logs nothing.
            logger.error(
                "rank %d got no reply from another rank within %g s (--collective_timeout): a rank "
                "hangs. This rank waited here:\n%s",
                self._rank,
                self._timeout_s,
                trace,
            )
        elif first is not None and first.rank != self._rank:
            logger.error("rank %d exits because rank %d failed", self._rank, first.rank)
        elif is_lost:
            logger.error(
                "rank %d lost the connection to another rank, which was killed or whose machine is "
                "down (%s)",
                self._rank,
                str(error).rpartition("] ")[2].partition(". ")[0],
            )
        else:
            logger.error("rank %d failed:\n%s", self._rank, trace)
            if self._on_failure is not None:
                with contextlib.suppress(Exception):  # the process must exit in any case
                    self._on_failure(error)
        os._exit(1)  # an orderly exit would wait for ranks that no longer run

    def _poll(self) -> None:
        """The thread: ends this process when torchrun has died or another rank has failed."""
        store = self._store
        while not self._is_over.wait(POLL_S):
            if os.getppid() != self._parent:
                logger.error("rank %d: torchrun has died", self._rank)
                os.kill(os.getpid(), TORCHRUN_IS_GONE)  # a run in its loop saves, any other ends
                if not self._is_over.wait(SAVE_GRACE_S):
                    os._exit(1)
                return
            try:
                has_failure = store is not None and store.check([FAILURE_KEY])
            except Exception:  # the machine with the store is down; collectives will fail, too
                store = None
                continue
            if has_failure:
                if not self._main_thread_exits():
                    logger.error("rank %d is ended because another rank failed", self._rank)
                    os._exit(1)
                return

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


def is_under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_contact_lost(error: Exception) -> bool:
    """Whether `error` says that another rank died or hangs, which is not a bug in this rank."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in CONTACT_LOST)


def _set_parent_death_signal(number: int) -> None:
    """Sets the signal that the kernel sends when a thread of the parent dies; 0 is none."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _description(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
