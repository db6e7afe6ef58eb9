"""One rank of a training that a worker hosts (see `ranks`): what torchrun starts."""

import faulthandler
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from typing import Any

from gpt2.base.errors import Diverged, ReportedByOtherRank
from gpt2.distributed import watchdog
from gpt2.experiments.pool.job import Stopped
from gpt2.experiments.pool.worker import Lines


def main(address: str) -> int:
    """Trains, and tells the host what became of it; the exit code is for torchrun."""
    watchdog.end_with_torchrun()
    sys.stdout = sys.stderr = Lines()
    from gpt2.distributed import (
        rendezvous,  # torch takes seconds to import, and torchrun may die before
    )
    from gpt2.experiments.training import training_job

    host = Host(address, rendezvous.env_rank()[0])
    try:
        result = training_job.run(host.report, **host.work, on_failure=host.tell_error)
        host.tell("result", result)
    except ReportedByOtherRank:
        host.tell("result", None)
    except Exception as error:
        if watchdog.is_contact_lost(error):  # another rank has died: that is what the host sees
            raise
        host.tell_error(error)
        # Raised by all ranks: a 1 would only make torchrun fill the log with a report.
        return 0 if isinstance(error, Stopped | Diverged) else 1
    return 0


class Host:
    """The worker that has started torchrun. When it dies, or gives up, this process does, too: the
    next attempt must not meet it in its folder."""

    def __init__(self, address: str, rank: int) -> None:
        from gpt2.experiments.training import ddp_host

        self._connection = ddp_host.connect(address)
        self._rank = rank
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._is_stopping = False
        self.tell("here", rank)
        _, self.work = self._connection.recv()
        """the keyword arguments of `training.run`"""
        threading.Thread(target=self._listen, name="host", daemon=True).start()

    def tell(self, word: str, value: Any) -> None:
        self._connection.send((word, value))

    def report(self, **metrics: Any) -> Any:
        """The `report` of the training: what the owner answers."""
        self.tell("report", metrics)
        answer = self._answers.get()
        return "stop" if self._is_stopping else answer

    def tell_error(self, error: Exception) -> None:
        """The error itself where it can be sent, else its text; the traceback goes with it."""
        where = "".join(traceback.format_exception(error)).rstrip()
        try:
            sent = pickle.loads(pickle.dumps(error))
        except Exception:  # whatever its class does
            sent = RuntimeError(f"{type(error).__name__}: {error}")
        sent.add_note(f"On rank {self._rank}:\n{where}")
        self.tell("raised", sent)

    def _listen(self) -> None:
        while True:
            try:
                word, value = self._connection.recv()
            except (EOFError, OSError):
                faulthandler.dump_traceback(2)  # perhaps it was killed because this rank hangs
                os.kill(os.getpid(), signal.SIGKILL)
            if word == "answer":
                self._answers.put(value)
            else:
                self._stop()

    def _stop(self) -> None:
        """A training takes the signal itself; before it does, its first report is answered so."""
        self._is_stopping = True
        if callable(signal.getsignal(signal.SIGTERM)):
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
