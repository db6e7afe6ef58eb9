"""Ranks as threads that vote through a shared maximum; tests/faults has real ones."""

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import pytest
import torch

from gpt2.distributed.signals import StopRequest
from gpt2.distributed.world import World
from gpt2.train.stop_vote import StopVote
from gpt2.train.training_run import DATA_FAULT

T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass
class SharedMaximum:
    """The collective that a vote needs, for threads."""

    ranks: int

    def __post_init__(self) -> None:
        self._barrier = threading.Barrier(self.ranks, timeout=60)
        self._values: list[int] = []

    def all_reduce_max(self, value: int) -> int:
        if self._barrier.wait() == 0:
            self._values = []
        self._barrier.wait()
        self._values.append(value)
        self._barrier.wait()
        largest = max(self._values)
        self._barrier.wait()
        return largest


def outcomes(*ranks: Callable[[], T]) -> list[T]:
    """What the functions return, each called in a thread of its own."""
    found: dict[int, T] = {}

    def run(rank: int) -> None:
        found[rank] = ranks[rank]()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(len(ranks))]


def votes(requests: list[StopRequest]) -> list[StopVote]:
    world = SharedMaximum(len(requests))
    return [StopVote(world, request, lambda: None) for request in requests]


@pytest.mark.parametrize("requested", [None, 0, 2])
def test_one_request_stops_all(requested: int | None):
    requests = [StopRequest() for _ in range(3)]
    if requested is not None:
        requests[requested].request(15)
    found = outcomes(*(vote.is_to_stop for vote in votes(requests)))
    assert found == [requested is not None] * 3


def test_a_request_of_one_rank_alone_leaves_no_micro_batch_out():
    """It would wait for the rest of the others' step: for how long a collective may take."""
    requests = [StopRequest(), StopRequest()]
    alone, together = (StopVote(World(0, size, CPU), requests[0], str) for size in (1, 2))
    requests[0].request(DATA_FAULT)
    assert alone.is_requested and not together.is_requested
    requests[1].request(signal.SIGTERM)
    assert StopVote(World(0, 2, CPU), requests[1], str).is_requested


def test_ranks_wait_for_the_data_of_others():
    """Rank 1 has its batches after three votes; rank 0 is ready from the beginning."""
    ready, waiting = votes([StopRequest(), StopRequest()])

    def waits_thrice() -> bool:
        return any([waiting.is_to_stop_waiting() for _ in range(3)]) or waiting.is_to_stop()

    assert outcomes(ready.is_to_stop, waits_thrice) == [False, False]


def test_a_request_ends_the_wait_for_data():
    request = StopRequest()
    ready, waiting = votes([request, StopRequest()])

    def waits() -> bool:
        assert not waiting.is_to_stop_waiting()
        request.request(2)
        return waiting.is_to_stop_waiting() or waiting.is_to_stop_waiting()

    assert outcomes(ready.is_to_stop, waits) == [True, True]
