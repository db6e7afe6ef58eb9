"""How the ranks agree, once in a step, whether they stop before the next update."""

from collections.abc import Callable

from gpt2.distributed.signals import STOP_SIGNALS, StopRequest
from gpt2.distributed.world import World

NOT_READY, STOP_UNIT = 1, 2
"""votes: of a rank that still waits for its batches, and per unit of a stop request's number"""


class StopVote:
    """Every rank has one. All vote at the same time, with the largest vote as the result.

    `on_wait` is called while this rank waits for the data of any rank.
    """

    def __init__(self, world: World, request: StopRequest, on_wait: Callable[[], object]) -> None:
        self._world, self._request, self._on_wait = world, request, on_wait

    @property
    def is_requested(self) -> bool:
        """Whether this rank has received a signal to stop. All ranks receive it, so each may go
        straight to the vote. Another request (of `report`, a fault of the data) is known to this
        rank alone: it would wait in the vote for the others, in a long step beyond the timeout."""
        number = self._request.number
        return number in STOP_SIGNALS or (number != 0 and self._world.size == 1)

    def is_to_stop(self) -> bool:
        """Whether any rank has received a request to stop; the same on every rank.

        Called once in a step, by each rank as soon as nothing but its last micro-batch is left.
        Waits for the ranks whose batches are still being read.
        """
        while (vote := self._vote(0)) == NOT_READY:
            self._on_wait()
        return vote > NOT_READY

    def is_to_stop_waiting(self) -> bool:
        """The same for a rank that waits for its batches: it votes again and again until it has
        them, so that no other rank waits long in a vote."""
        self._on_wait()
        return self._vote(NOT_READY) > NOT_READY

    def _vote(self, readiness: int) -> int:
        return self._world.all_reduce_max(STOP_UNIT * self._request.number + readiness)
