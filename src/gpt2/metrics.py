"""What a run tells of itself: console, log file, TensorBoard. Silent off rank 0.

Steps are counted in finished updates: `step 250` is the 250th update, after which the validation of
step 250 is measured and `step_000250.pt` is written. A new sink is one class with the methods of
`Sink` and one line where a run makes its sinks.
"""

import functools
import re
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gpt2.config import WatchConfig
from gpt2.errors import ConfigError
from gpt2.estimate import duration

T = TypeVar("T")
RECENT_STEPS = 50  # what "recent" means for the time left
WARN_EVERY_S = 600  # of a sink that cannot write


@dataclass(frozen=True)
class StepRecord:
    """One finished update."""

    step: int
    epoch: int
    loss: float
    """mean over the global batch, nats per token"""
    learning_rate: float
    grad_norm: float
    elapsed_s: float
    tokens_per_s: float
    mfu: float
    rank_s: list[float]
    """each rank's own time until it waits for the others' gradients"""
    gpu: dict[str, float] = field(default_factory=dict)
    """memory and utilisation, where there is CUDA"""
    steps_left: int = 0
    applied: bool = True
    """whether the weights were updated: not if loss or gradient is no finite number"""


class Sink(Protocol):
    """Where records go."""

    def step(self, record: StepRecord, left_s: float | None) -> None: ...
    def validation(self, step: int, epoch: int, loss: float) -> None: ...
    def hellaswag(self, step: int, epoch: int, acc: float, acc_norm: float, tasks: int) -> None: ...
    def samples(self, step: int, texts: list[str]) -> None: ...
    def message(self, text: str) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Metrics:
    """Hands each record to every sink; without sinks (off rank 0) it does nothing.

    A sink that cannot write (a full disk, a terminal that is gone) never ends the training.
    """

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks
        self._silent_until: dict[int, float] = {}
        self._recent_s: deque[float] = deque(maxlen=RECENT_STEPS)

    def step(self, record: StepRecord) -> None:
        self._recent_s.append(record.elapsed_s)
        left_s = record.steps_left * statistics.median(self._recent_s)
        self._each(lambda sink: sink.step(record, left_s if record.steps_left else None))

    def validation(self, step: int, epoch: int, loss: float) -> None:
        self._each(lambda sink: sink.validation(step, epoch, loss))

    def hellaswag(self, step: int, epoch: int, acc: float, acc_norm: float, tasks: int) -> None:
        self._each(lambda sink: sink.hellaswag(step, epoch, acc, acc_norm, tasks))

    def samples(self, step: int, texts: list[str]) -> None:
        self._each(lambda sink: sink.samples(step, texts))

    def message(self, text: str) -> None:
        self._each(lambda sink: sink.message(text))

    def flush(self) -> None:
        """Lets all that was told reach the system, which keeps it when this process is killed."""
        self._each(lambda sink: sink.flush())

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, tell: Callable[[Sink], None]) -> None:
        for sink in self._sinks:
            try:
                tell(sink)
            except (OSError, ValueError) as error:
                now = time.monotonic()
                if now > self._silent_until.get(id(sink), 0):
                    self._silent_until[id(sink)] = now + WARN_EVERY_S
                    self.message(f"WARNING: {type(sink).__name__} cannot write: {error}")


def require_folders(watch: WatchConfig, with_runs: bool) -> None:
    """Makes the folders of the sinks; raises ConfigError, naming the flag, if one cannot be."""
    folders = {"log_dir": watch.log_dir}
    if with_runs:
        folders["runs_dir"] = watch.runs_dir
    for flag, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot make {folder}: {error.strerror}; choose another folder with --{flag} or "
                "--out_dir"
            ) from error


