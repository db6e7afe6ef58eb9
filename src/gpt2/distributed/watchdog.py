"""When a rank fails, hangs or loses torchrun, the others end soon and say why.

A failing rank leaves a note in the store that torchrun keeps for all ranks, before its connections
close; a thread on every rank looks for such a note once a second, since the main thread may wait in
a collective for ever. The same thread notices that torchrun is gone.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import queue
import signal
import sys
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

NOTE = "gpt2/failed"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOOK_EVERY_S = 1.0
GRACE_S = 30.0
"""for saving when torchrun is gone, as long as torchrun itself gives"""
FAREWELL_S, FAREWELL_WRITING_S = 5.0, 25.0
"""for the main thread to end by itself when another rank has failed, and while it is writing"""
STORE_S = 3.0
"""for an answer of the store, which may have died or hang as well"""
TORCHRUN_IS_GONE = signal.SIGUSR2
CONTACT_LOST = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out")

on_failure: Callable[[Exception], None] | None = None
"""hears of the error with which this rank fails, if it is the first one, before it ends at once"""


@dataclass(frozen=True)
class Failure:
    """Which rank failed, and why."""

    rank: int
    reason: str


class Watchdog:
    """For as long as the block runs, this rank and the others know of each other's failures.

    A run of one rank has no store, and one without torchrun has nothing to watch.
    """

    def __init__(self, rank: int, store: "Store | None", timeout_s: float) -> None:
        self._rank, self._store, self._timeout_s = rank, store, timeout_s
        self.is_writing: Callable[[], bool] = lambda: False
        """whether the death of this process would cost what it is writing"""
        self._parent = os.getppid()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="failures", daemon=True)

    def __enter__(self) -> Self:
        if is_under_torchrun():
            faulthandler.enable()  # also when NCCL's own watchdog aborts the process
            self._thread.start()
            _on_death_of_parent(0)
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _where: TracebackType | None,
    ) -> None:
        if self._store and isinstance(error, Exception) and not isinstance(error, UserError):
            self._fail(error)
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(STORE_S)

    def first_to_fail(self, reason: str) -> "Failure | None":
        """Notes that this rank fails, and returns the first that did; None without a store."""
        mine = json.dumps(asdict(Failure(self._rank, reason)))
        return self._ask(lambda store: store.compare_set(NOTE, "", mine))

    def reason(self, error: BaseException) -> str:
        """Why this rank ends with `error`: where that is the loss of another rank, what it said."""
        first = None
        if isinstance(error, Exception) and is_contact_lost(error):
            self._over.wait(LOOK_EVERY_S)  # whoever closed the connection may just leave its note
            first = self._ask(lambda store: store.get(NOTE) if store.check([NOTE]) else b"")
        return f"rank {first.rank}: {first.reason}" if first else _in_words(error)

    def _ask(self, question: "Callable[[Store], bytes]") -> "Failure | None":
        if (store := self._store) is None:
            return None
        answers: queue.SimpleQueue[Failure] = queue.SimpleQueue()

        def ask() -> None:
            with contextlib.suppress(Exception):  # the store died with torchrun, or its machine
                answers.put(Failure(**json.loads(question(store))))

        threading.Thread(target=ask, daemon=True).start()
        try:
            return answers.get(timeout=STORE_S)
        except queue.Empty:
            return None

    def _fail(self, error: Exception) -> None:
        """Ends this process: with its traceback if it is the first that failed, else in a line."""
        lost = is_contact_lost(error)
        hung = lost and "Timed out" in str(error)
        if lost:
            self._over.wait(LOOK_EVERY_S)  # whoever closed the connection may just leave its note
        first = self.first_to_fail(_in_words(error))
        if hung:  # every rank that lives: who hangs is the one that says nothing
            where = "".join(traceback.format_exception(error))
            _say(
                f"rank {self._rank} has had no answer from another rank for "
                f"{self._timeout_s:g} s (--collective_timeout): one hangs. It waited here:\n{where}"
            )
        elif first is not None and first.rank != self._rank:
            _say(f"rank {self._rank} ends, because rank {first.rank} failed")
        elif lost:
            words = str(error).rpartition("] ")[2].partition(". ")[0]
            _say(
                f"rank {self._rank} has lost another rank, which was killed, or its machine is "
                f"gone ({words})"
            )
        else:
            _say(f"rank {self._rank} failed:\n{''.join(traceback.format_exception(error))}")
            if on_failure is not None:
                with contextlib.suppress(Exception):
                    on_failure(error)
        os._exit(1)  # an orderly end would wait for ranks that are gone

    def _look(self) -> None:
        watched = True
        while not self._over.wait(LOOK_EVERY_S):
            if os.getppid() != self._parent:
                _say(f"rank {self._rank}: torchrun is gone")
                os.kill(os.getpid(), TORCHRUN_IS_GONE)  # a run in its loop saves, any other ends
                if not self._over.wait(GRACE_S):
                    os._exit(1)
                return
            try:
                failed = watched and self._store is not None and self._store.check([NOTE])
            except Exception:  # the machine that keeps the store is gone; collectives will tell
                watched = False
                continue
            if failed:
                if not self._ends_by_itself():
                    _say(f"rank {self._rank} is ended, because another one failed")
                    os._exit(1)
                return

    def _ends_by_itself(self) -> bool:
        """Whether the main thread does, within the time that it has for that."""
        noticed = time.monotonic()
        while time.monotonic() < noticed + FAREWELL_WRITING_S:
            late = time.monotonic() > noticed + FAREWELL_S
            if late and not self.is_writing():
                return False
            if self._over.wait(LOOK_EVERY_S):
                return True
        return False


def end_with_torchrun() -> None:
    """Until a `Watchdog` begins: SIGKILL when torchrun dies, whatever kills it."""
    if not is_under_torchrun():  # such a run outlives its shell
        return
    parent = os.getppid()
    _on_death_of_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def is_under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _on_death_of_parent(number: int) -> None:
    """A signal from the kernel; it may come several times, once for each thread of the parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def is_contact_lost(error: Exception) -> bool:
    """Whether another rank has gone, or hangs, which is no fault of this one."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in CONTACT_LOST)


def _say(text: str) -> None:
    sys.stderr.write(text.rstrip() + "\n")
    sys.stderr.flush()
