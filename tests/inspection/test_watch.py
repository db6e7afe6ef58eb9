"""The view of a run, from files that nothing trained."""

import contextlib
import io
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from gpt2.base import folder_lock
from gpt2.inspection import watch
from gpt2.inspection.watch import RunView
from gpt2.metrics.jsonl import JsonLines
from gpt2.metrics.records import (
    CorpusLoss,
    EventRecord,
    HellaSwagRecord,
    Record,
    StepRecord,
    ValidationRecord,
)
from gpt2.train import status
from gpt2.train.status import Plan, RunState
from inspection.written_runs import PLAN

NAME = "gpt2-124m_20261128_141903"


def write(folder: Path, steps: int = 300, state: RunState = "running", reason: str | None = None):
    """A run of 1000 steps with everything that a run can log; a warning comes early."""
    log_dir = folder / "logs"
    log_dir.mkdir(parents=True, exist_ok=True)
    sink = JsonLines(log_dir / "metrics.jsonl", NAME, 0, {})
    sink.write(EventRecord("INFO", f"Run {NAME}: 124.5 M parameters on 8 × cuda, bfloat16"))
    gpu = {"memory_gb": 71.31, "peak_memory_gb": 75.0, "utilisation_percent": 98.0}
    for step in range(1, steps + 1):
        record = StepRecord(
            step, 0, 3 + 30 / step, 6e-4, 0.85, 0.95, 551_880.0, 0.423, [], [gpu, gpu], 1000 - step
        )
        record = StepRecord(**record.__dict__ | {"left_s": 3700.0, "applied": step != 7})
        sink.write(record)
        if step == 7:
            sink.write(EventRecord("WARNING", "step 7: loss nan, gradient norm inf: no update"))
        if step % 100 == 0:
            sink.write(ValidationRecord(step, 0, 3.1 + 30 / step, 1 + 30 / step))
            sink.write(HellaSwagRecord(step, 0, 0.26, 0.2821, 10042))
            for number in range(3):
                sink.write(EventRecord("INFO", f"Message {number} of step {step}"))
    sink.close()
    values = PLAN.__dict__ | {"run_name": NAME, "log_file": str(log_dir / "log.txt")}
    (folder / "checkpoints").mkdir(exist_ok=True)
    status.write(folder / "checkpoints", Plan(**values), state, steps, reason)


def log(folder: Path, *records: Record, name: str = NAME, first: int = 300) -> None:
    sink = JsonLines(folder / "logs" / "metrics.jsonl", name, first, {})
    for record in records:
        sink.write(record)
    sink.close()


def view_of(folder: Path, **options: object) -> RunView:
    view = RunView(folder / "checkpoints", **options)
    while view.update():
        pass
    return view


def shown(view: RunView, width: int = 80, height: int = 40, is_ascii: bool = False) -> str:
    out = Console(file=io.StringIO(), width=width, highlight=False)
    out.print(view.render(width, height, is_ascii=is_ascii))
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    with folder_lock.held(folder / "checkpoints"):
        yield


def test_a_running_run(tmp_path: Path):
    write(tmp_path)
    with held(tmp_path):
        text = shown(view_of(tmp_path))
    for words in (
        f"{NAME}  running",
        "step 300 of 1,000  30.0 %",
        "1h 01m left, ",
        "loss      3.1000",
        "val loss  3.2000",
        "best val  3.2000",
        "bits/byte 1.1000",
        "HellaSwag 0.2821",
        "tokens/s  551,880",
        "step time 950 ms",
        "MFU       42.3 %",
        "GPU 0     98 %  71.3 GB",
        "GPU 1     98 %  71.3 GB",
        "GPU peak  75.0 GB",
        "skipped   1, last 7",
        "ranks     2 × cuda",
        "● validation",
        "messages  1 warning",
        "step 7: loss nan, gradient norm inf: no update",
        "Message 2 of step 300",
    ):
        assert words in text, words


def of_corpora(step: int, **losses: float) -> ValidationRecord:
    return ValidationRecord(
        step, 0, 3.0, 1.0, {name: CorpusLoss(loss, None) for name, loss in losses.items()}
    )


def test_a_mixture_has_a_line_for_the_validation_loss_of_each_corpus(tmp_path: Path):
    write(tmp_path)
    assert "val loss  web" not in shown(view_of(tmp_path))
    log(tmp_path, of_corpora(250, code=1.5, fineweb_edu=3.5), first=200)
    log(tmp_path, StepRecord(251, 0, 3.0, 1e-3, 1.0, 2.0, 16.0, 0.1, []), first=250)
    assert "\nval loss  code         1.5000 (250)\nval loss  fineweb_edu  3.5000 (250)\n" in shown(
        view_of(tmp_path)
    )
    log(tmp_path, of_corpora(251, fineweb_edu=3.25, **{"new\x1b": math.nan}), first=251)
    lines = [line.rstrip() for line in shown(view_of(tmp_path)).splitlines()]
    place = lines.index("val loss  code         1.5000 (250)")
    assert lines[place + 1 : place + 3] == [
        "val loss  fineweb_edu  3.2500",
        "val loss  new          nan",
    ]
    log(tmp_path, first=200)  # a resume undoes them
    log(tmp_path, StepRecord(201, 0, 3.0, 1e-3, 1.0, 2.0, 16.0, 0.1, []), first=200)
    assert "val loss  code" not in shown(view_of(tmp_path))