class Console:
    """Standard output."""

    def step(self, record: StepRecord, left_s: float | None) -> None:
        self.message(step_line(record, left_s, digits=3))

    def validation(self, step: int, epoch: int, loss: float) -> None:
        self.message(f"step {step} | epoch {epoch} | val loss: {loss:.4f}")

    def hellaswag(self, step: int, epoch: int, acc: float, acc_norm: float, tasks: int) -> None:
        self.message(hellaswag_line(step, epoch, acc, acc_norm, tasks))

    def samples(self, step: int, texts: list[str]) -> None:
        self.message(_sample_block(step, texts))

    def message(self, text: str) -> None:
        # One write per line, so that other processes' output cannot cut it in two.
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class LogFile:
    """`log.txt`: every run appended to the ones before, losses with six digits."""

    def __init__(self, path: Path, run_name: str, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._heading = f"# run {run_name} | from step {step} | {datetime.now():%Y-%m-%d %H:%M:%S}"

    def step(self, record: StepRecord, left_s: float | None) -> None:
        self.message(step_line(record, left_s, digits=6))

    def validation(self, step: int, epoch: int, loss: float) -> None:
        self.message(f"step {step} | epoch {epoch} | val loss: {loss:.6f}")

    def hellaswag(self, step: int, epoch: int, acc: float, acc_norm: float, tasks: int) -> None:
        self.message(hellaswag_line(step, epoch, acc, acc_norm, tasks))

    def samples(self, step: int, texts: list[str]) -> None:
        self.message(_sample_block(step, texts))

    def message(self, text: str) -> None:
        if self._heading:  # not when it is opened, which must succeed on a full disk
            self._file.write(self._heading + "\n")
            self._heading = ""
        self._file.write(text + "\n")

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Curves, samples and hyper-parameters of one run folder.

    After a resume, what an earlier process wrote beyond `step` is purged: the curves go on without
    an overlapping piece.
    """

    def __init__(
        self, folder: Path, hparams: dict[str, Any], step: int, references: dict[str, float]
    ) -> None:
        """`references` are constant curves, by name, to be drawn beside those that change."""
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, and optional
        from torch.utils.tensorboard.summary import hparams as hparams_summaries

        self._new_writer = functools.partial(SummaryWriter, str(folder))
        self._writer = self._new_writer(purge_step=step + 1 if step else None)
        if step == 0:
            # SummaryWriter.add_hparams would open a second run folder: write into this one.
            file_writer: Any = self._writer.file_writer
            for summary in hparams_summaries(_hparam_values(hparams), {"loss/val": 0.0}):  # type: ignore[no-untyped-call]
                file_writer.add_summary(summary)
        self._references = references
        self._writer.add_custom_scalars(_charts(references))

    def step(self, record: StepRecord, left_s: float | None) -> None:
        scalars = {
            "loss/train": record.loss,
            "train/learning_rate": record.learning_rate,
            "train/grad_norm": record.grad_norm,
            "train/epoch": record.epoch,
            "speed/tokens_per_s": record.tokens_per_s,
            "speed/step_ms": record.elapsed_s * 1000,
            "speed/mfu": record.mfu,
            **{f"speed/rank_{rank}_ms": time_s * 1000 for rank, time_s in enumerate(record.rank_s)},
            **{f"gpu/{name}": value for name, value in record.gpu.items()},
        }
        self._scalars(scalars, record.step)

    def validation(self, step: int, epoch: int, loss: float) -> None:
        self._scalars({"loss/val": loss, **self._known("loss/")}, step)

    def hellaswag(self, step: int, epoch: int, acc: float, acc_norm: float, tasks: int) -> None:
        values = {"hellaswag/acc": acc, "hellaswag/acc_norm": acc_norm}
        self._scalars(values | self._known("hellaswag/"), step)

    def samples(self, step: int, texts: list[str]) -> None:
        blocks = "\n\n".join(
            "\n".join(f"    {line}" for line in text.splitlines()) + "\n\n---" for text in texts
        )  # markdown: four spaces is verbatim
        self._tell(lambda writer: writer.add_text("samples", blocks, step))

    def message(self, text: str) -> None:
        pass

    def flush(self) -> None:
        self._tell(lambda writer: writer.flush())

    def close(self) -> None:
        self._tell(lambda writer: writer.close())

    def _known(self, group: str) -> dict[str, float]:
        return {name: value for name, value in self._references.items() if name.startswith(group)}

    def _scalars(self, values: dict[str, float], step: int) -> None:
        def add(writer: Any) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._tell(add)

    def _tell(self, write: Callable[[Any], None]) -> None:
        try:
            write(self._writer)
        except OSError:  # its thread has ended for good: another file for what comes
            self._writer = self._new_writer()
            raise


def hellaswag_line(step: int, epoch: int, acc: float, acc_norm: float, tasks: int) -> str:
    """`step 250 | epoch 0 | hellaswag: 0.2955 acc_norm | 0.2859 acc | 10042 tasks`"""
    return (
        f"step {step} | epoch {epoch} | hellaswag: {acc_norm:.4f} acc_norm | {acc:.4f} acc | "
        f"{tasks} tasks"
    )


def _charts(references: dict[str, float]) -> dict[str, Any]:
    """Charts of several curves, for TensorBoard's page of custom scalars."""
    curves = {
        "loss": ["loss/train", "loss/val"],
        "HellaSwag": ["hellaswag/acc_norm", "hellaswag/acc"],
    }
    for chart, names in curves.items():
        names += [name for name in references if name.startswith(chart.lower())]
    return {"Together": {chart: ["Multiline", names] for chart, names in curves.items()}}


def step_line(record: StepRecord, left_s: float | None, digits: int) -> str:
    """`step 19074 | epoch 1 | loss: 3.445 | lr: 6.0e-04 | norm: 0.85 | dt: 9500ms | tok/sec: …`"""
    line = (
        f"step {record.step} | epoch {record.epoch} | loss: {record.loss:.{digits}f} | "
        f"lr: {record.learning_rate:.1e} | norm: {record.grad_norm:.2f} | "
        f"dt: {record.elapsed_s * 1000:.0f}ms | tok/sec: {record.tokens_per_s:.0f}"
    )
    return line if left_s is None else f"{line} | eta: {duration(left_s)}"


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


def _sample_block(step: int, texts: list[str]) -> str:
    blocks = [
        f"step {step} | sample {number}:\n{_indented(text)}" for number, text in enumerate(texts, 1)
    ]
    return "\n".join(blocks)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def _hparam_values(config: dict[str, Any]) -> dict[str, Any]:
    """A nested config as flat values that TensorBoard takes."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _hparam_values(value)
        else:
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
