import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from gpt2.metrics import log_reader
from gpt2.metrics.jsonl import JsonLines
from gpt2.metrics.log_file import LogFile
from gpt2.metrics.records import (
    CorpusLoss,
    EventRecord,
    HellaSwagRecord,
    Record,
    SamplesRecord,
    Sink,
    ValidationRecord,
)
from metrics.example_record import RECORD

TEXT, RECORDS = "log.txt", "metrics.jsonl"
FILES = ((TEXT,), (RECORDS,), (TEXT, RECORDS))
"""what versions before `metrics.jsonl` left, a log without its text, what runs write now"""
Write = Callable[[str, int, Iterable[Record]], None]


def write_process(
    folder: Path, files: tuple[str, ...], name: str, first_step: int, records: Iterable[Record]
) -> None:
    """What a process of a run writes into these files."""
    sinks: list[Sink] = []
    if TEXT in files:
        sinks.append(LogFile(folder / TEXT, name, first_step))
    if RECORDS in files:
        sinks.append(JsonLines(folder / RECORDS, name, first_step, {}))
    for record in records:
        for sink in sinks:
            sink.write(record)
    for sink in sinks:
        sink.close()


def steps(first: int, last: int, loss: float = 3.0) -> list[Record]:
    return [replace(RECORD, step=step, loss=loss) for step in range(first, last + 1)]


@pytest.fixture(params=FILES, ids=" and ".join)
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Write:
    return lambda *process: write_process(tmp_path, request.param, *process)


def test_the_steps_of_the_last_process_of_a_run(write: Write, tmp_path: Path):
    for name, first, last in [("a", 0, 2), ("b", 0, 1), ("a", 1, 3)]:
        write(name, first, [*steps(first + 1, last), ValidationRecord(3, 0, 1.0)])
    path = tmp_path / TEXT
    assert [item.step for item in log_reader.read_steps(path, "a")] == [2, 3]
    assert [item.step for item in log_reader.read_steps(path, "b")] == [1]
    assert log_reader.read_steps(path, "c") == []
    assert log_reader.furthest_step(path, "a") == 3
    assert log_reader.furthest_step(path, "c") == 0


def test_a_resume_undoes_the_steps_beyond_its_first_one(write: Write, tmp_path: Path):
    """Other names are other runs; the text of samples and messages is no record."""
    for name, first, last in [("a", 0, 8), ("b", 0, 2), ("a", 5, 10)]:
        records = [replace(RECORD, step=s, loss=first + s) for s in range(first + 1, last + 1)]
        write(
            name,
            first,
            [
                *records,
                ValidationRecord(last, 0, 3.0 + first, 1.0 + first),
                SamplesRecord(last, ["# run c | from step 9 | 2026-01-01"]),
                HellaSwagRecord(last, 0, 0.2859, 0.2955, 10),
                EventRecord("INFO", f"step {last} | epoch 0 | something else"),
            ],
        )
    a, b = log_reader.read_runs(tmp_path / TEXT)
    assert (a.name, a.first_step, b.name) == ("a", 0, "b")
    losses = [(step, item.loss) for step, item in a.steps.items()]
    assert losses == [*((s, s) for s in range(1, 6)), *((s, 5 + s) for s in range(6, 11))]
    assert a.steps[10].learning_rate == 6e-4
    assert (a.val_losses, a.bits_per_byte, a.hellaswag) == ({10: 8.0}, {10: 6.0}, {10: 0.2955})
    assert (list(b.steps), b.val_losses, b.hellaswag) == ([1, 2], {2: 3.0}, {2: 0.2955})
    assert b.bits_per_byte == {2: 1.0}


def test_losses_that_are_nan_or_infinite_are_read_as_nan(write: Write, tmp_path: Path):
    for loss in (math.nan, math.inf):
        write("a", 0, [replace(RECORD, loss=loss), ValidationRecord(19074, 0, loss, loss)])
        (run,) = log_reader.read_runs(tmp_path / TEXT)
        assert math.isnan(run.steps[19074].loss)
        assert math.isnan(run.val_losses[19074])


@pytest.mark.parametrize(
    ("name", "heading", "line"),
    [
        (TEXT, "# run a | from step 0 | 2026-01-01 00:00:00", "step 5 | epoch 0 | val loss: 3.25"),
        (
            RECORDS,
            '{"kind": "run", "run": "a", "step": 0}',
            '{"kind": "validation", "run": "a", "step": 5, "epoch": 0, "loss": 3.25}',
        ),
    ],
)
def test_validations_of_versions_without_bits_per_byte(
    tmp_path: Path, name: str, heading: str, line: str
):
    """Those that a resume by this version adds have them."""
    (tmp_path / name).write_text(f"{heading}\n{line}\n")
    write_process(tmp_path, (name,), "a", 5, [ValidationRecord(6, 0, 3.0, 1.0)])
    (run,) = log_reader.read_runs(tmp_path / name)
    assert (run.val_losses, run.bits_per_byte) == ({5: 3.25, 6: 3.0}, {6: 1.0})


