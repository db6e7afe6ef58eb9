import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2.base import json_fields
from gpt2.inspection.run_log import RunLog
from gpt2.metrics import log_reader
from gpt2.metrics.jsonl import JsonLines
from gpt2.metrics.log_file import LogFile
from gpt2.metrics.records import (
    EventRecord,
    HellaSwagRecord,
    Record,
    SamplesRecord,
    Sink,
    StepRecord,
    ValidationRecord,
)


def step(number: int, loss: float = 3.0, **changes: object) -> StepRecord:
    values = {"epoch": 0, "learning_rate": 1e-3, "grad_norm": 1.0, "elapsed_s": 2.0} | changes
    return StepRecord(step=number, loss=loss, tokens_per_s=16.0, mfu=0.1, rank_s=[], **values)


@contextlib.contextmanager
def opened(path: Path, name: str = "run", first: int = 0) -> Iterator[Sink]:
    """A process of a run that goes on from step `first`."""
    is_json = path.suffix == ".jsonl"
    sink = JsonLines(path, name, first, {}) if is_json else LogFile(path, name, first)
    yield sink
    sink.close()


def write(path: Path, *records: Record, name: str = "run", first: int = 0) -> None:
    with opened(path, name, first) as sink:
        for record in records:
            sink.write(record)


@pytest.fixture(params=["metrics.jsonl", "log.txt"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


def test_it_knows_what_was_logged(path: Path):
    write(
        path,
        EventRecord("INFO", "Completed Epoch 0"),
        step(1, 3.0),
        step(2, 2.0),
        step(3, math.nan, applied=False),
        ValidationRecord(1, 0, 2.5),  # as earlier versions logged it
        ValidationRecord(2, 0, 2.25, 0.75),
        HellaSwagRecord(2, 0, 0.26, 0.28, 9),
        SamplesRecord(2, ["step 9 | epoch 0 | val loss: 1.0"]),
        EventRecord("WARNING", "step 3: loss nan"),
    )
    log = RunLog(path.with_name("log.txt"), "run")
    assert not log.read()
    assert [*log.steps] == [1, 2, 3]
    assert [*log.losses][:2] == [3.0, 2.0] and math.isnan(log.losses[2])
    assert (log.val_losses, log.hellaswag) == ({1: 2.5, 2: 2.25}, {2: 0.28})
    assert log.bits_per_byte == {2: 0.75}
    assert [(item.level, item.text) for item in log.warnings] == [("WARNING", "step 3: loss nan")]
    assert "Completed Epoch 0" in [item.text for item in log.messages]
    assert (log.last["step"], log.step_s) == (3, 2.0)
    if path.suffix == ".jsonl":
        assert log.skipped == [3]
        assert log.messages[0].time is not None


def test_a_reading_takes_only_what_was_appended(path: Path, monkeypatch):
    log = RunLog(path, "run")
    parsed: list[str] = []
    read_json, read_text = json_fields.parse, log_reader.object_of_text
    monkeypatch.setattr(json_fields, "parse", lambda line: parsed.append(line) or read_json(line))
    monkeypatch.setattr(
        log_reader, "object_of_text", lambda line: parsed.append(line) or read_text(line)
    )
    with opened(path) as sink:
        for number in range(1, 4):
            sink.write(step(number))
            log.read()
            log.read()
    assert len(parsed) == 4  # the heading and three steps, each once
    assert [*log.steps] == [1, 2, 3]


def test_a_long_log_is_read_in_blocks(path: Path):
    write(path, *map(step, range(1, 101)))
    log = RunLog(path, "run")
    blocks = 1
    while log.read(at_most=1000):
        blocks += 1
    assert blocks > 5
    assert [*log.steps] == [*range(1, 101)]


def test_a_line_is_read_when_it_is_complete(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, step(1))
    text = path.read_bytes()
    log = RunLog(path, "run")
    for end in range(0, len(text) + 1, 7):
        path.write_bytes(text[:end])
        log.read()
    path.write_bytes(text)
    log.read()
    assert [*log.steps] == [1]


def test_a_resume_undoes_later_steps(path: Path):
    write(path, *(step(number, 5.0) for number in range(1, 6)), ValidationRecord(4, 0, 5.0, 2.0))
    log = RunLog(path, "run")
    log.read()
    with opened(path, first=2) as sink:
        sink.write(EventRecord("INFO", "Resuming from:"))
        log.read()
        assert [*log.steps] == [1, 2]
        assert not log.val_losses and not log.bits_per_byte
        assert log.step_s is None  # it may compile for long
        sink.write(step(3, 1.0))
        log.read()
    assert [*log.losses] == [5.0, 5.0, 1.0]


def test_another_run_in_the_same_log_is_left_out(path: Path):
    for name in ("other", "run", "other"):
        write(path, step(1, 1.0 if name == "run" else 9.0), name=name)
    log = RunLog(path, "run")
    log.read()
    assert [*log.losses] == [1.0]


def test_without_a_name_it_is_the_run_that_began_last(path: Path):
    write(path, step(1, 9.0), name="one")
    log = RunLog(path)
    log.read()
    assert (log.name, [*log.losses]) == ("one", [9.0])
    write(path, step(1, 2.0), name="two")
    log.read()
    assert (log.name, [*log.losses]) == ("two", [2.0])


def test_it_survives_what_happens_to_the_file(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    log = RunLog(path, "run")
    assert not log.read() and log.is_missing  # not there yet
    for number in (1, 2):
        write(path, step(number), first=number - 1)
    log.read()
    path.rename(tmp_path / "metrics.jsonl.1")  # rotated
    log.read()
    assert log.is_missing
    assert [*log.steps] == [1, 2]
    write(path, step(3), first=2)  # the run is resumed, in a new file
    log.read()
    assert [*log.steps] == [1, 2, 3] and not log.is_missing
    os.truncate(path, 0)  # as logrotate's copytruncate does
    log.read()
    write(path, step(4), first=3)
    log.read()
    assert [*log.steps] == [1, 2, 3, 4]
    path.unlink()
    path.mkdir()
    log.read()
    assert log.is_missing


def test_what_is_no_record_is_left_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, step(1))
    with path.open("ab") as file:
        for line in (
            b'{"kind": "step", "run": "run", "st',
            b"\xff\xfe",
            b"[1, 2]",
            b"null",
            b'{"kind": "step", "run": "run", "step": "x"}',
            b'{"kind": "step", "run": "run", "step": 2}',
            b'{"kind": "event", "run": "run"}',
            b'{"kind": "later", "run": "run", "step": 3}',
            b"[" * 100_000,
        ):
            file.write(line + b"\n")
    write(path, step(2), first=1)
    log = RunLog(path, "run")
    log.read()
    assert [*log.steps] == [1, 2]
