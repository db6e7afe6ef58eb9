import fcntl
import io
import itertools
import os
import pty
import re
import struct
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from experiments.pool.test_scheduler import Given
from experiments.pool.test_scheduler import job as real_job
from experiments.progress.test_state import SLOTS, Clock, event, tracker_of, train
from gpt2.experiments.pool.job import Event, Job
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Scheduler
from gpt2.experiments.progress import live_view, rendering, state
from gpt2.experiments.progress.live_view import LineReporter, showing_progress
from gpt2.experiments.progress.state import StateTracker

STOP = "every job saves and ends, 60 s at most; Ctrl+C again ends at once"


def plain() -> Console:
    return Console(file=io.StringIO(), width=160, highlight=False, markup=False)


def text_of(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def short(name: str) -> Job:
    return Job(name, "module:function", {}, own_process=False)


def test_lines_where_there_is_no_terminal(tmp_path: Path):
    tracker, clock = tracker_of(total=25)
    out = plain()
    with showing_progress(tracker, tmp_path, every=10, out=out) as tell:
        for number in range(25):
            clock.now += 1
            tell(Event("started", SLOTS[0], short(f"seed={number}")))
            if number == 7:
                tell(Event("failed", SLOTS[0], short("seed=7"), reason="ValueError: [b]\n no"))
            else:
                tell(Event("finished", SLOTS[0], short(f"seed={number}")))
    lines = text_of(out).splitlines()
    assert lines == [
        "failed: seed=7 on gpu0: ValueError: [b] no",
        "9 of 25 done, 1 failed | 1.0 jobs/s | 15s left",
        "19 of 25 done, 1 failed | 1.0 jobs/s | 5s left",
        "finished: 24 of 25 done, 1 failed | 1.0 jobs/s | 25s",
    ]
    log = (tmp_path / live_view.LOG).read_text().splitlines()
    assert "models: 25 jobs, 0 done before, on gpu0, gpu1; process" in log[0]
    assert [line.partition(" | ")[2] for line in log[1:]] == lines
    assert re.match(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d {os.getpid()} \| ", log[1])
    kept = state.read(tmp_path)
    assert kept is not None and (kept.state, kept.done, kept.failed) == ("finished", 24, 1)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("comes_back", ["in time", "too late"])
def test_a_stalled_reader_does_not_delay_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_back: str
):
    monkeypatch.setattr(live_view, "DRAW_EVERY_S", 0.01)
    monkeypatch.setattr(live_view, "JOIN_TIMEOUT_S", 30.0 if comes_back == "in time" else 0.1)
    tracker, clock = tracker_of(total=2000)
    end, begin = os.pipe()
    read: list[str] = []

    def read_all() -> None:
        with os.fdopen(end) as lines:
            read.extend(lines)

    reader = threading.Thread(target=read_all, daemon=True)
    with os.fdopen(begin, "w") as file:
        out = Console(file=file, width=160, highlight=False, markup=False)
        with showing_progress(tracker, tmp_path, out=out) as tell:
            for number in range(2000):
                clock.now += 1
                tell(event("failed", 0, f"seed={number}", reason="no" * 50))
                if number == 1000:
                    time.sleep(0.1)  # its 100 kB are more than a pipe holds
            if comes_back == "in time":
                reader.start()
        if comes_back == "too late":
            reader.start()
        out.print("and later")
    reader.join()
    lines = [line.rstrip("\n") for line in read]
    log = (tmp_path / live_view.LOG).read_text().splitlines()
    assert [*(line.partition(" | ")[2] for line in log[1:]), "and later"] == lines
    assert len(lines) == 2000 + 199 + 2


def test_a_long_job_gets_lines_at_growing_intervals():
    tracker, clock = tracker_of(total=4)
    reporter = LineReporter(tracker, every=10)
    train(tracker, clock, 0, "a", range(1, 21), total=100_000)
    said = []
    for second in range(20, 20_000):
        clock.now = 1000.0 + second
        said += [(second, line.text) for line in reporter.due_lines()]
    times = [
        second for second, text in said if text.startswith("gpu0 a: step 20 of 100,000 | loss")
    ]
    assert times[0] == 60 and len(times) < 60
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses[0] == 60 and max(pauses) == 600 and pauses == sorted(pauses)


def test_jobs_with_their_own_process_get_a_line_each():
    tracker, _ = tracker_of(total=4)
    reporter = LineReporter(tracker, every=10)
    lines = [
        reporter.lines_of(item)[0].text
        for item in (
            event("started", 0, "a", log="worker.log"),
            event("retried", 0, "a", reason="killed"),
            event("finished", 0, "a", at=3700.0),
            event("stopped", 0, "a", reason="it did not end"),
            Event("slot_lost", SLOTS[1], reason="3 failures"),
            Event("stopping", SLOTS[1], reason=STOP),
        )
    ]
    assert lines == [
        "gpu0 begins a: process 7, log worker.log",
        "lost: a on gpu0: killed; it runs again",
        "gpu0 finished a after 1h 01m",
        "gpu0 stopped a: it did not end",
        "gpu1 is out of service: 3 failures",
        f"stopping: {STOP}",
    ]


def screen(tracker: StateTracker, clock: Clock, width: int) -> list[str]:
    out = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    columns = rendering.columns_of(tracker.current, clock.now)
    out.print(rendering.render(tracker.current, clock.now, width, columns))
    return text_of(out).splitlines()


def test_the_live_view_fits_into_any_width():
    tracker, clock = tracker_of(total=100, before=5)
    train(
        tracker,
        clock,
        0,
        "learning_rate=0.001,weight_decay=0.1,[b]dropout[/b]=0.1,seed=17",
        range(1, 9),
        9999,
    )
    tracker.update(event("failed", 1, "b", reason="bad"))
    tracker.update(Event("slot_lost", SLOTS[1], reason="3 failures in a row"))
    tracker.update(Event("stopping", SLOTS[0], reason=STOP))
    for width in (1, 5, 20, 40, 79, 80, 120, 300):
        lines = screen(tracker, clock, width)
        assert max(len(line) for line in lines) <= width
    narrow, wide = screen(tracker, clock, 80), screen(tracker, clock, 200)
    assert "5/100  1 failed" in narrow[0]
    assert any("8/9,999" in line and "3.5000" in line and ",seed=17" in line for line in narrow)
    assert any("weight_decay=0.1,[b]dropout[/b]=0.1,seed=17" in line for line in wide)
    assert any("out of service: 3 failures in a row" in line for line in wide)
    assert narrow[-1].rstrip() == f" Stopping: {STOP}"


@contextmanager
def terminal(columns: int = 80) -> Iterator[tuple[Console, list[bytes], int]]:
    """A console on a real terminal, what it shows, and the terminal's other end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    seen: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(ours, 1 << 16):
                seen.append(data)
        except OSError:
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with os.fdopen(theirs, "w", encoding="utf-8", closefd=True) as file:
        out = Console(file=file, markup=False, highlight=False, width=columns)
        yield out, seen, ours
    reader.join(5)


def test_live_view_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(live_view, "DRAW_EVERY_S", 0.02)
    tracker, clock = tracker_of(total=3)
    with terminal() as (out, seen, _), showing_progress(tracker, tmp_path, out=out) as tell:
        train(tracker, clock, 0, "seed=[1]", range(1, 9), 100)
        tell(event("failed", 1, "seed=[2]", reason="ValueError: [red]"))
        deadline = time.monotonic() + 5
        while not (b"seed=[2]" in b"".join(seen) and b"8/100" in b"".join(seen)):
            assert time.monotonic() < deadline, b"".join(seen)
            time.sleep(0.01)
        print("from elsewhere")
        tell(event("finished", 0, "seed=[1]"))
        tell(event("finished", 1, "seed=[3]"))
    shown = b"".join(seen).decode()
    assert "\x1b[31mfailed: seed=[2] on gpu1: ValueError: [red]\x1b[0m" in shown
    assert "\x1b[?25h" in shown.rpartition("2/3")[2], "the cursor is there again"
    assert "from elsewhere" in shown
    last = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown.rpartition("models")[2])
    assert "2/3  1 failed" in last and "slot" not in last
    assert "failed: seed=[2]" in (tmp_path / live_view.LOG).read_text()


def test_a_closed_terminal_does_not_end_the_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(live_view, "DRAW_EVERY_S", 0.01)
    tracker, _ = tracker_of(total=2)
    with terminal() as (out, _seen, ours):
        with showing_progress(tracker, tmp_path, out=out) as tell:
            tell(event("started", 0))
            os.close(ours)
            for _ in range(2):
                tell(event("failed", 0, reason="no"))
                time.sleep(0.05)
        out.print("and later")
    assert "finished: 0 of 2 done, 2 failed" in (tmp_path / live_view.LOG).read_text()


def test_progress_of_a_scheduler(tmp_path: Path):
    jobs = [real_job(f"seed={n}", "square", seed=n) for n in range(12)]
    source, out = Given(*jobs, real_job("bad", "rises")), plain()
    tracker = StateTracker("seeds", 13, SLOTS)
    with showing_progress(tracker, tmp_path, every=5, out=out) as tell:
        Scheduler(
            Engine(SLOTS), source, tell, log_of=lambda slot, _: tmp_path / f"{slot.name}.log"
        ).run()
    text = text_of(out)
    assert "failed: bad on gpu" in text
    assert "finished: 12 of 13 done, 1 failed" in text and text.count("jobs/") == 3
    assert {slot.log for slot in tracker.current.slots} == {
        str(tmp_path / f"{slot.name}.log") for slot in SLOTS
    }
