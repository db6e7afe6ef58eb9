"""A training of several ranks, hosted by one worker process.

Each rank is a worker process of its own, whose owner is the host. The host does what torchrun does
otherwise: it gives each rank its number and all of them a store.
"""

import faulthandler
import math
import os
import queue
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

from torch._C._distributed_c10d import TCPStore

from gpt2.distributed import rendezvous
from gpt2.distributed.device import THREADS
from gpt2.distributed.signals import StopRequest
from gpt2.experiments.pool.job import Job, Slot, Stopped
from gpt2.experiments.pool.messages import (
    EndedAs,
    JobEnded,
    JobPhase,
    JobReported,
    Reply,
    WorkerEnded,
)
from gpt2.experiments.pool.process import Inbox, Worker, WorkerProcess
from gpt2.experiments.pool.worker import SHOW_STACK
from gpt2.train.report import Answer

POLL_S = 0.2
"""how soon a signal is noticed"""
EXIT_S = 30.0
"""for the other ranks to end by themselves after one has failed; torchrun grants as much"""


def run_on_ranks(report: Callable[..., Answer], job: Job, count: int) -> Any:
    """What the job returns on the only rank where that is not empty. It runs on `count` ranks at
    the same time.

    Raises Stopped if it was stopped, and EndedAs if a rank failed or died.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ranks = _Ranks(report, job, count, store.port)
    signal.signal(SHOW_STACK, ranks.show_stacks)
    try:
        with StopRequest() as stop:
            while ranks.running:
                ranks.handle_next_message()
                if stop.number and not ranks.are_stopping:
                    ranks.stop()
    finally:
        ranks.kill()
    return _result(ranks.ended)


class _Ranks:
    """The workers that are the ranks of one training."""

    def __init__(self, report: Callable[..., Answer], job: Job, count: int, port: int) -> None:
        self._report, self._inbox = report, Inbox()
        self._loaded: set[Worker] = set()
        self._kill_at = math.inf
        self.running: dict[Worker, int] = {}
        """the number of each rank"""
        self.ended: dict[int, JobEnded] = {}
        """by rank, in the order in which they ended"""
        self.are_stopping = False
        threads = {THREADS: os.environ.get("OMP_NUM_THREADS", "")}
        for rank in range(count):
            environment = rendezvous.rank_variables(rank, count, port) | threads
            worker = WorkerProcess(Slot(rank, f"rank{rank}", environment), None, self._inbox)
            worker.send(job)
            self.running[worker] = rank

    def handle_next_message(self) -> None:
        """Waits for a message of a rank, POLL_S at most, and handles it."""
        if time.monotonic() > self._kill_at:
            for rank in self.running:
                rank.signal(signal.SIGKILL)
        try:
            sender, message = self._inbox.get(timeout=POLL_S)
        except queue.Empty:
            return
        match message:
            case JobPhase("running"):
                self._loaded.add(sender)
            case JobReported(metrics):
                sender.send(Reply(self._report(**metrics)))
            case JobEnded():
                self._on_end(self.running[sender], message)
            case WorkerEnded(reason):
                number = self.running.pop(sender)
                self._on_end(number, JobEnded("lost", reason=f"rank {number}: {reason}"))

    def _on_end(self, rank: int, ended: JobEnded) -> None:
        if self.ended.setdefault(rank, ended).state in ("failed", "lost"):
            self._kill_at = min(self._kill_at, time.monotonic() + EXIT_S)

    def stop(self) -> None:
        """Requests all ranks to stop; raises Stopped if not all of them can train yet."""
        self.are_stopping = True
        if not self._loaded >= self.running.keys():
            raise Stopped
        for rank in self.running:
            rank.signal(signal.SIGTERM)

    def show_stacks(self, number: int, _frame: FrameType | None) -> None:
        """If this training hangs, one of its ranks does."""
        faulthandler.dump_traceback(2)
        for rank in self.running:
            rank.signal(number)

    def kill(self) -> None:
        """Ends those that still run: the next attempt must not meet them in its folder."""
        self._report, self._kill_at = lambda **_: "stop", 0.0
        while self.running:
            self.handle_next_message()


def _result(ended: dict[int, JobEnded]) -> Any:
    for outcome in ended.values():
        if outcome.result:  # it is sent after everything is saved
            return outcome.result
    for rank, outcome in ended.items():  # the first failure: others follow from it
        if outcome.state in ("failed", "lost"):
            trace = outcome.traceback and f"On rank {rank}:\n{outcome.traceback}"
            raise EndedAs(replace(outcome, traceback=trace))
    raise Stopped
