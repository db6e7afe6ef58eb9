"""`metrics.jsonl` as a metrics sink: every record in full precision.

One JSON object per line, ASCII. Runs follow one another in the file, and so do the processes of a
run that is resumed. Each object has

    kind    run, step, validation, hellaswag, samples or event
    run     name of the run
    time    when it was written, seconds since 1970

and, by kind, the fields of the record in `gpt2.metrics.records`, under their names:

    run         step: 0, or the step of the checkpoint from which this process goes on; also preset,
                seed and tokens_per_step, and batch_ramp if there is one
    step        step, epoch, loss, learning_rate, grad_norm, elapsed_s, tokens_per_s, mfu, rank_s,
                rank_gpu, steps_left, applied, loss_scale, left_s, corpora (losses by name of
                corpus, of a mixture); also gpu, that of rank 0
    validation  step, epoch, loss, bits_per_byte, corpora (loss and bits_per_byte by name)
    hellaswag   step, epoch, acc, acc_norm, tasks
    samples     step, texts
    event       level, message: a log message of the program

NaN and infinity are null; `applied` is false for a step that left the weights as they were, and
`bits_per_byte` is null if the text of the validation rows is empty.

The file is only appended to. After a `run` object with step N, what earlier processes of that run
wrote about steps after N is undone: `log_reader` leaves it out. A power cut or a full disk can
leave a line incomplete; the next object is then written on a line of its own. Readers ignore lines
that are not JSON objects, and kinds and keys that they do not know.
"""

import errno
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from gpt2.base import regular_file
from gpt2.metrics.records import (
    EventRecord,
    HellaSwagRecord,
    Record,
    SamplesRecord,
    StepRecord,
    ValidationRecord,
)

RECORDS_NAME = "metrics.jsonl"
KINDS: dict[type[Record], str] = {
    StepRecord: "step",
    ValidationRecord: "validation",
    HellaSwagRecord: "hellaswag",
    SamplesRecord: "samples",
    EventRecord: "event",
}


class JsonLines:
    """Appends the records of one process to `metrics.jsonl`."""

    def __init__(self, path: Path, run_name: str, step: int, about: Mapping[str, object]) -> None:
        """Appends to `path` from `step` of the run on; `about` is added to the `run` object.

        Raises OSError if it cannot be opened.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = regular_file.open_to_append(path, buffering=0)
        self._run_name = run_name
        self._heading: dict[str, object] | None = {"step": step, **about}
        self._ends_within_a_line = _ends_within_a_line(path)

    def write(self, record: Record) -> None:
        if self._heading is not None:  # not written at opening, which succeeds on a full disk
            self._append("run", self._heading)
            self._heading = None
        values = asdict(record)
        if isinstance(record, StepRecord):  # earlier versions had the GPU of rank 0 alone
            values["gpu"] = record.rank_gpu[0] if record.rank_gpu else {}
        self._append(KINDS[type(record)], values)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()

    def _append(self, kind: str, values: Mapping[str, object]) -> None:
        """Writes one line with one system call, so that a kill cannot leave half of it."""
        record = {"kind": kind, "run": self._run_name, "time": time.time(), **values}
        line = json.dumps(_finite(record), allow_nan=False).encode() + b"\n"
        if self._ends_within_a_line:
            line = b"\n" + line
        written = self._file.write(line)
        self._ends_within_a_line = written < len(line)
        if self._ends_within_a_line:
            raise OSError(errno.ENOSPC, "only a part of the line could be written")


def _finite(value: object) -> object:
    """`value` with None for NaN and infinity, at any depth."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list():
            return [_finite(item) for item in value]
    return value


def _ends_within_a_line(path: Path) -> bool:
    with regular_file.open_to_read(path) as file:
        if file.seek(0, 2) == 0:
            return False
        file.seek(-1, 2)
        return file.read(1) != b"\n"
