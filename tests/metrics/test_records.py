import errno
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt2.config import presets
from gpt2.metrics import log_reader, records
from gpt2.metrics.console import Console, step_line
from gpt2.metrics.log_file import LogFile
from gpt2.metrics.records import Metrics, StepRecord
from gpt2.metrics.tensorboard import TensorBoard

RECORD = StepRecord(
    step=19074,
    epoch=1,
    loss=3.4451239,
    learning_rate=6e-4,
    grad_norm=0.851,
    elapsed_s=9.5,
    tokens_per_s=55188.2,
    mfu=0.4,
    rank_s=[9.1, 9.3],
)


def test_step_line():
    assert step_line(RECORD, None, digits=3) == (
        "step 19074 | epoch 1 | loss: 3.445 | lr: 6.0e-04 | norm: 0.85 | "
        "dt: 9500ms | tok/sec: 55188"
    )
    assert step_line(RECORD, 766800, digits=6).endswith("| tok/sec: 55188 | eta: 8d 21h")
    assert "loss: 3.445124 |" in step_line(RECORD, None, digits=6)


def test_console_and_log_file_say_the_same_with_more_digits_in_the_file(tmp_path: Path, capsys):
    path = tmp_path / "logs" / "log.txt"
    sinks = Metrics([Console(), LogFile(path, "run", 0)])
    sinks.step(replace(RECORD, steps_left=2))
    sinks.validation(19074, 1, 3.25)
    sinks.samples(19074, ["one\n\ntwo"])
    sinks.message("Completed Epoch 0")
    sinks.close()
    printed = capsys.readouterr().out
    assert "loss: 3.445 " in printed
    assert "eta: 19s" in printed
    assert "step 19074 | epoch 1 | val loss: 3.2500\n" in printed
    assert "sample 1:\n    one\n\n    two\n" in printed
    logged = path.read_text()
    assert re.match(r"# run run \| from step 0 \| \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n", logged)
    assert re.sub(r"(\d\.\d{3})\d*", r"\1", logged.partition("\n")[2]) == re.sub(
        r"(\d\.\d{3})\d*", r"\1", printed
    )


def test_log_is_appended_to_and_the_last_process_of_a_run_is_read_back(tmp_path: Path):
    path = tmp_path / "log.txt"
    for name, steps in [("a", (1, 2)), ("b", (1,)), ("a", (2, 3))]:
        log = LogFile(path, name, steps[0])
        for step in steps:
            log.step(replace(RECORD, step=step), None)
        log.validation(3, 0, 1.0)
        log.close()
    assert path.read_text().count("# run") == 3
    assert [item.step for item in log_reader.read_steps(path, "a")] == [2, 3]
    (item,) = log_reader.read_steps(path, "b")
    assert (item.loss, item.elapsed_s, item.tokens_per_s) == (3.445124, 9.5, 55188.0)
    assert log_reader.read_steps(path, "c") == log_reader.read_steps(tmp_path / "none", "a") == []


def test_runs_are_read_back_as_they_went_in_the_end(tmp_path: Path):
    """A resume replaces what lies beyond its first step; other names are other runs."""
    path = tmp_path / "log.txt"
    for name, first, last in [("a", 0, 8), ("b", 0, 2), ("a", 5, 10)]:
        log = LogFile(path, name, first)
        for step in range(first + 1, last + 1):
            log.step(replace(RECORD, step=step, loss=first + step), 60.0)
        log.validation(last, 0, 3.0 + first)
        log.samples(last, ["# run c | from step 9 | 2026-01-01"])
        log.message(f"step {last} | epoch 0 | hellaswag: 0.2955 acc_norm | 0.2859 acc | 10 tasks")
        log.message(f"step {last} | epoch 0 | something else")
        log.close()
    a, b = log_reader.read_runs(path)
    assert (a.name, a.first_step, b.name) == ("a", 0, "b")
    losses = [(step, item.loss) for step, item in a.steps.items()]
    assert losses == [*((s, s) for s in range(1, 6)), *((s, 5 + s) for s in range(6, 11))]
    assert a.steps[10].learning_rate == 6e-4
    assert (a.val_losses, a.hellaswag) == ({10: 8.0}, {10: 0.2955})
    assert (list(b.steps), b.val_losses, b.hellaswag) == ([1, 2], {2: 3.0}, {2: 0.2955})


def test_a_torn_line_hides_no_run(tmp_path: Path):
    path = tmp_path / "log.txt"
    path.write_text("# run a | from step 0 | 2026-01-01\nstep 1 | epoch 0 | val loss: 3.2")
    log = LogFile(path, "a", 1)
    log.validation(1, 0, 3.25)
    log.close()
    (run,) = log_reader.read_runs(path)
    assert run.val_losses == {1: 3.25}


