"""One message to the address of --notify when an experiment ends, not one for each of its jobs.

A process that was killed posts nothing: `gpt2 watch`, or the next start, does it.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gpt2.base import folder_lock
from gpt2.base.errors import FolderInUse, described
from gpt2.base.text import brief
from gpt2.cli.train import hide_secrets
from gpt2.experiments.progress import rendering, state
from gpt2.experiments.progress.state import ExperimentState
from gpt2.metrics import notify
from gpt2.metrics.notify import Notifier
from gpt2.train import notices


@contextlib.contextmanager
def posting_end(typed: str | None, what: str, folder: Path | None) -> Iterator[Callable[..., int]]:
    """Posts how the block ends; `typed` is the value of --notify, `what` names the experiment.

    Yields a function to be called with the exit code, which it returns, and without `folder` also
    with the last state; with one, that is read from `state.json`. Raises ConfigError for an invalid
    address.
    """
    notifier = Notifier(notify.address_of(typed))
    hide_secrets()
    if folder is not None:
        _post_death_before(folder, notifier)

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
        reason = brief(described(error), "what the command printed")
        _post(notifier, "failed", what, reason)
        raise
    finally:
        notifier.close()


def post_death(folder: Path, dead: ExperimentState, notifier: Notifier, more: str = "") -> None:
    """Posts that the process that wrote the state `dead` was killed, or its machine went down.

    Only the first process that notices a death posts it.
    """
    if not notifier.is_on or not notices.is_first_to_post_death(folder):
        return
    what = f"{dead.kind} {folder}"
    done = rendering.summary(dead.seen(is_held=False), dead.written)
    details = notices.words_of_death(dead.pid, dead.written, done, more)
    notifier.post("died", f"{what} on {dead.host} died", details, run=what)


def _post_death_before(folder: Path, notifier: Notifier) -> None:
    """Posts the death of the process that ran the experiment in `folder` before, if it died."""
    if folder_lock.has_live_owner(folder):
        return
    last = state.read(folder)
    if last is not None and not last.is_over:
        post_death(folder, last, notifier, "it is started again now")
    notices.forget_death(folder)  # so that the death of this process is posted too


def _post(notifier: Notifier, event: str, what: str, details: str) -> None:
    notifier.post(event, f"{what} on {socket.gethostname()} {event}", details, run=what)
