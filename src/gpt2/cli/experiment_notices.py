"""One message to the address of --notify when an experiment ends, not one for each of its jobs."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gpt2.base.errors import FolderInUse
from gpt2.cli.train import without_address
from gpt2.experiments.progress import rendering, state
from gpt2.metrics import notify
from gpt2.metrics.notify import Notifier


@contextlib.contextmanager
def posting_end(
    typed: str | None, what: str, folder: Path | None
) -> Iterator[Callable[[int], int]]:
    """Posts how the block ends; `typed` is the value of --notify.

    Yields a function that takes and returns the exit code of the experiment. `what` names the
    experiment, and `folder` has its `state.json`. Raises ConfigError for an invalid address.
    """
    notifier = Notifier(notify.address_of(typed))
    without_address([])

    def ended(code: int) -> int:
        word = "finished" if code == 0 else "stopped" if code >= 128 else "failed"
        current = state.read(folder) if folder and notifier.is_on else None
        _post(notifier, word, what, rendering.summary(current, time.time()) if current else "")
        return code

    try:
        yield ended
    except FolderInUse:  # the experiment goes on: only this start of it has failed
        raise
    except Exception as error:
        _post(notifier, "failed", what, f"{type(error).__name__}: {error}")
        raise
    finally:
        notifier.close()


def _post(notifier: Notifier, event: str, what: str, details: str) -> None:
    notifier.post(event, f"{what} on {socket.gethostname()} {event}", details, run=what)
