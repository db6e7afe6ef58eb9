"""Signals that ask a run to stop at the boundary of a step."""

import signal
from types import FrameType
from typing import Any, Self

from gpt2.distributed.watchdog import TORCHRUN_IS_GONE, is_under_torchrun

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, TORCHRUN_IS_GONE)


class StopRequest:
    """Remembers the first SIGINT, SIGTERM, SIGHUP or SIGUSR1 (SLURM's warning), so that the loop
    can end at a step's boundary.

    Ctrl+C twice leaves at once; torchrun hands the second one on as SIGTERM. Other signals may come
    several times: from torchrun, and from whoever sends to all processes. What was ignored when the
    process began stays so (SIGHUP under nohup; torchrun itself does not keep to that).
    """

    def __init__(self) -> None:
        self.number = 0
        self._interrupted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        wanted = [item for item in STOP_SIGNALS if signal.getsignal(item) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._remember) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def request(self, number: int) -> None:
        """A stop for this reason, a signal or another number, unless there was one; 0 is none."""
        self.number = self.number or number

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        second = (signal.SIGINT, signal.SIGTERM if is_under_torchrun() else signal.SIGINT)
        if self._interrupted and number in second:
            self._restore()
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self.request(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
