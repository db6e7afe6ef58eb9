"""Shows an experiment while it runs: a live view on a terminal, lines of text elsewhere.

The display and `state.json` are written by threads, so that a slow reader, such as a terminal or
`| less`, does not delay the jobs. Only the lines of the log are written at once.
"""

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.text import Text

from gpt2.base.text import console, counted, one_line
from gpt2.config.flops import duration
from gpt2.experiments.pool.job import Event
from gpt2.experiments.pool.log_lines import ExperimentLog
from gpt2.experiments.progress import rendering, state
from gpt2.experiments.progress.state import ExperimentState, StateTracker

LOG = "experiment.log"
DRAW_EVERY_S = 0.25
DUE_EVERY_S = 1.0
WRITE_EVERY_S = 2.0
HEARTBEAT_S = 60.0
"""interval at which an unchanged state is written, so that other machines see it is alive"""
FIRST_LINE_S, MAX_LINE_INTERVAL_S = 60.0, 600.0
"""a running job gets its first line after this time, and further ones at growing intervals"""
MAX_LINES_PER_DRAW = 10
RESERVED_CELLS = 4
"""kept free at the right: the terminal's echo of ^C must not wrap the line and shift the view"""
JOIN_TIMEOUT_S = 10.0
"""how long the end waits for a slow disk or reader"""
ERROR_STYLE, WARNING_STYLE = "red", "yellow"


@contextlib.contextmanager
def showing_progress(
    tracker: StateTracker,
    folder: Path,
    *,
    log: Path | None = None,
    every: int = 10,
    out: Console | None = None,
) -> Iterator[Callable[[Event], None]]:
    """Shows the experiment while the block runs; yields the function to call with every event.

    Writes the state to `folder`. The log, `folder / LOG` unless `log` is given, gets a line after
    every `every` jobs, for each failure, and at growing intervals for a job that takes long. On a
    terminal, `out` shows a live view of the state; elsewhere, the lines of the log.
    """
    out = out or console()
    original = out.file
    stream = out.file = _DetachableStream(original)  # type: ignore[assignment]
    is_terminal = out.is_interactive and original.isatty()
    display = _LiveDisplay(tracker, out) if is_terminal else _LineDisplay(out)
    log_file, reporter = ExperimentLog(log or folder / LOG), LineReporter(tracker, every)
    log_file.add(reporter.first_line())

    def add(lines: list[Line]) -> None:
        for line in lines:
            log_file.add(line.text)
            display.add(line)

    def on_event(event: Event) -> None:
        tracker.update(event)
        add(reporter.lines_of(event))

    writer = _StateWriter(tracker, folder)
    writing = _RepeatingThread(writer.write_if_due, WRITE_EVERY_S)
    reporting = _RepeatingThread(lambda: add(reporter.due_lines()), DUE_EVERY_S)
    drawing = _RepeatingThread(display.draw, DRAW_EVERY_S, last=display.end)
    display.begin()
    try:
        with drawing:
            try:
                with writing, reporting:
                    writer.write_if_due()
                    yield on_event
            finally:
                tracker.end()
                writer.write_if_due()
                add([reporter.last_line()])
    finally:
        log_file.close()
        if drawing.is_alive():  # the reader is stalled
            stream.prepend(display.take_pending())
        else:
            out.file = original


@dataclass(frozen=True)
class Line:
    """A line of the log. A live view prints only lines with a style, above itself."""

    text: str
    style: str = ""


class LineReporter:
    """Writes the lines about an experiment."""

    def __init__(self, tracker: StateTracker, every: int) -> None:
        """`every`: jobs between two lines with counts."""
        self._tracker, self._every = tracker, every
        self._last_due: dict[tuple[str, str, int], float] = {}
        """when a line was last due, by slot, job and attempt"""

    def first_line(self) -> str:
        now = self._tracker.current
        slots = ", ".join(slot.slot for slot in now.slots)
        return (
            f"{one_line(now.kind)}: {counted(now.total, 'job')}, {now.before:,} done before, on "
            f"{slots}; process {now.pid} on {now.host}"
        )

    def lines_of(self, event: Event) -> list[Line]:
        """The lines about an event that the tracker has been updated with."""
        now, slot = self._tracker.current, event.slot.name
        lines = []
        if event.kind == "slot_lost":
            reason = one_line(event.reason)
            lines.append(Line(f"{slot} is out of service: {reason}", ERROR_STYLE))
        elif event.kind == "stopping":
            lines.append(Line(f"stopping: {event.reason}"))
        elif event.job is not None and (line := _job_line(event, one_line(event.job.name))):
            lines.append(line)
        has_ended = event.kind in ("finished", "pruned", "failed")
        if has_ended and now.ended % self._every == 0 and now.ended < now.total:
            lines.append(Line(rendering.summary(now, self._tracker.clock())))
        return lines

    def due_lines(self) -> list[Line]:
        """Lines of long-running jobs: the first after a minute, further ones whenever the job has
        run 10 % longer, at most every 10 minutes."""
        now, clock = self._tracker.current, self._tracker.clock()
        running = {(slot.slot, slot.job, slot.attempt): slot for slot in now.slots if slot.job}
        self._last_due = {key: self._last_due.get(key, slot.began) for key, slot in running.items()}
        lines = []
        for key, slot in running.items():
            interval_s = min(max(FIRST_LINE_S, (clock - slot.began) / 10), MAX_LINE_INTERVAL_S)
            if clock - self._last_due[key] >= interval_s:
                self._last_due[key] = clock
                lines.append(Line(rendering.slot_line(slot, clock)))
        if lines and now.total > len(running):
            lines.append(Line(rendering.summary(now, clock)))
        return lines

    def last_line(self) -> Line:
        now = self._tracker.current
        return Line(f"{now.state}: {rendering.summary(now, self._tracker.clock())}")


