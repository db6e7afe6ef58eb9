"""Reads back what runs logged: `metrics.jsonl`, and the `log.txt` beside it.

Versions before `metrics.jsonl` wrote `log.txt` alone, with fewer digits. Each process of a run is
read from both files; where both have a step, the value of `metrics.jsonl` counts.
"""

import json
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from gpt2.base import json_fields, regular_file
from gpt2.metrics.jsonl import RECORDS_NAME
from gpt2.metrics.log_file import LOG_NAME

T = TypeVar("T")

# A line that a power cut tore may stand before it, the text of a sample (indented) may not.
_HEADER = re.compile(r"(?! {4}).*?# run (?P<name>.+?) \| from step (?P<step>\d+) \| ")
_NUMBER = r"nan|-?inf|-?\d+\.?\d*(?:e[+-]\d+)?"
_LINE = re.compile(r"step (?P<step>\d+) \| epoch \d+ \| (?P<rest>.+)")
_UPDATE = re.compile(
    rf"loss: (?P<loss>{_NUMBER}) \| lr: (?P<rate>{_NUMBER}) .*"
    r"\| dt: (?P<ms>\d+)ms \| tok/sec: (?P<speed>\d+)"
)
_VALIDATION = re.compile(
    rf"val loss: (?P<loss>{_NUMBER})(?: \| bits per byte: (?P<bits_per_byte>{_NUMBER}))?"
    r"(?: \| .*)?$"  # losses of corpora
)
_HELLASWAG = re.compile(rf"hellaswag: (?P<acc_norm>{_NUMBER}) acc_norm ")


@dataclass(frozen=True)
class LoggedStep:
    """One step of a run."""

    step: int
    loss: float
    """nats per token; NaN where it was NaN or infinite"""
    learning_rate: float
    elapsed_s: float
    tokens_per_s: float


@dataclass
class LoggedRun:
    """What was logged of a run, or of one process of it; each part by step, in order."""

    name: str
    first_step: int
    """where it began: 0, or the step of the checkpoint that it continued"""
    steps: dict[int, LoggedStep] = field(default_factory=dict)
    val_losses: dict[int, float] = field(default_factory=dict)
    corpus_losses: dict[str, dict[int, float]] = field(default_factory=dict)
    """of validations, by name of corpus of a mixture; `log.txt` alone does not give them"""
    bits_per_byte: dict[int, float] = field(default_factory=dict)
    """of validations; those that earlier versions logged have none"""
    hellaswag: dict[int, float] = field(default_factory=dict)
    """share of right answers, lengths normalised (acc_norm)"""
    is_mixed: bool = False
    """whether another run wrote to the same files meanwhile: lines of `log.txt` do not name their
    run"""

    def continue_with(self, process: "LoggedRun") -> None:
        """Adds a later process of this run; steps beyond its first step are undone."""
        first = process.first_step
        self.steps = _until(self.steps, first) | process.steps
        self.val_losses = _until(self.val_losses, first) | process.val_losses
        self.corpus_losses = {
            name: _until(self.corpus_losses.get(name, {}), first)
            | process.corpus_losses.get(name, {})
            for name in self.corpus_losses | process.corpus_losses
        }
        self.bits_per_byte = _until(self.bits_per_byte, first) | process.bits_per_byte
        self.hellaswag = _until(self.hellaswag, first) | process.hellaswag

    def replace_with(self, process: "LoggedRun") -> None:
        """Takes the values of another reading of the same process, and keeps what only this has."""
        self.steps = _in_order(self.steps | process.steps)
        self.val_losses = _in_order(self.val_losses | process.val_losses)
        self.corpus_losses = process.corpus_losses or self.corpus_losses
        self.bits_per_byte = _in_order(self.bits_per_byte | process.bits_per_byte)
        self.hellaswag = _in_order(self.hellaswag | process.hellaswag)


def read_runs(path: Path) -> list[LoggedRun]:
    """The runs in a log, in the order in which they began, each without the steps that a resume
    undid.

    `path` is a `log.txt` (read with the `metrics.jsonl` beside it), or a file of either format.
    Raises OSError if there is no such file.
    """
    runs: dict[str, LoggedRun] = {}
    for process in _read_processes(path):
        runs.setdefault(process.name, LoggedRun(process.name, process.first_step))
        runs[process.name].continue_with(process)
    return list(runs.values())


def read_steps(path: Path, run_name: str) -> list[LoggedStep]:
    """The steps of a run's last process, in order; empty if it logged none or there is no file."""
    processes = _processes_of(path, run_name)
    return list(processes[-1].steps.values()) if processes else []


def furthest_step(path: Path, run_name: str) -> int:
    """The furthest step that any process of a run logged; 0 if there is none."""
    processes = _processes_of(path, run_name)
    return max((step for process in processes for step in process.steps), default=0)


def _processes_of(path: Path, run_name: str) -> list[LoggedRun]:
    try:
        return [process for process in _read_processes(path) if process.name == run_name]
    except OSError:
        return []


