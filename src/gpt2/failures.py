"""When a rank fails, hangs or loses torchrun, the others end soon and say why.

A failing rank leaves a note in the store that torchrun keeps for all ranks, before its connections
close; a thread on every rank looks for such a note once a second, since the main thread may wait in
a collective for ever. The same thread notices that torchrun is gone.
"""

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import traceback
from types import TracebackType
from typing import TYPE_CHECKING, Self

from gpt2.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and `end_with_torchrun` must not wait for it
    from torch._C._distributed_c10d import Store

NOTE = "gpt2/failed"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOOK_EVERY_S = 1.0
GRACE_S = 30.0
"""for saving when torchrun is gone, as long as torchrun itself gives"""
FAREWELL_S = 5.0
"""for the main thread to end by itself when another rank has failed"""
CONTACT_LOST = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out")


class Watch:
    """For as long as the block runs, this rank and the others know of each other's failures."""

    def __init__(self, rank: int, store: "Store", timeout_s: float) -> None:
        self._rank, self._store, self._timeout_s = rank, store, timeout_s
        self._parent = os.getppid()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="failures", daemon=True)

    def __enter__(self) -> Self:
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
        if isinstance(error, Exception) and not isinstance(error, UserError):
            self._fail(error)
        self._over.set()
        self._thread.join()

    def first_to_fail(self) -> int | None:
        """Notes that this rank fails, and returns the first that did; None without a store."""
        try:
            return int(self._store.compare_set(NOTE, "", str(self._rank)))
        except Exception:  # the store died with torchrun, or its machine
            return None

    def _fail(self, error: Exception) -> None:
        """Ends this process: with its traceback if it is the first that failed, else in a line."""
        lost = _is_contact_lost(error)
        if lost:
            self._over.wait(LOOK_EVERY_S)  # whoever closed the connection may just leave its note
        first = self.first_to_fail()
        if first not in (None, self._rank):
            _say(f"rank {self._rank} ends, because rank {first} failed")
        elif lost and "Timed out" in str(error):
            where = "".join(traceback.format_exception(error))
            _say(
                f"rank {self._rank} has had no answer from another rank for "
                f"{self._timeout_s:g} s (--collective_timeout): one hangs. It waited here:\n{where}"
            )
        elif lost:
            words = str(error).rpartition("] ")[2].partition(". ")[0]
            _say(
                f"rank {self._rank} has lost another rank, which was killed, or its machine is "
                f"gone ({words})"
            )
        else:
            _say(f"rank {self._rank} failed:\n{''.join(traceback.format_exception(error))}")
        os._exit(1)  # an orderly end would wait for ranks that are gone

    def _look(self) -> None:
        watched = True
        while not self._over.wait(LOOK_EVERY_S):
            if os.getppid() != self._parent:
                _say(f"rank {self._rank}: torchrun is gone")
                os.kill(os.getpid(), signal.SIGTERM)  # a run in its loop saves, any other ends
                if not self._over.wait(GRACE_S):
                    os._exit(1)
                return
            try:
                failed = watched and self._store.check([NOTE])
            except Exception:  # the machine that keeps the store is gone; collectives will tell
                watched = False
                continue
            if failed:
                if not self._over.wait(FAREWELL_S):
                    first = self._store.get(NOTE).decode()
                    _say(f"rank {self._rank} is ended, because rank {first} failed")
                    os._exit(1)
                return


def end_with_torchrun() -> None:
    """Until a `Watch` begins: SIGKILL when torchrun dies, whatever kills it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # a run without torchrun outlives its shell
        return
    parent = os.getppid()
    _on_death_of_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def _on_death_of_parent(number: int) -> None:
    """A signal from the kernel; it may come several times, once for each thread of the parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _is_contact_lost(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error) for word in CONTACT_LOST)


def _say(text: str) -> None:
    sys.stderr.write(text.rstrip() + "\n")
    sys.stderr.flush()
