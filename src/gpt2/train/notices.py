"""What is posted about a run to the address of --notify: its end, a hang, skipped updates, a return
to an earlier checkpoint, the death of its process."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from gpt2.base.errors import FolderInUse
from gpt2.base.text import brief
from gpt2.config.flops import duration
from gpt2.distributed import lost_rank
from gpt2.metrics.notify import Notifier
from gpt2.train import status
from gpt2.train.state import TrainState
from gpt2.train.status import Plan, RunState, Status

DEATH_POSTED = "death_posted"
"""a file in the checkpoint folder: the death of the process that wrote `status.json` is posted"""
CHECK_S = 5.0
"""between two checks for a hang"""
SKIPPED_EVERY_S = 3600.0
"""between two messages about skipped updates"""


class Notices:
    """Posts what a person wants to know of a run. Without an address it does nothing, as on all
    ranks but rank 0."""

    def __init__(self, address: str | None = None, name: str = "training") -> None:
        """`name` is used until the run has one of its own."""
        self.notifier = Notifier(address)
        self._name, self._total_steps, self._step = name, 0, 0
        self._step_s: float | None = None
        self._last_sign = time.monotonic()
        self._is_stalled = self._has_ended = False
        self._may_tell_skipped_at = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look_for_hang, name="notices", daemon=True)

    @contextlib.contextmanager
    def posting_failure(self) -> Iterator[None]:
        """Posts the error that leaves the block, unless the run's end is posted already, and waits
        until all is posted."""
        try:
            yield
        except FolderInUse:  # the run goes on: only this start of it has failed
            raise
        except Exception as error:
            if not self._has_ended:
                reason = brief(lost_rank.described(error), "what the run printed")
                self._end("failed", reason)
            raise
        finally:
            self.close()

    def begin(self, plan: Plan, step: int) -> None:
        """From now on, a hang of the run is posted."""
        self._name, self._total_steps, self._step = plan.run_name, plan.total_steps, step
        self._last_sign = time.monotonic()
        if self.notifier.is_on:
            self._thread.start()

    def sign_of_life(self, step: int) -> None:
        """The run is alive, at `step`; called often by the thread that trains."""
        now = time.monotonic()
        silent_s, self._last_sign, self._step = now - self._last_sign, now, step
        if self._is_stalled:
            self._is_stalled = False
            self._post("continues", "goes on", f"after {duration(silent_s)}")
        self.notifier.log_failure()

    def stepped(self, elapsed_s: float) -> None:
        """The run has finished a step of this process."""
        self._step_s = elapsed_s

    def skipped(self, state: TrainState, numbers: str) -> None:
        """An update was left out, because its `numbers` are bad. Posted once an hour at most."""
        self._step = state.step
        if time.monotonic() >= self._may_tell_skipped_at:
            self._may_tell_skipped_at = time.monotonic() + SKIPPED_EVERY_S
            self._post("skipped", "skipped an update", f"{numbers} ({state.bad_steps} in all)")

    def went_back(self, step: int, reason: str) -> None:
        """The run goes on from an earlier step after a divergence."""
        self._step = step
        self._post("went_back", "went back", reason)

    def ended(self, ending: RunState, state: TrainState, reason: str | None) -> None:
        """The run ends; `reason` is that of `status.json`."""
        self._step = state.step
        values = {
            "loss": state.train_loss,
            "val loss": state.val_loss,
            "bits per byte": state.bits_per_byte,
            "HellaSwag": state.hellaswag,
        }
        known = [f"{name} {value:.4f}" for name, value in values.items() if value is not None]
        self._end(ending, "; ".join(filter(None, [reason, ", ".join(known)])))

    def close(self) -> None:
        """Ends the threads; waits for messages that are being posted, for a few seconds."""
        self._is_over.set()
        self.notifier.close()

    def _end(self, ending: str, details: str) -> None:
        self._has_ended = True
        self._is_over.set()
        self._post(ending, ending, details)

    def _post(self, event: str, words: str, details: str) -> None:
        at = "to" if event == "went_back" else "at"
        where = f" {at} step {self._step:,} of {self._total_steps:,}" if self._total_steps else ""
        self.notifier.post(
            event,
            f"{self._name} on {socket.gethostname()} {words}{where}",
            details,
            run=self._name,
            step=self._step,
            total_steps=self._total_steps,
        )

    def _look_for_hang(self) -> None:
        while not self._is_over.wait(CHECK_S):
            silent_s = time.monotonic() - self._last_sign
            if not self._is_stalled and status.is_stalled(silent_s, self._step_s):
                self._post("stalled", "stalled", f"no sign of life for {duration(silent_s)}")
                self._is_stalled = True  # now, so that `continues` is posted after `stalled`


def post_death_before(folder: Path, notifier: Notifier) -> None:
    """Posts that the process that trained in `folder` before this one died, if it did; this process
    holds the folder."""
    previous = status.read(folder)
    if previous is not None and previous.state == "running":
        post_death(folder, previous, notifier, "it is started again now")


def post_death(folder: Path, dead: Status, notifier: Notifier, more: str = "") -> None:
    """Posts that the process that wrote the status `dead` was killed, or its machine went down.

    Several processes may notice it; a file in `folder` makes sure that only one posts it.
    """
    if not notifier.is_on or not is_first_to_post_death(folder):
        return
    plan = dead.plan
    notifier.post(
        "died",
        f"{plan.run_name} on {dead.host} died after step {dead.step:,} of {plan.total_steps:,}",
        words_of_death(dead.pid, dead.time, more),
        run=plan.run_name,
        step=dead.step,
        total_steps=plan.total_steps,
    )


def forget_death(folder: Path) -> None:
    """The run trains again: its next death is another one."""
    with contextlib.suppress(OSError):
        (folder / DEATH_POSTED).unlink(missing_ok=True)


def words_of_death(pid: int, last_seen: float, *more: str) -> str:
    """What a message says of a process that was killed; `last_seen` is in seconds since 1970."""
    details = (
        f"process {pid} ended unexpectedly (killed, out of memory or a power cut), "
        f"last seen {datetime.fromtimestamp(last_seen):%Y-%m-%d %H:%M:%S}"
    )
    return "; ".join(filter(None, [details, *more]))


def is_first_to_post_death(folder: Path) -> bool:
    """Creates DEATH_POSTED in `folder`; returns whether it is new. True if it cannot be created: a
    second message is better than none."""
    try:
        os.close(os.open(folder / DEATH_POSTED, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True