def test_many_corpora_leave_room_for_the_chart_and_the_messages(tmp_path: Path):
    write(tmp_path)
    log(tmp_path, of_corpora(300, **{f"part_{number:02}": 3.0 for number in range(30)}))
    text = shown(view_of(tmp_path), height=30)
    count = text.count("val loss  part_")
    assert count >= 3 and f"\n          and {30 - count} more\n" in text
    assert "● validation" in text
    assert "step 7: loss nan" in text and "Message 2 of step 300" in text
    assert "and 30 more" not in shown(view_of(tmp_path), height=10)


@pytest.mark.parametrize("width", [40, 60, 80, 140, 250])
@pytest.mark.parametrize("height", [10, 16, 24, 50])
@pytest.mark.parametrize("corpora", [0, 3, 60])
def test_it_fits_into_the_terminal(tmp_path: Path, corpora: int, width: int, height: int):
    write(tmp_path)
    names = (f"corpus_{'with_a_long_name' * (number % 4)}_{number}" for number in range(corpora))
    log(tmp_path, of_corpora(300, **dict.fromkeys(names, 3.0)))
    lines = shown(view_of(tmp_path), width, height).splitlines()
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    assert "step 300 of 1,000" in lines[1]


def test_what_is_null_is_shown_as_unknown(tmp_path: Path):
    """`metrics.jsonl` has null for NaN and infinity."""
    write(tmp_path)
    nothing = math.nan
    usage = dict.fromkeys(("memory_gb", "peak_memory_gb", "utilisation_percent"), nothing)
    record = StepRecord(301, 0, nothing, nothing, nothing, nothing, math.inf, nothing, [], [usage])
    log(tmp_path, record)
    text = shown(view_of(tmp_path))
    assert "step 301 of 1,000" in text
    assert "tokens/s  nan" in text


def test_a_log_whose_run_must_have_ended_has_no_time_left(tmp_path: Path):
    write(tmp_path)
    path = tmp_path / "logs" / "log.txt"
    for later_s, is_shown in ((60, True), (3800, False)):
        view = RunView(None, path, clock=lambda after=later_s: time.time() + after)
        view.update()
        assert (" left, " in shown(view)) == is_shown


def test_a_high_terminal_is_used(tmp_path: Path):
    write(tmp_path)
    assert len(shown(view_of(tmp_path), 80, 40).splitlines()) > 30
    low, lowest = shown(view_of(tmp_path), 80, 22), shown(view_of(tmp_path), 80, 19)
    assert "● validation" in low and "messages" in low
    assert "● validation" in lowest and "messages" not in lowest


def test_ascii_terminals_get_ascii(tmp_path: Path):
    write(tmp_path)
    out = Console(file=io.TextIOWrapper(io.BytesIO(), "ascii", "replace"), width=80)
    out.print(view_of(tmp_path).render(80, 40, is_ascii=True))
    out.file.flush()
    text = out.file.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert text.count("?") <= 4  # of the × and … of others
    assert "o validation" in text


def test_the_states_of_a_run(tmp_path: Path):
    write(tmp_path)
    assert view_of(tmp_path).state == "dead"
    assert "Process " in shown(view_of(tmp_path))
    with held(tmp_path):
        assert view_of(tmp_path).state == "running"
        later = time.time() + status.STALL_S + 100
        stalled = view_of(tmp_path, clock=lambda: later)
        assert stalled.state == "stalled"
        assert "stalled: no sign of life for 6m 4" in shown(stalled)
        assert stalled.left_s is None
    for state, reason in (("finished", None), ("stopped", "by signal 15"), ("failed", "OSError")):
        status.write(
            tmp_path / "checkpoints", status.read(tmp_path / "checkpoints").plan, state, 300, reason
        )
        view = view_of(tmp_path)
        assert view.state == state
        assert reason is None or f"{state.capitalize()}: {reason}" in shown(view)


def test_looking_takes_no_lock_and_changes_no_file(tmp_path: Path, monkeypatch):
    write(tmp_path)
    with held(tmp_path):
        pass
    monkeypatch.setattr(folder_lock, "lock_file", None)
    before = {path: path.stat() for path in tmp_path.rglob("*")}
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    view = view_of(tmp_path)
    view.update()
    shown(view)
    for path in before:
        path.chmod(0o755 if path.is_dir() else 0o644)
    after = {path: path.stat() for path in tmp_path.rglob("*")}
    assert {path: stat.st_mtime_ns for path, stat in before.items()} == {
        path: stat.st_mtime_ns for path, stat in after.items()
    }