def _job_line(event: Event, name: str) -> Line | None:
    """The line about a job. Jobs that share a process get one only if something goes wrong."""
    assert event.job is not None
    slot, attempt = event.slot.name, rendering.attempt_suffix(event.attempt)
    reason = one_line(event.reason)
    if event.kind == "failed":
        return Line(f"failed: {name} on {slot}{attempt}: {reason}", ERROR_STYLE)
    if event.kind == "retried":
        return Line(f"lost: {name} on {slot}{attempt}: {reason}; it runs again", WARNING_STYLE)
    if event.kind == "stopped":
        return Line(f"{slot} stopped {name}{': ' if reason else ''}{reason}")
    if not event.job.own_process:
        return None
    if event.kind == "started":
        where = f" on {event.host}" if event.host else ""
        return Line(f"{slot} begins {name}{attempt}: process {event.pid}{where}, log {event.log}")
    if event.kind in ("finished", "pruned"):
        return Line(f"{slot} {event.kind} {name} after {duration(event.elapsed_s)}")
    return None


class _LineDisplay:
    """Prints every line. `add` does not wait for the reader."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._pending: deque[Line] = deque()

    def begin(self) -> None:
        pass

    def add(self, line: Line) -> None:
        self._pending.append(line)

    def draw(self) -> None:
        """Prints the pending lines."""
        if text := self.take_pending():
            self._out.print(Text(text), soft_wrap=True, end="")

    def take_pending(self) -> str:
        """The text of the pending lines, which are removed."""
        return "".join(f"{line.text}\n" for line in self._taken())

    def end(self) -> None:
        self.draw()

    def _taken(self) -> list[Line]:
        return [self._pending.popleft() for _ in range(len(self._pending))]


class _LiveDisplay(_LineDisplay):
    """A live view, with errors and warnings printed above it."""

    def __init__(self, tracker: StateTracker, out: Console) -> None:
        super().__init__(out)
        self._tracker = tracker
        self._columns: set[str] = set()
        self._live = Live(get_renderable=self._render, console=out, auto_refresh=False)

    def begin(self) -> None:
        self._live.start()

    def add(self, line: Line) -> None:
        if line.style:
            super().add(line)

    def draw(self) -> None:
        """Prints the pending lines, and the current state below them."""
        lines = self._taken()
        if hidden := lines[MAX_LINES_PER_DRAW:]:
            more = f"… and {len(hidden):,} more such lines in the log"
            lines[MAX_LINES_PER_DRAW:] = [Line(more, ERROR_STYLE)]
        if lines:
            texts = (Padding(Text(line.text, line.style), (0, 0, 0, 1)) for line in lines)
            self._out.print(Group(*texts))
        else:
            self._live.refresh()

    def take_pending(self) -> str:
        return ""  # the drawing thread prints them as soon as the terminal accepts output

    def end(self) -> None:
        self.draw()
        self._live.stop()

    def _render(self) -> RenderableType:
        now, clock = self._tracker.current, self._tracker.clock()
        self._columns |= rendering.columns_of(now, clock)  # a column that is shown once stays
        return rendering.render(now, clock, self._out.width - RESERVED_CELLS, self._columns)


class _StateWriter:
    """Writes the current state to the experiment's folder."""

    def __init__(self, tracker: StateTracker, folder: Path) -> None:
        self._tracker, self._folder = tracker, folder
        self._written: ExperimentState | None = None
        self._written_at = 0.0

    def write_if_due(self) -> None:
        """Writes the state if it has changed, or if the last write is `HEARTBEAT_S` ago."""
        current = self._tracker.current
        if current is not self._written or time.monotonic() > self._written_at + HEARTBEAT_S:
            state.write(self._folder, current)
            self._written, self._written_at = current, time.monotonic()


class _RepeatingThread(threading.Thread):
    """Calls a function every `every_s` seconds while the block runs, and then `last` once."""

    def __init__(
        self,
        function: Callable[[], object],
        every_s: float,
        last: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(daemon=True)
        self._function, self._every_s, self._last = function, every_s, last
        self._is_over = threading.Event()

    def __enter__(self) -> None:
        # Signals are for the main thread, which blocks them while it starts a worker.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.join(JOIN_TIMEOUT_S)

    def run(self) -> None:
        while not self._is_over.wait(self._every_s):
            self._function()
        self._last()


class _DetachableStream:
    """A stream that discards its output once the other end is closed."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._first = stream, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def prepend(self, text: str) -> None:
        """Writes `text` before the next output."""
        self._first = text

    def write(self, text: str) -> int:
        whole, self._first = self._first + text, ""
        self._try(lambda: self._stream.write(whole))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError:
            with contextlib.suppress(OSError):  # the stream may have no file descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
