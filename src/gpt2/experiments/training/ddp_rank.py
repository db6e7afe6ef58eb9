"""One rank of a training that a worker hosts: what torchrun runs. `ddp_host` is the other side."""

import faulthandler
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any

from gpt2.base import log
from gpt2.base.errors import Diverged, ReportedByOtherRank
from gpt2.distributed import watchdog
from gpt2.experiments.pool import messages
from gpt2.experiments.pool.job import Stopped
from gpt2.experiments.pool.messages import (
    JobReported,
    RankConnected,
    RankFailed,
    RankFinished,
    Reply,
    RunTraining,
    StopTraining,
)
from gpt2.experiments.pool.worker import LogStream
from gpt2.train.report import Answer


def main(address: str) -> int:
    """Trains, and sends the host the result or the error; returns the exit code for torchrun."""
    watchdog.end_with_torchrun()
    sys.stdout = sys.stderr = LogStream()
    # These import torch, which takes seconds, during which torchrun may die.
    from gpt2.distributed import rendezvous
    from gpt2.experiments.training import training_job

    rank = rendezvous.env_rank()[0]
    log.setup(rank=rank)
    host = HostConnection(address, rank)
    try:
        result = training_job.run(host.report, **host.kwargs, on_failure=host.send_error)
        host.send_result(result)
    except ReportedByOtherRank:
        host.send_result(None)
    except Exception as error:
        if watchdog.is_contact_lost(error):  # another rank has died, which the host sees
            raise
        host.send_error(error)
        # All ranks raise these: exit code 1 would make torchrun fill the log with a report.
        return 0 if isinstance(error, Stopped | Diverged) else 1
    return 0


class HostConnection:
    """The channel to the worker that has started torchrun.

    When the worker closes it, this process kills itself: the next attempt of the job must not meet
    it in its folder.
    """

    def __init__(self, address: str, rank: int) -> None:
        from gpt2.experiments.training import ddp_host  # imports torch

        self._channel = ddp_host.connect(address)
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._is_stopping = False
        self._channel.send(RankConnected(rank))
        first = self._channel.wait()
        if not isinstance(first, RunTraining):
            raise ConnectionError(f"expected RunTraining from the host, got {first}")
        self.kwargs = first.kwargs
        """the keyword arguments of `training_job.run`"""
        threading.Thread(target=self._receive, name="host", daemon=True).start()

    def report(self, **metrics: Any) -> Answer:
        """The `report` of the training: returns the owner's answer."""
        self._channel.send(JobReported(messages.json_ready(metrics)))
        answer = self._answers.get()
        return "stop" if self._is_stopping else answer

    def send_result(self, result: Mapping[str, Any] | None) -> None:
        self._channel.send(RankFinished(messages.json_ready(result)))

    def send_error(self, error: Exception) -> None:
        trace = "".join(traceback.format_exception(error)).rstrip()
        self._channel.send(RankFailed(type(error).__name__, str(error), trace))

    def _receive(self) -> None:
        """The thread: receives until the host closes the channel."""
        while True:
            match self._channel.wait():
                case Reply(answer):
                    self._answers.put(answer)
                case StopTraining():
                    self._stop()
                case _:
                    faulthandler.dump_traceback(2)  # the host may be killed because this rank hangs
                    os.kill(os.getpid(), signal.SIGKILL)

    def _stop(self) -> None:
        """Sends this process the signal that a training handles. Before the training does, its
        first report gets the answer `stop`."""
        self._is_stopping = True
        if callable(signal.getsignal(signal.SIGTERM)):
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
