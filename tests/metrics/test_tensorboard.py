import errno
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt2.config import presets
from gpt2.metrics.console import Console
from gpt2.metrics.records import HellaSwagRecord, Metrics, SamplesRecord, ValidationRecord
from gpt2.metrics.tensorboard import TensorBoard
from metrics.example_record import RECORD


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


KNOWN = {"loss/gpt2_124m": 3.29, "hellaswag/gpt2_124m": 0.2955}


def test_tensorboard_holds_curves_samples_and_hyperparameters(tmp_path: Path):
    board = TensorBoard(tmp_path, presets.preset("demo").to_dict(), step=0, references=KNOWN)
    board.write(replace(RECORD, gpu={"memory_gb": 1.5}))
    board.write(ValidationRecord(19074, 1, 3.25))
    board.write(HellaSwagRecord(19074, 1, 0.26, 0.28, 10042))
    board.write(SamplesRecord(19074, ["def f():\n    pass"]))
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
        board.write(replace(RECORD, step=step))
    board.flush()
    assert [point.step for point in events(tmp_path).Scalars("loss/train")] == [6, 7, 8]
    board.close()


def test_a_full_disk_ends_no_curve(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # of TensorBoard's own thread
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
            board.write(replace(RECORD, step=step, loss=first + step))
            if step % 5 == 0:
                board.write(ValidationRecord(step, 0, 1.0))
        board.close()
    found = events(tmp_path)
    assert [event.step for event in found.Scalars("loss/train")] == list(range(1, 11))
    assert [event.value for event in found.Scalars("loss/train")] == [
        *(1 + step for step in range(1, 6)),
        *(6 + step for step in range(6, 11)),
    ]
    assert [event.step for event in found.Scalars("loss/val")] == [5, 10]
