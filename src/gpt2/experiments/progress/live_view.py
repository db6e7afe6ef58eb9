"""What a person sees of an experiment while it goes on: a live view, or lines where there is none.

The pool tells events. What is shown, and the picture on the disk, are written by threads of their
own, so that no slow reader, be it a terminal or `| less`, holds up the jobs. Only the lines of the
log are written at once.
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
from gpt2.experiments.progress.state import Board, Picture

LOG = "experiment.log"
DRAW_EVERY_S = 0.25
DUE_EVERY_S = 1.0
WRITE_EVERY_S = 2.0
HEARTBEAT_S = 60.0
"""how often the state is written though nothing happens: another machine sees that it lives"""
FIRST_LINE_S, SELDOMEST_LINE_S = 60.0, 600.0
"""how long a job runs until a line says how far it is; further ones come ever more seldom"""
SHOWN_AT_ONCE = 10
ECHO_CELLS = 4
"""the terminal's ^C must not begin a line of its own, which would shift the view"""
FAREWELL_S = 10.0
"""how long the end waits for a disk or a reader"""
BAD, ODD = "red", "yellow"


@contextlib.contextmanager
def watched(
    watching: Board,
    folder: Path,
    *,
    log: Path | None = None,
    every: int = 10,
    out: Console | None = None,
) -> Iterator[Callable[[Event], None]]:
    """Shows the experiment while the block runs; yields what a pool calls with every event.

    Its state is kept in `folder`, and its log, there or where `log` says, gets a line after every
    `every` jobs, for each failure, and now and then for a job that takes long. A terminal has a
    live view of that, everything else the same lines.
    """
    out = out or console()
    terminal, lasting = out.file, _Lasting(out.file)
    out.file = lasting  # type: ignore[assignment]
    screen = _Screen(watching, out) if out.is_interactive and terminal.isatty() else _Lines(out)
    journal, narrator = ExperimentLog(log or folder / LOG), Narrator(watching, every)
    journal.add(narrator.beginning())

    def say(lines: list[Line]) -> None:
        for line in lines:
            journal.add(line.text)
            screen.say(line)

    def on_event(event: Event) -> None:
        watching.take(event)
        say(narrator.told(event))

    keeper = _Keeper(watching, folder)
    keeping = _Repeated(keeper.keep, WRITE_EVERY_S)
    telling = _Repeated(lambda: say(narrator.due()), DUE_EVERY_S)
    drawing = _Repeated(screen.draw, DRAW_EVERY_S, last=screen.end)
    screen.begin()
    try:
        with drawing:
            try:
                with keeping, telling:
                    keeper.keep()
                    yield on_event
            finally:
                watching.end()
                keeper.keep()
                say([narrator.end()])
    finally:
        journal.close()
        if drawing.is_alive():  # nobody reads at present
            lasting.precede(screen.unsaid())
        else:
            out.file = terminal


@dataclass(frozen=True)
class Line:
    """Something to say. What has a style is said above a live view too."""

    text: str
    style: str = ""


class Narrator:
    """Puts into words what happens."""

    def __init__(self, watching: Board, every: int) -> None:
        self._board, self._every = watching, every
        self._said: dict[tuple[str, str, int], float] = {}
        """when a line was due last, by slot, job and attempt"""

    def beginning(self) -> str:
        now = self._board.picture
        slots = ", ".join(place.slot for place in now.places)
        return (
            f"{one_line(now.kind)}: {counted(now.total, 'job')}, {now.before:,} done before, on "
            f"{slots}; process {now.pid} on {now.host}"
        )

    def told(self, event: Event) -> list[Line]:
        """What there is to say of an event that the board has taken."""
        now, slot = self._board.picture, event.slot.name
        lines = []
        if event.kind == "slot_lost":
            lines.append(Line(f"{slot} is out of service: {one_line(event.reason)}", BAD))
        elif event.kind == "stopping":
            lines.append(Line(f"stopping: {event.reason}"))
        elif event.job is not None and (line := _of_job(event, one_line(event.job.name))):
            lines.append(line)
        has_ended = event.kind in ("finished", "pruned", "failed")
        if has_ended and now.ended % self._every == 0 and now.ended < now.total:
            lines.append(Line(rendering.summary(now, self._board.clock())))
        return lines

    def due(self) -> list[Line]:
        """Lines of jobs that nothing was said of for long: after a minute, and then whenever a job
        has become a tenth older."""
        now, clock = self._board.picture, self._board.clock()
        running = {
            (place.slot, place.job, place.attempt): place for place in now.places if place.job
        }
        self._said = {key: self._said.get(key, place.began) for key, place in running.items()}
        lines = []
        for key, place in running.items():
            pause_s = min(max(FIRST_LINE_S, (clock - place.began) / 10), SELDOMEST_LINE_S)
            if clock - self._said[key] >= pause_s:
                self._said[key] = clock
                lines.append(Line(rendering.place_line(place, clock)))
        if lines and now.total > len(running):
            lines.append(Line(rendering.summary(now, clock)))
        return lines

    def end(self) -> Line:
        now = self._board.picture
        return Line(f"{now.state}: {rendering.summary(now, self._board.clock())}")