def test_a_torn_line_hides_no_later_one(write: Write, tmp_path: Path):
    write("a", 0, [ValidationRecord(1, 0, 3.0)])
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-5])
    write("a", 1, [ValidationRecord(1, 0, 3.25)])
    (run,) = log_reader.read_runs(tmp_path / TEXT)
    assert run.val_losses == {1: 3.25}


@pytest.mark.parametrize("files", [(RECORDS,), (TEXT, RECORDS)])
def test_the_learning_rate_has_every_digit(tmp_path: Path, files: tuple[str, ...]):
    rates = [6e-4 * (1 - step / 997) for step in range(1, 100)]
    records = [replace(RECORD, step=s, learning_rate=rate) for s, rate in enumerate(rates, 1)]
    write_process(tmp_path, files, "a", 0, records)
    for path in [tmp_path / TEXT, *(tmp_path / file for file in files)]:
        (run,) = log_reader.read_runs(path)
        assert [item.learning_rate for item in run.steps.values()] == rates


def test_the_text_log_alone_has_its_digits(tmp_path: Path):
    write_process(tmp_path, (TEXT,), "a", 0, [RECORD])
    (item,) = log_reader.read_steps(tmp_path / TEXT, "a")
    assert (item.loss, item.elapsed_s, item.tokens_per_s) == (3.445124, 9.5, 55188.0)


def test_the_losses_of_corpora_stand_behind_the_others(write: Write, tmp_path: Path):
    losses = {"web": CorpusLoss(3.0, 1.5), "code": CorpusLoss(2.0, None)}
    of_steps = [replace(step, corpora={"web": 3.5, "code": 2.5}) for step in steps(1, 2)]
    validations = (
        ValidationRecord(1, 0, 2.5, None, losses),
        ValidationRecord(2, 0, 2.5, 1.5, losses),
    )
    write("a", 0, [*of_steps, *validations])
    (run,) = log_reader.read_runs(tmp_path / TEXT)
    assert [step.loss for step in run.steps.values()] == [3.0, 3.0]
    assert (run.val_losses, run.bits_per_byte) == ({1: 2.5, 2: 2.5}, {2: 1.5})


def test_a_run_from_before_the_records_goes_on_with_them(tmp_path: Path):
    """Both files are joined: processes that wrote text alone, then those that wrote both."""
    write_process(tmp_path, (TEXT,), "old", 0, steps(1, 2))
    write_process(tmp_path, (TEXT,), "a", 0, [*steps(1, 5), ValidationRecord(5, 0, 3.5)])
    write_process(tmp_path, (TEXT,), "a", 4, steps(5, 6))
    exact = 1.0 + 1e-9
    for _ in range(2):
        write_process(
            tmp_path, (TEXT, RECORDS), "a", 4, [*steps(5, 8, exact), ValidationRecord(8, 0, exact)]
        )
    write_process(tmp_path, (TEXT, RECORDS), "new", 0, steps(1, 1))
    old, a, new = log_reader.read_runs(tmp_path / TEXT)
    assert [run.name for run in (old, a, new)] == ["old", "a", "new"]
    losses = {step: item.loss for step, item in a.steps.items()}
    assert losses == dict.fromkeys(range(1, 5), 3.0) | dict.fromkeys(range(5, 9), exact)
    assert a.val_losses == {8: exact}
    assert [item.step for item in log_reader.read_steps(tmp_path / TEXT, "a")] == [5, 6, 7, 8]
    assert log_reader.furthest_step(tmp_path / TEXT, "a") == 8


def test_what_one_file_lacks_is_read_from_the_other(tmp_path: Path):
    """As after a disk was full, or a power cut, with other lines lost in each."""
    write_process(tmp_path, (TEXT, RECORDS), "a", 0, steps(1, 6))
    for name, lost in ((TEXT, "step 2 |"), (RECORDS, '"step": 5,')):
        lines = (tmp_path / name).read_text().splitlines(keepends=True)
        (tmp_path / name).write_text("".join(line for line in lines if lost not in line))
    (run,) = log_reader.read_runs(tmp_path / TEXT)
    assert list(run.steps) == [1, 2, 3, 4, 5, 6]