def test_a_death_is_reported_once(tmp_path: Path):
    write(tmp_path)
    deaths: list[Path] = []
    view = RunView(tmp_path / "checkpoints", on_death=lambda folder, _: deaths.append(folder))
    with held(tmp_path):
        view.update()
        assert not deaths
    for _ in range(3):
        view.update()
    assert len(deaths) == 1
    with held(tmp_path):
        view.update()
    view.update()
    assert len(deaths) == 2


def test_files_that_are_gone_are_said_and_what_is_known_stays(tmp_path: Path):
    write(tmp_path)
    view = view_of(tmp_path)
    (tmp_path / "logs" / "metrics.jsonl").unlink()
    (tmp_path / "checkpoints" / "status.json").unlink()
    view.update()
    text = shown(view)
    assert "status.json is gone" in text
    assert "The log is gone" in text
    assert "step 300 of 1,000" in text


def test_a_run_that_follows_in_the_same_folder_is_shown_instead(tmp_path: Path):
    write(tmp_path)
    view = view_of(tmp_path)
    plan = status.read(tmp_path / "checkpoints").plan
    log(tmp_path, ValidationRecord(0, 0, 10.9), name="next", first=0)
    status.write(
        tmp_path / "checkpoints", Plan(**plan.__dict__ | {"run_name": "next"}), "running", 0
    )
    view.update()
    text = shown(view)
    assert text.startswith("next  ")
    assert "step 0 of 1,000  0.0 %" in text
    assert "val loss  10.9000" in text


def test_a_moved_run_finds_its_log(tmp_path: Path):
    write(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert "step 300 of" in shown(view_of(tmp_path / "b"))
    assert "val loss  3.2000" in shown(view_of(tmp_path / "b"))


def test_a_log_alone(tmp_path: Path):
    write(tmp_path)
    view = RunView(None, tmp_path / "logs" / "metrics.jsonl")
    while view.update():
        pass
    text = shown(view)
    assert re.match(rf"{NAME}  last record \d+s ago", text)
    assert "step 300 of 1,000" in text


def test_control_characters_of_a_message_move_no_cursor(tmp_path: Path):
    write(tmp_path)
    log(tmp_path, EventRecord("ERROR", "\x1b[2Jbad [red]name[/]\r\nTraceback"))
    text = shown(view_of(tmp_path))
    assert "\x1b" not in text and "\r" not in text
    assert "bad [red]name[/]" in text


def test_news_are_the_new_messages_and_a_summary(tmp_path: Path):
    write(tmp_path)
    view = view_of(tmp_path)
    view.news()
    log(tmp_path, EventRecord("WARNING", "slow"))
    view.update()
    warning, summary = view.news()
    assert warning == "WARNING: slow"
    assert "step 300 of 1,000 | loss 3.1000" in summary
    (summary,) = view.news()


def test_many_gpus_are_a_range():
    usage = [
        {"memory_gb": 70.0 + rank / 10, "utilisation_percent": 90.0 + rank} for rank in range(9)
    ]
    fields = dict(watch._gpu_fields(usage))
    assert fields == {"GPU use": "90-98 %", "GPU mem": "70-71 GB"}
    assert watch._gpu_fields([{}, {}]) == []
    assert dict(watch._gpu_fields(usage[:1])) == {"GPU": "90 %  70.0 GB"}
    assert dict(watch._gpu_fields([{}, usage[0]])) == {"GPU 1": "90 %  70.0 GB"}


def test_old_warnings_stay_among_the_messages(tmp_path: Path):
    write(tmp_path)
    chosen = view_of(tmp_path).chosen_messages(4)
    assert [item.text[:6] for item in chosen] == ["step 7", "Messag", "Messag", "Messag"]
    assert [item.text for item in view_of(tmp_path).chosen_messages(1)] == ["Message 2 of step 300"]
    assert view_of(tmp_path).chosen_messages(0) == []
    assert len(view_of(tmp_path).chosen_messages(500)) == 11


def test_a_view_is_drawn_from_json_alone(tmp_path: Path):
    """Values that are no numbers end nothing."""
    write(tmp_path)
    with (tmp_path / "logs" / "metrics.jsonl").open("a") as file:
        record = {"kind": "step", "run": NAME, "time": time.time(), "step": 301, "loss": None}
        record |= {"learning_rate": 1e-3, "elapsed_s": 1.0, "tokens_per_s": 5, "grad_norm": None}
        file.write(json.dumps(record) + "\n")
    assert "loss      nan" in shown(view_of(tmp_path))
    assert watch.LEAST_CHART < watch.MOST_CHART