def _read_processes(path: Path) -> list[LoggedRun]:
    """What each process logged of its run, in the order in which they began."""
    if path.name not in (LOG_NAME, RECORDS_NAME):
        return _read_records(path) if path.suffix == ".jsonl" else _read_text(path)
    text, records = path.with_name(LOG_NAME), path.with_name(RECORDS_NAME)
    if not records.exists():
        return _read_text(text)
    return _joined(_read_text(text) if text.exists() else [], _read_records(records))


def _joined(text: list[LoggedRun], records: list[LoggedRun]) -> list[LoggedRun]:
    """The processes of both readings of a log, each once.

    Paired from the end: processes of versions that wrote `log.txt` alone came first.
    """
    joined: list[LoggedRun] = []
    left = list(text)
    for process in reversed(records):
        key = (process.name, process.first_step)
        places = [i for i, other in enumerate(left) if (other.name, other.first_step) == key]
        if places:
            joined += reversed(left[places[-1] + 1 :])
            both = left[places[-1]]
            both.replace_with(process)
            joined.append(process if process.is_mixed else both)
            left = left[: places[-1]]
        else:
            joined.append(process)
    return [*left, *reversed(joined)]


def _read_text(path: Path) -> list[LoggedRun]:
    processes: list[LoggedRun] = []
    for line in regular_file.read_bytes(path).decode(errors="replace").splitlines():
        record = object_of_text(line)
        if record["kind"] == "run":
            processes.append(LoggedRun(record["run"], record["step"]))
        elif processes and record["kind"] != "event":
            _add_record(processes[-1], record["step"], record)
    return processes


def object_of_text(line: str) -> dict[str, Any]:
    """A line of `log.txt` as `metrics.jsonl` has it, with the keys that the line holds."""
    if header := _HEADER.match(line):
        return {"kind": "run", "run": header["name"], "step": int(header["step"])}
    if found := _LINE.match(line):
        step, rest = int(found["step"]), found["rest"]
        if update := _UPDATE.match(rest):
            return {
                "kind": "step",
                "step": step,
                "loss": float(update["loss"]),
                "learning_rate": float(update["rate"]),
                "elapsed_s": int(update["ms"]) / 1000,
                "tokens_per_s": float(update["speed"]),
            }
        if validation := _VALIDATION.match(rest):
            numbers = {name: float(text) for name, text in validation.groupdict().items() if text}
            return {"kind": "validation", "step": step, **numbers}
        if hellaswag := _HELLASWAG.match(rest):
            return {"kind": "hellaswag", "step": step, "acc_norm": float(hellaswag["acc_norm"])}
    level, mark, message = line.partition(": ")
    if mark and level in logging.getLevelNamesMapping():
        return {"kind": "event", "level": level, "message": message}
    return {"kind": "event", "level": "INFO", "message": line}


def _read_records(path: Path) -> list[LoggedRun]:
    processes: list[LoggedRun] = []
    newest: dict[str, LoggedRun] = {}
    for record in _objects(path):
        try:
            name, step = str(record["run"]), int(record["step"])
            if record["kind"] == "run":
                newest[name] = LoggedRun(name, step)
                processes.append(newest[name])
            elif name in newest:
                processes[-1].is_mixed |= processes[-1].name != name
                _add_record(newest[name], step, record)
        except (KeyError, TypeError, ValueError, OverflowError):
            continue  # an event, which has no step, or an object of something else
    return processes


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects in a file of one per line; ignores lines that are none."""
    for line in regular_file.read_bytes(path).decode("utf-8-sig", "replace").splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            yield found


def _add_record(process: LoggedRun, step: int, record: dict[str, Any]) -> None:
    """Adds a step or a measurement; raises KeyError or TypeError if it lacks a value."""
    kind = record["kind"]
    if kind == "step":
        process.steps[step] = LoggedStep(
            step=step,
            loss=number(record["loss"]),
            learning_rate=number(record["learning_rate"]),
            elapsed_s=number(record["elapsed_s"]),
            tokens_per_s=number(record["tokens_per_s"]),
        )
    elif kind == "validation":
        of_corpora = losses_of_corpora(record)
        process.val_losses[step] = number(record["loss"])
        for name, loss in of_corpora.items():
            process.corpus_losses.setdefault(name, {})[step] = loss
        if (bits_per_byte := record.get("bits_per_byte")) is not None:
            process.bits_per_byte[step] = number(bits_per_byte)
    elif kind == "hellaswag":
        process.hellaswag[step] = number(record["acc_norm"])


def losses_of_corpora(record: dict[str, Any]) -> dict[str, float]:
    """Of the record of a validation, the loss of each corpus of a mixture, by name; raises KeyError
    or TypeError if one has none."""
    corpora = json_fields.require_object(record.get("corpora") or {})
    return {
        name: number(json_fields.require_object(values)["loss"]) for name, values in corpora.items()
    }


def number(value: float | None) -> float:
    """NaN in place of infinity and of None, which stands for both in `metrics.jsonl`."""
    return float(value) if value is not None and math.isfinite(value) else math.nan


def _until(values: dict[int, T], last: int) -> dict[int, T]:
    return {step: value for step, value in values.items() if step <= last}


def _in_order(values: dict[int, T]) -> dict[int, T]:
    return dict(sorted(values.items()))
