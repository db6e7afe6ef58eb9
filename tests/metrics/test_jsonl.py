import errno
import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gpt2.metrics.jsonl import JsonLines
from gpt2.metrics.records import (
    EventRecord,
    HellaSwagRecord,
    Record,
    SamplesRecord,
    ValidationRecord,
)
from metrics.example_record import RECORD


def write(path: Path, *records: Record, run_name: str = "run", step: int = 0) -> None:
    sink = JsonLines(path, run_name, step, {"seed": 7})
    for record in records:
        sink.write(record)
    sink.close()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines() if line]


def test_every_kind_of_record_is_a_line_with_its_fields(tmp_path: Path):
    path = tmp_path / "logs" / "metrics.jsonl"
    before = time.time()
    write(
        path,
        RECORD,
        ValidationRecord(5, 1, 3.25, 1.0625),
        HellaSwagRecord(5, 1, 0.26, 0.28, 9),
        SamplesRecord(5, ["ä\n"]),
        EventRecord("WARNING", "no space"),
        step=4,
    )
    run, step, validation, hellaswag, samples, event = found = read(path)
    assert all(before <= item.pop("time") <= time.time() for item in found)
    assert {item.pop("run") for item in found} == {"run"}
    assert run == {"kind": "run", "step": 4, "seed": 7}
    assert step == {"kind": "step", **vars(RECORD), "gpu": {}}
    assert validation == {
        "kind": "validation",
        "step": 5,
        "epoch": 1,
        "loss": 3.25,
        "bits_per_byte": 1.0625,
        "corpora": {},
    }
    assert hellaswag == {
        "kind": "hellaswag",
        "step": 5,
        "epoch": 1,
        "acc": 0.26,
        "acc_norm": 0.28,
        "tasks": 9,
    }
    assert samples == {"kind": "samples", "step": 5, "texts": ["ä\n"]}
    assert event == {"kind": "event", "level": "WARNING", "message": "no space"}


def test_the_gpu_of_rank_0_stands_where_earlier_versions_had_it_alone(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    gpus = [{"memory_gb": 1.5, "utilisation_percent": 90.0}, {"memory_gb": 2.5}]
    write(path, replace(RECORD, rank_gpu=gpus))
    step = read(path)[1]
    assert (step["rank_gpu"], step["gpu"]) == (gpus, gpus[0])


def test_numbers_keep_every_digit(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, replace(RECORD, loss=0.1 + 0.2, learning_rate=math.pi * 1e-4))
    step = read(path)[1]
    assert (step["loss"], step["learning_rate"]) == (0.1 + 0.2, math.pi * 1e-4)


def test_nan_and_infinity_are_null(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    bad = replace(RECORD, loss=math.nan, grad_norm=math.inf, rank_s=[-math.inf], applied=False)
    write(path, bad)
    step = read(path)[1]
    assert (step["loss"], step["grad_norm"], step["rank_s"]) == (None, None, [None])
    assert step["applied"] is False


def test_runs_follow_one_another_and_a_torn_line_is_completed(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, RECORD, run_name="a")
    torn = path.read_bytes()[:-20]
    path.write_bytes(torn)
    write(path, RECORD, run_name="b")
    assert path.read_bytes().startswith(torn + b"\n{")
    lines = path.read_text().splitlines()
    assert [json.loads(line)["run"] for line in (lines[0], *lines[2:])] == ["a", "b", "b"]


def test_opening_writes_nothing(tmp_path: Path):
    write(tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_after_a_full_disk_the_next_record_has_a_line_of_its_own(tmp_path: Path):
    """As a disk that takes only the first bytes of a line, then none, then all again."""

    class Disk:
        def __init__(self, room: list[int | None]) -> None:
            self.room, self.data = room, b""

        def write(self, data: bytes) -> int:
            room = self.room.pop(0)
            if room == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.data += data[:room]
            return len(data[:room])

    sink = JsonLines(tmp_path / "metrics.jsonl", "run", 0, {})
    sink.close()
    sink._file = disk = Disk([10, 0, None, None, 10, None])
    for _ in range(2):
        with pytest.raises(OSError, match=r"space|part of the line"):
            sink.write(ValidationRecord(1, 0, 3.0))
    sink.write(ValidationRecord(2, 0, 3.0))
    with pytest.raises(OSError, match="part of the line"):
        sink.write(ValidationRecord(3, 0, 3.0))
    sink.write(ValidationRecord(4, 0, 3.0))
    kept = [json.loads(line) for line in disk.data.decode().splitlines() if line.endswith("}")]
    assert [(item["kind"], item["step"]) for item in kept] == [
        ("run", 0),
        ("validation", 2),
        ("validation", 4),
    ]