def test_time_left_is_the_median_of_recent_steps(capsys):
    sinks = Metrics([Console()])
    for elapsed_s in (100.0, 2.0, 2.0):
        sinks.step(replace(RECORD, elapsed_s=elapsed_s, steps_left=10))
    assert capsys.readouterr().out.splitlines()[-1].endswith("eta: 20s")


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


KNOWN = {"loss/gpt2_124m": 3.29, "hellaswag/gpt2_124m": 0.2955}


def test_tensorboard_holds_curves_samples_and_hyperparameters(tmp_path: Path):
    board = TensorBoard(tmp_path, presets.preset("demo").to_dict(), step=0, references=KNOWN)
    board.step(replace(RECORD, gpu={"memory_gb": 1.5}), None)
    board.validation(19074, 1, 3.25)
    board.hellaswag(19074, 1, 0.26, 0.28, 10042)
    board.samples(19074, ["def f():\n    pass"])
    board.close()
    found = events(tmp_path)
    scalars = {name: found.Scalars(name)[0].value for name in found.Tags()["scalars"]}
    assert scalars == pytest.approx(
        {
            "loss/train": 3.4451239,
            "loss/val": 3.25,
            "loss/gpt2_124m": 3.29,
            "hellaswag/acc": 0.26,
            "hellaswag/acc_norm": 0.28,
            "hellaswag/gpt2_124m": 0.2955,
            "train/learning_rate": 6e-4,
            "train/grad_norm": 0.851,
            "train/epoch": 1,
            "speed/tokens_per_s": 55188.2,
            "speed/step_ms": 9500,
            "speed/mfu": 0.4,
            "speed/rank_0_ms": 9100,
            "speed/rank_1_ms": 9300,
            "gpu/memory_gb": 1.5,
        },
        rel=1e-6,
    )
    (sample,) = found.Tensors("samples/text_summary")
    assert b"    def f():\n        pass" in sample.tensor_proto.string_val[0]
    assert "_hparams_/session_start_info" in found.summary_metadata
    (layout,) = found.Tensors("custom_scalars__config__")
    assert b"hellaswag/gpt2_124m" in layout.tensor_proto.string_val[0]


def test_a_kill_after_a_flush_loses_no_curve(tmp_path: Path):
    board = TensorBoard(tmp_path, {}, step=5, references={})
    for step in range(6, 9):
        board.step(replace(RECORD, step=step), None)
    board.flush()
    assert [point.step for point in events(tmp_path).Scalars("loss/train")] == [6, 7, 8]
    board.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_no_curve(tmp_path: Path, capsys):
    board = TensorBoard(tmp_path, {}, step=5, references={})
    sinks = Metrics([Console(), board])
    sinks.step(replace(RECORD, step=6))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    board._writer.file_writer.event_writer._async_writer._worker._record_writer.write = full
    for step in (7, 8, 9):
        sinks.step(replace(RECORD, step=step))
        sinks.flush()
    assert capsys.readouterr().out.count("WARNING: TensorBoard cannot write") == 1
    sinks.close()
    assert [point.step for point in events(tmp_path).Scalars("loss/train")][-2:] == [8, 9]


def test_after_a_resume_curves_have_no_gap_and_no_double(tmp_path: Path):
    """Killed after step 8, resumed from the checkpoint of step 5."""
    for first, last in [(1, 8), (6, 10)]:
        board = TensorBoard(tmp_path, {}, step=first - 1, references={})
        for step in range(first, last + 1):
            board.step(replace(RECORD, step=step, loss=first + step), None)
            if step % 5 == 0:
                board.validation(step, 0, 1.0)
        board.close()
    found = events(tmp_path)
    assert [event.step for event in found.Scalars("loss/train")] == list(range(1, 11))
    assert [event.value for event in found.Scalars("loss/train")] == [
        *(1 + step for step in range(1, 6)),
        *(6 + step for step in range(6, 11)),
    ]
    assert [event.step for event in found.Scalars("loss/val")] == [5, 10]


class Recorder:
    """A sink that keeps its messages."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def validation(self, step: int, epoch: int, loss: float) -> None:
        self.texts.append(f"validation {step}")

    def message(self, text: str) -> None:
        self.texts.append(text)

    def close(self) -> None:
        pass


def test_a_sink_that_cannot_write_never_ends_training():
    class Full(Recorder):
        """As TensorBoard on a full disk: its messages go nowhere, and well."""

        def validation(self, step: int, epoch: int, loss: float) -> None:
            raise OSError(28, "No space left on device")

        def message(self, text: str) -> None:
            pass

    good = Recorder()
    both = records.Metrics([Full(), good])
    for step in (1, 2):
        both.validation(step, 0, 3.0)
    both.close()
    assert good.texts == [
        "WARNING: Full cannot write: [Errno 28] No space left on device",
        "validation 1",
        "validation 2",
    ]