def test_runs_that_write_one_file_at_the_same_time_are_told_apart(tmp_path: Path):
    sinks = [JsonLines(tmp_path / RECORDS, name, 0, {}) for name in "ab"]
    for step in (1, 2, 3):
        for place, sink in enumerate(sinks):
            sink.write(replace(RECORD, step=step, loss=float(place)))
    for sink in sinks:
        sink.close()
    a, b = log_reader.read_runs(tmp_path / RECORDS)
    assert [[item.loss for item in run.steps.values()] for run in (a, b)] == [[0.0] * 3, [1.0] * 3]


def test_lines_of_the_text_log_are_not_taken_for_those_of_another_run(tmp_path: Path):
    """Lines of `log.txt` do not name their run; `metrics.jsonl` beside it tells two runs apart."""
    runs = {
        name: (LogFile(tmp_path / TEXT, name, 0), JsonLines(tmp_path / RECORDS, name, 0, {}))
        for name in "ab"
    }
    for step in range(1, 7):
        for name, sinks in runs.items():
            if name == "a" or step <= 3:
                for sink in sinks:
                    sink.write(replace(RECORD, step=step, loss=float(ord(name))))
    for sink in runs["a"]:
        sink.write(ValidationRecord(2, 0, 3.0))
    for sink in (*runs["a"], *runs["b"]):
        sink.close()
    a, b = log_reader.read_runs(tmp_path / TEXT)
    assert [item.loss for item in a.steps.values()] == [float(ord("a"))] * 6
    assert [item.loss for item in b.steps.values()] == [float(ord("b"))] * 3
    assert (a.val_losses, b.val_losses) == ({2: 3.0}, {})


def test_records_that_an_editor_saved_are_read(tmp_path: Path):
    """Some editors put a byte order mark in front, and end lines as Windows does."""
    write_process(tmp_path, (RECORDS,), "a", 0, steps(1, 3))
    path = tmp_path / RECORDS
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    (run,) = log_reader.read_runs(path)
    assert list(run.steps) == [1, 2, 3]


@pytest.mark.parametrize(
    "foreign",
    [
        "",
        "[" * 100_000,
        '{"kind": "step", "run": "a", "step": 1e999}',
        pytest.param(
            '{"kind": "validation", "run": "a", "step": 2, "loss": 1%s}' % ("0" * 400), id="huge"
        ),
        "not JSON",
        "[1, 2]",
        "null",
        '{"kind": "step"}',
        '{"kind": "step", "run": "a", "step": 2}',
        '{"kind": "step", "run": "a", "step": "two", "loss": 1.0}',
        '{"kind": "validation", "run": "a", "step": 2, "loss": {}}',
        '{"kind": "of a later version", "run": "a", "step": 2, "loss": 1.0}',
        '{"kind": "validation", "run": "nobody", "step": 2, "loss": 1.0}',
        '{"kind": "step", "run": "a", "step": 2, "loss": 1.0, "lear',
    ],
)
def test_foreign_lines_are_ignored(tmp_path: Path, foreign: str):
    write_process(tmp_path, (RECORDS,), "a", 0, steps(1, 1))
    path = tmp_path / RECORDS
    path.write_text(path.read_text() + foreign + "\n")
    write_process(tmp_path, (RECORDS,), "a", 1, steps(3, 3))
    (run,) = log_reader.read_runs(path)
    assert list(run.steps) == [1, 3]
    assert run.val_losses == {}


def test_keys_of_a_later_version_are_ignored(tmp_path: Path):
    write_process(tmp_path, (RECORDS,), "a", 0, steps(1, 1))
    path = tmp_path / RECORDS
    lines = [json.loads(line) | {"later": 1} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = log_reader.read_runs(path)
    assert list(run.steps) == [1]


def test_a_log_of_another_name_is_read_by_itself(tmp_path: Path):
    write_process(tmp_path, (TEXT, RECORDS), "a", 0, steps(1, 1))
    text = (tmp_path / TEXT).rename(tmp_path / "of_monday.txt")
    records = (tmp_path / RECORDS).rename(tmp_path / "of_monday.jsonl")
    write_process(tmp_path, (RECORDS,), "b", 0, steps(1, 1))
    assert [run.name for run in log_reader.read_runs(text)] == ["a"]
    assert [run.name for run in log_reader.read_runs(records)] == ["a"]


def test_no_file_at_all(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        log_reader.read_runs(tmp_path / TEXT)
    assert log_reader.read_steps(tmp_path / TEXT, "a") == []
    assert log_reader.furthest_step(tmp_path / TEXT, "a") == 0
