"""In one process; tests/distributed/test_world.py has several ranks."""

import pytest
import torch

from gpt2.distributed.world import World
from gpt2.evaluation.rounds import MeasurementFailed, in_rounds

ALONE = World(0, 1, torch.device("cpu"))


def test_every_round_is_worked_on():
    done: list[int] = []
    assert in_rounds(ALONE, range(3), done.append, lambda: 0)
    assert done == [0, 1, 2]


def test_a_stop_ends_it_before_the_next_round():
    done: list[int] = []
    assert not in_rounds(ALONE, range(3), done.append, lambda: 15 if done else 0)
    assert done == [0]


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_is_raised_with_its_traceback(failing: int):
    def work(number: int) -> None:
        if number == failing:
            raise ZeroDivisionError("the reason")

    with pytest.raises(MeasurementFailed, match="ZeroDivisionError: the reason") as caught:
        in_rounds(ALONE, range(3), work, lambda: 0)
    assert caught.value.trace.startswith("Traceback")
    assert isinstance(caught.value.own_error, ZeroDivisionError)


@pytest.mark.parametrize("failing", [0, 2])
def test_a_stop_goes_before_a_failure(failing: int):
    """As of a shard that has changed: the run ends because of it, with one line."""
    stop: list[int] = []

    def work(number: int) -> None:
        if number == failing:
            stop.append(7)
            raise ZeroDivisionError("the reason")

    assert not in_rounds(ALONE, range(3), work, lambda: sum(stop))


def test_a_failure_keeps_no_tensors():
    """What did not fit into the memory must be free for the steps that follow."""
    kept: list[int] = []

    class Large:
        def __del__(self) -> None:
            kept.append(1)

    def work(_round: int) -> None:
        large = Large()  # noqa: F841
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(MeasurementFailed):
        in_rounds(ALONE, range(1), work, lambda: 0)
    assert kept == [1]
