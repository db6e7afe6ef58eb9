import io
import itertools
import os
import pty
import re
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from rich.console import Console

from experiments.given import Given
from experiments.given import job as real_job
from experiments.progress.tracked import SLOTS, Clock, Tracker, begun, event, train
from gpt2.base.errors import ConfigError
from gpt2.experiments.pool.job import Event, Job
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Scheduler
from gpt2.experiments.progress import rendering, state
from gpt2.experiments.progress.live_view import LineReporter, showing_progress
from gpt2.experiments.progress.state import ExperimentState

STOP = "every job saves and ends, 60 s at most; Ctrl+C again ends at once"


def plain() -> Console:
    return Console(file=io.StringIO(), width=160, highlight=False, markup=False)


def text_of(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def short(name: str) -> Job:
    return Job(name, "module:function", {}, own_process=False)


def test_lines_where_there_is_no_terminal(tmp_path: Path):
    clock = Clock()
    out, log = plain(), tmp_path / "logs" / "a.log"
    with showing_progress(begun(total=25), tmp_path, log=log, out=out, clock=clock) as progress:
        for number in range(25):
            clock.now += 1
            job = short(f"seed={number}")
            progress.report(Event("started", SLOTS[0], job))
            if number == 7:
                progress.report(Event("failed", SLOTS[0], job, reason="ValueError: [b]\n no"))
            else:
                progress.report(Event("finished", SLOTS[0], job))
    lines = text_of(out).splitlines()
    assert lines == [
        "failed: seed=7 on gpu0: ValueError: [b] no",
        "9 of 25 done, 1 failed | 1.0 jobs/s | 15s left",
        "19 of 25 done, 1 failed | 1.0 jobs/s | 5s left",
        "finished: 24 of 25 done, 1 failed | 1.0 jobs/s | 25s",
    ]
    first, *logged = log.read_text().splitlines()
    assert "models: 25 jobs, 0 done before, on gpu0, gpu1; process" in first
    assert [line.partition(" | ")[2] for line in logged] == lines
    assert re.match(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d {os.getpid()} \| ", logged[1])
    kept = state.read(tmp_path)
    assert kept is not None and (kept.state, kept.done, kept.failed) == ("finished", 24, 1)


def fail_until_full(tell: Callable[[Event], None], handle: int) -> int:
    """Reports failures until the other end of `handle` takes no more output, and 1,000 after that;
    returns their number."""
    count, last = 0, None
    while count != last:
        tell(event("failed", 0, f"seed={count}", reason="no" * 50))
        count += 1
        if last is None and not select.select([], [handle], [], 0)[1]:
            last = count + 1000
    return count


def test_a_log_that_cannot_be_written_is_one_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"cannot write .*another folder with --log_dir"),
        showing_progress(begun(total=1), log=tmp_path / "file" / "seeds.log", out=plain()),
    ):
        pass


def test_a_stalled_reader_does_not_delay_jobs(tmp_path: Path):
    end, begin = os.pipe()
    read: list[str] = []

    def read_all() -> None:
        with os.fdopen(end) as lines:
            read.extend(lines)

    reader, log = threading.Thread(target=read_all, daemon=True), tmp_path / "a.log"
    with os.fdopen(begin, "w") as file:
        out = Console(file=file, width=160, highlight=False, markup=False)
        with showing_progress(begun(total=10**6), tmp_path, log=log, out=out) as progress:
            count = fail_until_full(progress.report, begin)
            reader.start()
        out.print("and later")
    reader.join()
    _, *logged = [line.partition(" | ")[2] for line in log.read_text().splitlines()]
    assert [*logged, "and later"] == [line.rstrip("\n") for line in read]
    assert len([line for line in logged if line.startswith("failed: ")]) == count


def test_long_jobs_get_lines_at_growing_intervals(tmp_path: Path):
    clock, out = Clock(), plain()
    with (tmp_path / "a.log").open("ab") as log:
        progress = LineReporter(begun(total=4), None, log.fileno(), out, clock)
        train(progress.report, clock, 0, "a", range(1, 21), total=100_000)
        times = []
        for second in range(20, 20_000):
            before, clock.now = len(text_of(out)), 1000.0 + second
            progress.write()
            if "gpu0 a: step 20 of 100,000 | loss 3.5000 | " in text_of(out)[before:]:
                times.append(second)
    assert times[0] == 60 and len(times) < 60
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses[0] == 60 and max(pauses) == 600 and pauses == sorted(pauses)


def test_jobs_with_their_own_process_get_a_line_each():
    lines = [
        rendering.event_line(item)
        for item in (
            event("started", 0, "a", log="worker.log"),
            event("retried", 0, "a", reason="killed"),
            event("finished", 0, "a", at=3700.0),
            event("stopped", 0, "a", reason="it did not end"),
            Event("slot_lost", SLOTS[1], reason="3 failures"),
            Event("stopping", SLOTS[1], reason=STOP),
            Event("finished", SLOTS[0], short("b")),
        )
    ]
    assert lines == [
        "gpu0 begins a: process 7, log worker.log",
        "lost: a on gpu0: killed; it runs again",
        "gpu0 finished a after 1h 01m",
        "gpu0 stopped a: it did not end",
        "gpu1 is out of service: 3 failures",
        f"stopping: {STOP}",
        "",
    ]


def screen(tracker: Tracker, width: int) -> list[str]:
    out = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    out.print(rendering.view(tracker.current, tracker.clock.now, width))
    return text_of(out).splitlines()


