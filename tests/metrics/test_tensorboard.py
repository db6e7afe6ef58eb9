import errno
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer

from gpt2.base import atomic_files
from gpt2.config import presets
from gpt2.metrics.console import Console
from gpt2.metrics.records import (
    CorpusLoss,
    HellaSwagRecord,
    Metrics,
    SamplesRecord,
    ValidationRecord,
)
from gpt2.metrics.tensorboard import TensorBoard
from metrics import former_run
from metrics.example_record import RECORD


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def end_process(board: TensorBoard, folder: Path) -> None:
    """Closes the board, and gives its files the names of an earlier second: TensorBoard reads files
    in the order of their names, which within a second depends on numbers without leading zeros."""
    board.close()
    ended = len(list(folder.glob("*.ended")))
    for path in folder.glob("events.out.tfevents.[1-9]*"):
        path.rename(folder / f"events.out.tfevents.{ended + 1:010}.ended")


def hparams(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The values of a run on TensorBoard's page of hyper-parameters, and its columns in order."""
    metadata = events(folder).summary_metadata
    start, experiment = (
        HParamsPluginData.FromString(metadata[f"_hparams_/{tag}"].plugin_data.content)
        for tag in ("session_start_info", "experiment")
    )
    infos = sorted(
        experiment.experiment.hparam_infos, key=lambda info: (not info.differs, info.name)
    )  # as TensorBoard does
    values = start.session_start_info.hparams
    return {name: MessageToDict(values[name]) for name in values}, [info.name for info in infos]


KNOWN = {"reference/loss_gpt2_124m": 3.29, "reference/hellaswag_gpt2_124m": 0.2955}
GPUS = [
    {"memory_gb": 1.5, "peak_memory_gb": 2.5, "utilisation_percent": 93.0},
    {"memory_gb": 1.25, "peak_memory_gb": 2.25},
]


def test_tensorboard_holds_curves_samples_and_hyperparameters(tmp_path: Path):
    board = TensorBoard(tmp_path, presets.preset("demo").to_dict(), step=0, references=KNOWN)
    board.write(replace(RECORD, rank_gpu=GPUS))
    board.write(ValidationRecord(19074, 1, 3.25, 1.0625))
    board.write(HellaSwagRecord(19074, 1, 0.26, 0.28, 10042))
    board.write(SamplesRecord(19074, ["def f():\n    pass"]))
    board.close()
    found = events(tmp_path)
    scalars = {name: found.Scalars(name)[0].value for name in found.Tags()["scalars"]}
    assert scalars == pytest.approx(
        {
            "loss/train": 3.4451239,
            "loss/val": 3.25,
            "loss/val_bits_per_byte": 1.0625,
            "reference/loss_gpt2_124m": 3.29,
            "main/hellaswag_acc": 0.26,
            "main/hellaswag": 0.28,
            "reference/hellaswag_gpt2_124m": 0.2955,
            "main/learning_rate": 6e-4,
            "train/grad_norm": 0.851,
            "train/epoch": 1,
            "main/tokens_per_s": 55188.2,
            "speed/step_ms": 9500,
            "speed/mfu": 0.4,
            "speed/rank_0_ms": 9100,
            "speed/rank_1_ms": 9300,
            "rank_gpu/memory_gb/0": 1.5,
            "rank_gpu/memory_gb/1": 1.25,
            "rank_gpu/peak_memory_gb/0": 2.5,
            "rank_gpu/peak_memory_gb/1": 2.25,
            "rank_gpu/utilisation_percent/0": 93.0,
        },
        rel=1e-6,
    )
    (sample,) = found.Tensors("samples/text_summary")
    assert b"    def f():\n        pass" in sample.tensor_proto.string_val[0]
    (layout,) = found.Tensors("custom_scalars__config__")
    for curve in (b"reference/hellaswag_gpt2_124m$", rb"rank_gpu/utilisation_percent/\d+$"):
        assert curve in layout.tensor_proto.string_val[0]
    groups = sorted({name.partition("/")[0] for name in scalars})
    unfolded = {name for name in scalars if name.partition("/")[0] in groups[:2]}
    assert unfolded == {
        "loss/train",
        "loss/val",
        "loss/val_bits_per_byte",
        "main/hellaswag_acc",
        "main/hellaswag",
        "main/learning_rate",
        "main/tokens_per_s",
    }


def test_a_mixture_has_curves_of_each_corpus(tmp_path: Path):
    board = TensorBoard(tmp_path, {}, 0, {})
    board.write(replace(RECORD, corpora={"web": 3.5}))
    losses = {"web": CorpusLoss(3.0, 1.0), "code": CorpusLoss(2.0, None)}
    board.write(ValidationRecord(19074, 1, 3.25, 1.0625, losses))
    board.close()
    found = events(tmp_path)
    names = [name for name in found.Tags()["scalars"] if name.count("/") == 2]
    assert {name: found.Scalars(name)[0].value for name in names} == {
        "loss/train/web": 3.5,
        "loss/val/web": 3.0,
        "loss/val_bits_per_byte/web": 1.0,
        "loss/val/code": 2.0,
    }


def test_what_is_not_measured_has_no_chart(tmp_path: Path):
    board = TensorBoard(tmp_path, {}, step=0, references={})
    board.write(replace(RECORD, rank_gpu=[{}], rank_s=[1.0]))
    board.close()
    (layout,) = events(tmp_path).Tensors("custom_scalars__config__")
    (layout_bytes,) = layout.tensor_proto.string_val
    assert b"loss/val$" in layout_bytes
    assert b"hellaswag" not in layout_bytes and b"gpu" not in layout_bytes


def test_the_page_of_hyper_parameters_begins_with_those_that_are_compared(tmp_path: Path):
    run = presets.preset("demo").to_dict()
    TensorBoard(tmp_path, run, step=0, references={}).close()
    values, columns = hparams(tmp_path)
    assert values.keys() == {
        name for part in run.values() if isinstance(part, dict) for name in part
    } | {"preset"}
    assert values["shuffle"] == "shards" and values["use_wandb"] == "False"
    assert columns[:6] == [
        "architecture",
        "learning_rate",
        "n_embd",
        "n_layer",
        "total_batch_size",
        "auto_mini_batch",
    ]


@pytest.mark.parametrize("step", [0, 5])
def test_every_process_leaves_its_hyper_parameters(tmp_path: Path, step: int):
    """Also one that begins from another run's checkpoint, or resumes with other values."""
    for rate in (6e-4, 3e-4):
        board = TensorBoard(tmp_path, {"optim": {"learning_rate": rate}}, step, references={})
        board.write(replace(RECORD, step=step + 1))
        end_process(board, tmp_path)
        values, _ = hparams(tmp_path)
        assert values == {"learning_rate": rate}


def test_hyper_parameters_that_cannot_be_written_end_no_run(tmp_path: Path, caplog, monkeypatch):
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_files, "writing", full)
    board = TensorBoard(tmp_path, {}, step=0, references={})
    board.write(RECORD)
    board.close()
    assert "TensorBoard cannot write the hyper-parameters" in caplog.text
    assert len(events(tmp_path).Scalars("loss/train")) == 1


