"""Signals that ask a run to stop at the boundary of a step."""

import signal
from types import FrameType
from typing import Any, Self

from gpt2.distributed.watchdog import TORCHRUN_IS_GONE, second_interrupts

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, TORCHRUN_IS_GONE)


class StopRequest:
    """A context that records the first SIGINT, SIGTERM, SIGHUP or SIGUSR1 (SLURM's warning), so
    that the loop can stop at the boundary of a step.

    A second Ctrl+C raises KeyboardInterrupt; torchrun forwards it as SIGTERM. Other signals may
    arrive several times: from torchrun, and from a sender that signals every process. A signal that
    was ignored before stays ignored (SIGHUP under nohup, which torchrun itself does not respect).
    """

    def __init__(self) -> None:
        self.number = 0
        """the signal, or the number given to `request`; 0 without a request"""
        self._interrupted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        handled = [item for item in STOP_SIGNALS if signal.getsignal(item) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._on_signal) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def request(self, number: int) -> None:
        """Requests a stop with this number, unless one was requested before; 0 requests nothing."""
        self.number = self.number or number

    def withdraw(self, *numbers: int) -> None:
        """Forgets the request if it has one of these numbers."""
        if self.number in numbers:
            self.number = 0

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._interrupted and number in second_interrupts():
            self._restore()
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self.request(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
