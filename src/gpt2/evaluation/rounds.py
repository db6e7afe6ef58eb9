"""Work that the ranks share in rounds: a stop or an error on one rank ends it on all of them."""

import traceback
from collections.abc import Callable, Iterable
from typing import TypeVar

from gpt2.distributed.world import World

T = TypeVar("T")
FAILED = 1 << 32
"""above every number of a stop request, so that one collective agrees on both"""


class MeasurementFailed(Exception):
    """The work failed on some rank; every rank raises it."""

    def __init__(self, trace: str, own_error: Exception | None) -> None:
        """`trace` is the traceback of the first rank that failed, and is known to rank 0;
        `own_error` is None on a rank whose work did not fail."""
        super().__init__(trace.rpartition("\n")[2])
        self.trace, self.own_error = trace, own_error


def in_rounds(
    world: World, rounds: Iterable[T], work: Callable[[T], None], stop: Callable[[], int]
) -> bool:
    """Calls `work` for each of `rounds`, of which every rank has as many.

    Returns False if `stop()` was not 0 on some rank before a round, or after an error. Raises
    MeasurementFailed if `work` raised on some rank. A rank whose work has failed comes to the
    collective of the next round all the same, so that no rank waits for it.
    """
    error: Exception | None = None

    def vote() -> int:
        # A stop goes before an error of this rank: a shard that has changed causes both, and a
        # resume measures again what a stop has left out.
        return stop() or (FAILED if error else 0)

    for item in rounds:
        if agreed := world.all_reduce_max(vote()):
            break
        try:
            work(item)
        except Exception as raised:  # reported by every rank, below
            error = raised
    else:
        agreed = world.all_reduce_max(vote() if error else 0)
    if agreed < FAILED:
        return agreed == 0
    traces = world.gather_objects(_trace(error) if error else "")
    raise MeasurementFailed(next(filter(None, traces), ""), error)


def _trace(error: Exception) -> str:
    text = "".join(traceback.format_exception(error)).rstrip()
    traceback.clear_frames(error.__traceback__)  # their tensors take memory that may be needed
    return text