def test_the_live_view_fits_into_any_width():
    tracker = Tracker(total=100, before=5)
    name = "learning_rate=0.001,weight_decay=0.1,[b]dropout[/b]=0.1,seed=17"
    train(tracker.update, tracker.clock, 0, name, range(1, 9), 9999)
    tracker.update(event("failed", 1, "b", reason="bad"))
    tracker.update(Event("slot_lost", SLOTS[1], reason="3 failures in a row"))
    for width in (1, 5, 20, 40, 79, 80, 120, 300):
        lines = screen(tracker, width)
        assert max((len(line) for line in lines), default=0) <= width
    narrow, wide = screen(tracker, 80), screen(tracker, 200)
    assert "1 failed" in narrow[0] and " 6 % " in narrow[0]
    assert wide[0].startswith("models 5 of 100 done, 1 failed ")
    assert ",seed=17" in narrow[1] and "loss 3.5000" in narrow[1] and "left" in narrow[1]
    assert f"{name} " in wide[1] and "step 8 of 9,999" in wide[1]
    assert "out of service: 3 failures in a row" in wide[2]
    tracker.update(Event("stopping", SLOTS[0], reason=STOP))
    assert screen(tracker, 80)[0].rstrip() == f"Stopping: {STOP}"
    tracker.end()
    assert screen(tracker, 80)[0].rstrip() == "Stopped: 94 of 100 jobs left"
    assert len(screen(tracker, 80)) == 2


@contextmanager
def terminal() -> Iterator[tuple[Console, list[bytes], threading.Thread, int]]:
    """A console on a real terminal, what it has shown, the thread that reads that once it is
    started, and the terminal's other end."""
    ours, theirs = pty.openpty()
    seen: list[bytes] = []

    def read() -> None:
        with suppress(OSError):
            while data := os.read(ours, 1 << 16):
                seen.append(data)

    reader = threading.Thread(target=read, daemon=True)
    with os.fdopen(theirs, "w", encoding="utf-8", closefd=True) as file:
        yield Console(file=file, markup=False, highlight=False), seen, reader, ours
    reader.join()


@pytest.fixture
def a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("a_terminal_of_80_columns")
def test_live_view_on_a_terminal(tmp_path: Path):
    clock, log = Clock(), tmp_path / "a.log"
    with terminal() as (out, seen, reader, _):
        reader.start()
        with showing_progress(begun(3), tmp_path, log=log, out=out, clock=clock) as progress:
            train(progress.report, clock, 0, "seed=[1]", range(1, 9), 100)
            progress.report(event("failed", 1, "seed=[2]", reason="ValueError: [red]"))
            while not (b"seed=[2]" in b"".join(seen) and b"loss 3.5000" in b"".join(seen)):
                time.sleep(0.01)
            print("from elsewhere")
            progress.report(event("finished", 0, "seed=[1]"))
            progress.report(event("finished", 1, "seed=[3]"))
        out.print("and later")
    shown = b"".join(seen).decode()
    assert "\x1b[31mfailed: seed=[2] on gpu1: ValueError: [red]\x1b[0m" in shown
    assert "from elsewhere" in shown
    view, cursor, later = shown.rpartition("\x1b[?25h")
    assert cursor and "and later" in later, "the cursor is there again"
    lines = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", view).splitlines()
    assert max(map(len, lines)) <= 80 - 4, "there is room for the echo of ^C"
    last = "".join(lines).rpartition("models")[2]
    assert "2 of 3 done, 1 failed" in last and "100 %" in last and "gpu0" not in last
    assert "failed: seed=[2]" in log.read_text()


@pytest.mark.usefixtures("a_terminal_of_80_columns")
def test_a_stalled_terminal_does_not_delay_jobs(tmp_path: Path):
    """As after Ctrl+S."""
    started, log = begun(total=10**6), tmp_path / "a.log"
    with terminal() as (out, seen, reader, _ours):
        with showing_progress(started, tmp_path, log=log, out=out) as progress:
            count = fail_until_full(progress.report, out.file.fileno())
            print("from elsewhere")
            reader.start()
        out.print("and later")
    shown = b"".join(seen).decode()
    assert shown.count("failed: seed=") == count
    assert shown.index("from elsewhere") < shown.index("and later")


@pytest.mark.usefixtures("a_terminal_of_80_columns")
def test_a_closed_terminal_does_not_end_the_experiment(tmp_path: Path):
    log = tmp_path / "a.log"
    with terminal() as (out, _seen, reader, ours):
        with showing_progress(begun(total=2), tmp_path, log=log, out=out) as progress:
            progress.report(event("started", 0))
            os.close(ours)
            for _ in range(2):
                progress.report(event("failed", 0, reason="no"))
        out.print("and later")
        reader.start()
    assert "finished: 0 of 2 done, 2 failed" in log.read_text()


def test_progress_of_a_scheduler(tmp_path: Path):
    jobs = [real_job(f"seed={n}", "square", seed=n) for n in range(22)]
    source, out = Given(*jobs, real_job("bad", "rises")), plain()
    started = ExperimentState.at_start("seeds", 23, SLOTS)
    with showing_progress(started, tmp_path, log=tmp_path / "a.log", out=out) as progress:
        Scheduler(
            Engine(SLOTS),
            source,
            progress.report,
            log_of=lambda slot, _: tmp_path / f"{slot.name}.log",
        ).run()
    text = text_of(out)
    assert "failed: bad on gpu" in text
    assert "finished: 22 of 23 done, 1 failed" in text and text.count("jobs/") == 3
    assert {slot.log for slot in progress.current.slots} == {
        str(tmp_path / f"{slot.name}.log") for slot in SLOTS
    }