def _of_job(event: Event, name: str) -> Line | None:
    """A job that has a process of its own is worth a line when it begins and ends."""
    assert event.job is not None
    slot, again = event.slot.name, rendering.attempt(event.attempt)
    reason = one_line(event.reason)
    if event.kind == "failed":
        return Line(f"failed: {name} on {slot}{again}: {reason}", BAD)
    if event.kind == "retried":
        return Line(f"lost: {name} on {slot}{again}: {reason}; it runs again", ODD)
    if event.kind == "stopped":
        return Line(f"{slot} stopped {name}{': ' if reason else ''}{reason}")
    if not event.job.own_process:
        return None
    if event.kind == "started":
        where = f" on {event.host}" if event.host else ""
        return Line(f"{slot} begins {name}{again}: process {event.pid}{where}, log {event.log}")
    if event.kind in ("finished", "pruned"):
        return Line(f"{slot} {event.kind} {name} after {duration(event.elapsed_s)}")
    return None


class _Lines:
    """Says everything, line by line. Whoever says something does not wait until it is read."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._waiting: deque[Line] = deque()

    def begin(self) -> None:
        pass

    def say(self, line: Line) -> None:
        self._waiting.append(line)

    def draw(self) -> None:
        """Prints what was said since the last time."""
        if text := self.unsaid():
            self._out.print(Text(text), soft_wrap=True, end="")

    def unsaid(self) -> str:
        """What was said and is not printed; nobody else prints it any more."""
        return "".join(f"{line.text}\n" for line in self._taken())

    def end(self) -> None:
        self.draw()

    def _taken(self) -> list[Line]:
        return [self._waiting.popleft() for _ in range(len(self._waiting))]


class _Screen(_Lines):
    """A live view; above it stays what went wrong."""

    def __init__(self, watching: Board, out: Console) -> None:
        super().__init__(out)
        self._board = watching
        self._columns: set[str] = set()
        self._live = Live(get_renderable=self._drawn, console=out, auto_refresh=False)

    def begin(self) -> None:
        self._live.start()

    def say(self, line: Line) -> None:
        if line.style:
            super().say(line)

    def draw(self) -> None:
        """The picture as it is now, below what was said since the last one."""
        lines = self._taken()
        if hidden := lines[SHOWN_AT_ONCE:]:  # a thousand failures a second help nobody
            lines[SHOWN_AT_ONCE:] = [Line(f"… and {len(hidden):,} more such lines in the log", BAD)]
        if lines:
            texts = (Padding(Text(line.text, line.style), (0, 0, 0, 1)) for line in lines)
            self._out.print(Group(*texts))
        else:
            self._live.refresh()

    def unsaid(self) -> str:
        return ""  # it is shown above the last picture, as soon as the terminal goes on

    def end(self) -> None:
        self.draw()
        self._live.stop()

    def _drawn(self) -> RenderableType:
        now, clock = self._board.picture, self._board.clock()
        self._columns |= rendering.columns_of(now, clock)  # they stay: a table that jumps is unrest
        return rendering.drawn(now, clock, self._out.width - ECHO_CELLS, self._columns)


class _Keeper:
    """Keeps the newest picture on the disk."""

    def __init__(self, watching: Board, folder: Path) -> None:
        self._board, self._folder = watching, folder
        self._kept: Picture | None = None
        self._kept_at = 0.0

    def keep(self) -> None:
        """Writes it if it has changed, or if this was long ago."""
        newest = self._board.picture
        if newest is not self._kept or time.monotonic() > self._kept_at + HEARTBEAT_S:
            state.write(self._folder, newest)
            self._kept, self._kept_at = newest, time.monotonic()


class _Repeated(threading.Thread):
    """Calls a function again and again while the block runs, and after it perhaps a `last` one."""

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
        self.join(FAREWELL_S)

    def run(self) -> None:
        while not self._is_over.wait(self._every_s):
            self._function()
        self._last()


class _Lasting:
    """A stream whose other end may go away: from then on nobody reads it."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._first = stream, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def precede(self, text: str) -> None:
        """Puts `text` before what is written next."""
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
            with contextlib.suppress(OSError):  # it may have no handle
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
