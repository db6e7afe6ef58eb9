"""What `log.txt` holds, read back."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# A line that a power cut tore may stand before it, the text of a sample (indented) may not.
_HEADER = re.compile(r"(?! {4}).*?# run (?P<name>.+?) \| from step (?P<step>\d+) \| ")
_NUMBER = r"nan|-?inf|-?\d+\.?\d*(?:e[+-]\d+)?"
_LINE = re.compile(r"step (?P<step>\d+) \| epoch \d+ \| (?P<rest>.+)")
_UPDATE = re.compile(
    rf"loss: (?P<loss>{_NUMBER}) \| lr: (?P<rate>{_NUMBER}) .*"
    r"\| dt: (?P<ms>\d+)ms \| tok/sec: (?P<speed>\d+)"
)
_VALIDATION = re.compile(rf"val loss: (?P<loss>{_NUMBER})$")
_HELLASWAG = re.compile(rf"hellaswag: (?P<acc_norm>{_NUMBER}) acc_norm ")


@dataclass(frozen=True)
class LoggedStep:
    """What a step line of the log says."""

    step: int
    loss: float
    learning_rate: float
    elapsed_s: float
    tokens_per_s: float


@dataclass
class LoggedRun:
    """What `log.txt` holds of a run, or of one process of it; each part by step, in order."""

    name: str
    first_step: int
    """where it began: 0, or the step of the checkpoint that it continued"""
    steps: dict[int, LoggedStep] = field(default_factory=dict)
    val_losses: dict[int, float] = field(default_factory=dict)
    hellaswag: dict[int, float] = field(default_factory=dict)
    """share of right answers, lengths normalised (acc_norm)"""

    def take(self, line: str) -> None:
        """Keeps what a line says; lines of other kinds are passed over."""
        found = _LINE.match(line)
        if not found:
            return
        step, rest = int(found["step"]), found["rest"]
        if update := _UPDATE.match(rest):
            self.steps[step] = LoggedStep(
                step=step,
                loss=float(update["loss"]),
                learning_rate=float(update["rate"]),
                elapsed_s=int(update["ms"]) / 1000,
                tokens_per_s=float(update["speed"]),
            )
        elif validation := _VALIDATION.match(rest):
            self.val_losses[step] = float(validation["loss"])
        elif hellaswag := _HELLASWAG.match(rest):
            self.hellaswag[step] = float(hellaswag["acc_norm"])

    def go_on_with(self, process: "LoggedRun") -> None:
        """Adds what a later process of this run did; what lies beyond its first step is undone."""
        first = process.first_step
        self.steps = _until(self.steps, first) | process.steps
        self.val_losses = _until(self.val_losses, first) | process.val_losses
        self.hellaswag = _until(self.hellaswag, first) | process.hellaswag


def read_runs(path: Path) -> list[LoggedRun]:
    """The runs in `log.txt`, the one that began first at the beginning, each as it went in the end.

    Raises OSError if there is no such file.
    """
    runs: dict[str, LoggedRun] = {}
    for process in _read_processes(path):
        runs.setdefault(process.name, LoggedRun(process.name, process.first_step))
        runs[process.name].go_on_with(process)
    return list(runs.values())


def read_steps(path: Path, run_name: str) -> list[LoggedStep]:
    """The last process's steps of a run in `log.txt`, in order; empty if it logged none."""
    try:
        processes = [item for item in _read_processes(path) if item.name == run_name]
    except OSError:
        return []
    return list(processes[-1].steps.values()) if processes else []


def furthest_step(path: Path, run_name: str) -> int:
    """The furthest step that any process of a run has told `log.txt`; 0 if there is none."""
    try:
        processes = [item for item in _read_processes(path) if item.name == run_name]
    except OSError:
        return 0
    return max((step for item in processes for step in item.steps), default=0)


def _read_processes(path: Path) -> list[LoggedRun]:
    """What each process told of its run, in the order of the file."""
    processes: list[LoggedRun] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if header := _HEADER.match(line):
            processes.append(LoggedRun(header["name"], int(header["step"])))
        elif processes:
            processes[-1].take(line)
    return processes


def _until(values: dict[int, T], last: int) -> dict[int, T]:
    return {step: value for step, value in values.items() if step <= last}