def test_a_kill_after_a_flush_loses_no_curve(tmp_path: Path):
    board = TensorBoard(tmp_path, {}, step=5, references={})
    for step in range(6, 9):
        board.write(replace(RECORD, step=step))
    board.flush()
    assert [point.step for point in events(tmp_path).Scalars("loss/train")] == [6, 7, 8]
    board.close()


def test_a_full_disk_ends_no_curve(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # of TensorBoard's own thread
    # Two files of one second are read in the order of their numbers' digits: 10 before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
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
        end_process(board, tmp_path)
    found = events(tmp_path)
    assert [event.step for event in found.Scalars("loss/train")] == list(range(1, 11))
    assert [event.value for event in found.Scalars("loss/train")] == [
        *(1 + step for step in range(1, 6)),
        *(6 + step for step in range(6, 11)),
    ]
    assert [event.step for event in found.Scalars("loss/val")] == [5, 10]


def test_a_run_of_an_earlier_version_goes_on_under_its_names(tmp_path: Path):
    former_run.write(tmp_path, last=6)
    for first in (5, 6):  # also when it is resumed once more
        board = TensorBoard(tmp_path, {"n_layer": 12}, step=first - 1, references=KNOWN)
        board.write(replace(RECORD, step=first, rank_gpu=GPUS))
        board.write(HellaSwagRecord(first, 0, 0.26, 0.28, 9))
        end_process(board, tmp_path)
    found = events(tmp_path)
    names = set(found.Tags()["scalars"])
    assert not {name for name in names if name.startswith(("main/", "reference/"))}
    for name in ("loss/train", "train/learning_rate", "speed/tokens_per_s", "gpu/memory_gb"):
        assert [point.step for point in found.Scalars(name)] == [1, 2, 3, 4, 5, 6], name
    assert found.Scalars("gpu/memory_gb")[-1].value == 1.5
    assert found.Scalars("rank_gpu/memory_gb/1")[-1].value == 1.25
    assert {"hellaswag/acc_norm", "hellaswag/gpt2_124m"} <= names
    assert hparams(tmp_path)[0] == {"n_layer": 12}


def test_what_cannot_be_read_has_no_former_names(tmp_path: Path):
    (tmp_path / "events.out.tfevents.1.torn").write_bytes(b"no record")
    board = TensorBoard(tmp_path, {}, step=4, references={})
    board.write(RECORD)
    board.close()
    assert "main/learning_rate" in events(tmp_path).Tags()["scalars"]
