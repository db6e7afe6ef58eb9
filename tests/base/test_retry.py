from collections.abc import Callable

import pytest

from gpt2.base import retry


def failing(*errors: Exception) -> Callable[[], str]:
    """A call that raises `errors` in turn, then returns."""
    left = list(errors)

    def action() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return action


def is_os_error(error: BaseException) -> bool:
    return isinstance(error, OSError)


def test_it_repeats_while_the_error_may_pass():
    logged: list[tuple[str, float]] = []

    def log(error: BaseException, pause_s: float) -> None:
        logged.append((str(error), pause_s))

    action = failing(OSError("first"), OSError("second"))
    assert retry.call(action, (0, 0.01, 0), is_os_error, log) == "done"
    assert logged == [("first", 0), ("second", 0.01)]


@pytest.mark.parametrize(
    ("errors", "raised"),
    [
        ([OSError("1"), OSError("2"), OSError("3")], "3"),  # after the last pause
        ([OSError("1"), ValueError("other")], "other"),  # at once
    ],
)
def test_the_error_itself_is_raised(errors: list[Exception], raised: str):
    with pytest.raises(type(errors[-1]), match=raised) as caught:
        retry.call(failing(*errors), (0, 0), is_os_error, lambda *_: None)
    assert caught.value is errors[-1]


def test_a_stop_ends_the_pause_and_the_repetition():
    stopping: list[bool] = []

    def log(*_: object) -> None:
        stopping.append(True)  # a stop is requested during the first pause

    action = failing(OSError("1"), OSError("2"), OSError("3"))
    with pytest.raises(OSError, match="2"):
        retry.call(action, (3600, 3600), is_os_error, log, lambda: bool(stopping))
