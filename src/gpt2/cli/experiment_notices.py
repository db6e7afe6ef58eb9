"""One message to the address of --notify when an experiment ends, not one for each of its jobs."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gpt2.base.errors import FolderInUse, described
from gpt2.cli.train import without_address
from gpt2.experiments.progress import rendering, state
from gpt2.experiments.progress.state import ExperimentState
from gpt2.metrics import notify
from gpt2.metrics.notify import Notifier


@contextlib.contextmanager
def posting_end(typed: str | None, what: str, folder: Path | None) -> Iterator[Callable[..., int]]:
    """Posts how the block ends; `typed` is the value of --notify.

    Yields a function that takes the exit code of the experiment and, if no `folder` has it as
    `state.json`, its last state; it returns the exit code. `what` names the experiment. Raises
    ConfigError for an invalid address.
    """
    notifier = Notifier(notify.address_of(typed))
    without_address([])

    def ended(code: int, last: ExperimentState | None = None) -> int:
        word = "finished" if code == 0 else "stopped" if code >= 128 else "failed"
        last = state.read(folder) if folder and notifier.is_on else last
        _post(notifier, word, what, rendering.summary(last, time.time()) if last else "")
        return code

    try:
        yield ended
    except FolderInUse:  # the experiment goes on: only this start of it has failed
        raise
    except Exception as error:
        _post(notifier, "failed", what, described(error))
        raise
    finally:
        notifier.close()


def _post(notifier: Notifier, event: str, what: str, details: str) -> None:
    notifier.post(event, f"{what} on {socket.gethostname()} {event}", details, run=what)
