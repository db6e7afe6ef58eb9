"""Calls that are repeated while an error may pass, as many errors of network and disk do."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_chain, wait_fixed

T = TypeVar("T")
POLL_S = 0.1
"""how soon a pause ends when `is_stopping` begins to hold"""


def call(
    action: Callable[[], T],
    pauses_s: Sequence[float],
    may_pass: Callable[[BaseException], bool],
    log: Callable[[BaseException, float], None],
    is_stopping: Callable[[], bool] = lambda: False,
) -> T:
    """Returns `action()`, which is called again after each of `pauses_s` in turn.

    Raises its error, unchanged, unless it `may_pass`, after the last pause, and as soon as
    `is_stopping`. Before each pause, `log` is called with the error and the length of the pause.
    """

    def log_pause(state: RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert error is not None
        log(error, state.upcoming_sleep)

    def pause(pause_s: float) -> None:
        until = time.monotonic() + pause_s
        while (left_s := until - time.monotonic()) > 0 and not is_stopping():
            time.sleep(min(left_s, POLL_S))

    retrying = Retrying(
        retry=retry_if_exception(may_pass),
        stop=lambda state: state.attempt_number > len(pauses_s) or is_stopping(),
        wait=wait_chain(*map(wait_fixed, pauses_s)),
        before_sleep=log_pause,
        sleep=pause,
        reraise=True,
    )
    return retrying(action)
