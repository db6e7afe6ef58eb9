"""Shows an experiment while it runs: a live view on a terminal, lines of text elsewhere.

A thread prints, and another one writes `state.json`, so that a slow reader, such as a stopped
terminal or `| less`, delays no job.
"""

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from gpt2.base import regular_file
from gpt2.base.errors import ConfigError
from gpt2.experiments.pool import log_lines
from gpt2.experiments.pool.job import Event
from gpt2.experiments.progress import rendering, state
from gpt2.experiments.progress.state import ExperimentState

DRAW_EVERY_S = 0.25
WRITE_EVERY_S = 2.0
FIRST_LINE_S, MAX_LINE_INTERVAL_S, LONG_JOB_S = 60.0, 600.0, 30.0
JOBS_PER_LINE = 10
"""jobs that end between two lines with counts"""
RESERVED_CELLS = 4
"""kept free at the right: the terminal's echo of ^C must not wrap the line and shift the view"""
STYLES = {"failed": "red", "slot_lost": "red", "retried": "yellow"}
"""of the events whose lines appear above a live view"""


@contextlib.contextmanager
def showing_progress(
    begun: ExperimentState,
    folder: Path | None = None,
    *,
    log: Path = Path(os.devnull),
    out: Console,
    clock: Callable[[], float] = time.time,
) -> Iterator["LineReporter"]:
    """Shows the experiment while the block runs; yields what receives every event.

    Writes the state to `folder`, if there is one. The log gets a line for each failure, after every
    10 jobs, and at growing intervals for jobs that take long. `out` shows these lines; a terminal
    shows a live view of the state instead, with failures and other output of the process above it.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log_file = regular_file.open_to_append(log)
    except OSError as error:
        raise ConfigError(
            f"cannot write {log}: {error.strerror}; choose another folder with --log_dir"
        ) from error
    with log_file:
        progress = LineReporter(begun, folder, log_file.fileno(), out, clock)
        with _printing_in_background(out, progress if progress.is_live else None):
            try:
                with _repeating(progress.write, WRITE_EVERY_S):
                    yield progress
            finally:
                progress.end()


class LineReporter:
    """The current state of an experiment, which other threads may read at any time.

    The lines about it are written to its log and printed. On a terminal with a live view, only
    those are printed that tell more than the view.
    """

    def __init__(
        self,
        begun: ExperimentState,
        folder: Path | None,
        log: int,
        out: Console,
        clock: Callable[[], float],
    ) -> None:
        """`log` is the descriptor of the open log."""
        self.current, self.clock = begun, clock
        self.is_live = out.is_interactive and out.file.isatty()
        self._folder, self._log, self._out = folder, log, out
        self._long_jobs_due = begun.began + FIRST_LINE_S
        log_lines.write_line(log, rendering.first_line(begun))

    def report(self, event: Event) -> None:
        """Updates the state with the event, and writes the lines about it."""
        self.current = now = self.current.after(event, self.clock())
        if line := rendering.event_line(event):
            self._add(line, STYLES.get(event.kind, ""))
        has_ended = event.kind in ("finished", "pruned", "failed")
        if has_ended and now.ended % JOBS_PER_LINE == 0 and now.ended < now.total:
            self._add(rendering.summary(now, self.clock()))

    def write(self) -> None:
        """Writes the state to the folder and, if they are due, a line about each long job: after a
        minute, and whenever the experiment has run 10 % longer, at most every 10 minutes."""
        current, now = self.current, self.clock()
        if self._folder:
            state.write(self._folder, current)
        if now < self._long_jobs_due:
            return
        interval_s = min(max(FIRST_LINE_S, (now - current.began) / 10), MAX_LINE_INTERVAL_S)
        self._long_jobs_due = now + interval_s
        slots = [slot for slot in current.slots if slot.job and now - slot.began >= LONG_JOB_S]
        for slot in slots:
            self._add(rendering.slot_line(slot, now))
        if slots and current.total > len(slots):
            self._add(rendering.summary(current, now))

    def end(self) -> None:
        """Writes that the experiment has finished or was stopped."""
        self.current = now = self.current.at_end(self.clock())
        self.write()
        self._add(f"{now.state}: {rendering.summary(now, now.written)}")

    def _add(self, line: str, style: str = "") -> None:
        log_lines.write_line(self._log, line)
        if style or not self.is_live:
            self._out.print(Text(line, style), soft_wrap=True)


@contextlib.contextmanager
def _printing_in_background(out: Console, shown: LineReporter | None) -> Iterator[None]:
    """Lets a thread print what `out` prints, and show a live view of what `shown` is at.

    What else goes to the terminal, such as a warning, then appears above the view.
    """
    if isinstance(out.file, io.TextIOWrapper):
        out.file.reconfigure(errors="replace")  # a terminal in Latin-1 has no …
    stream = _BackgroundStream(out.file, shown)
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, out, "file", out.file)
        out.file = stream  # type: ignore[assignment]
        if shown:
            stack.enter_context(contextlib.redirect_stdout(stream))
        if shown and sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(stream))
        stack.callback(stream.draw, is_last=True)
        stack.enter_context(_repeating(stream.draw, DRAW_EVERY_S))
        yield


class _BackgroundStream:
    """A text stream that keeps what is written until `draw` prints it, so that no writer waits."""

    def __init__(self, stream: IO[str], shown: LineReporter | None) -> None:
        self._stream, self._pending = stream, deque[str]()
        self._live: Live | None = None
        if shown:
            screen = Console(file=stream, highlight=False, markup=False, emoji=False)
            self._live = Live(
                console=screen,
                get_renderable=lambda: rendering.view(
                    shown.current, shown.clock(), screen.width - RESERVED_CELLS
                ),
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._pending.append(text)
        return len(text)

    def flush(self) -> None:
        pass

    def draw(self, is_last: bool = False) -> None:
        """Prints the lines that have been written, and the live view below them.

        If the other end is closed, this and all later output is discarded.
        """
        text = "".join(self._pending.popleft() for _ in range(len(self._pending)))
        end = len(text) if is_last or not self._live else text.rfind("\n") + 1
        self._pending.extendleft([text[end:]])
        try:
            if not self._live:
                self._stream.write(text)
                self._stream.flush()
                return
            self._live.start()
            if end:
                lines = Text.from_ansi(text[:end].removesuffix("\n"))
                self._live.console.print(lines, soft_wrap=True)
            self._live.refresh()
            if is_last:
                self._live.stop()
        except OSError:
            with contextlib.suppress(OSError):  # the stream may have no file descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def _repeating(function: Callable[[], None], every_s: float) -> Iterator[None]:
    """Calls a function in a thread, now and every `every_s` seconds, while the block runs."""
    is_over = threading.Event()

    def repeat() -> None:
        # Signals are for the main thread, which blocks them while it starts a worker.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        function()
        while not is_over.wait(every_s):
            function()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
