import math
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt2.base import log
from gpt2.base.errors import DataError
from gpt2.checkpoint import store
from gpt2.data.remote import Storage
from gpt2.data.shards import load_index
from gpt2.distributed.world import World
from gpt2.evaluation import hellaswag
from gpt2.train import trainer
from gpt2.train.evaluator import Evaluator
from gpt2.train.replica import Replica
from gpt2.train.report import Answer
from support import small_config, write_tasks

LINE = r"step (\d+) \| epoch 0 \| hellaswag: (0\.\d{4}) acc_norm \| (0\.\d{4}) acc \| 5 tasks"


@pytest.fixture(autouse=True)
def logged_as_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Messages on standard output, warnings on standard error."""
    log.setup(info_stream="stdout")


def test_hellaswag_in_training(data_root: Path, tmp_path: Path, capsys):
    flags = {"hellaswag_interval": 8, "hellaswag_limit": 5, "use_tensorboard": True}
    tasks = write_tasks(tmp_path / "tasks.jsonl")
    reported = []

    def report(**metrics: float) -> Answer:
        reported.append(metrics)
        return "go"

    result = trainer.run(small_config(data_root, tmp_path, **flags, hellaswag_path=tasks), report)
    found = re.findall(LINE, (tmp_path / "logs/log.txt").read_text())
    assert [int(step) for step, *_ in found] == [8, 16, 20]
    assert re.findall(LINE, capsys.readouterr().out) == found
    assert [(item["step"], item["hellaswag"]) for item in reported if "hellaswag" in item] == [
        (int(step), pytest.approx(float(norm), abs=1e-4)) for step, norm, _ in found
    ]
    assert result.hellaswag == pytest.approx(float(found[-1][1]), abs=1e-4)
    (run,) = (tmp_path / "runs").iterdir()
    board = EventAccumulator(str(run))
    board.Reload()
    assert [point.step for point in board.Scalars("hellaswag/acc_norm")] == [8, 16, 20]
    line = board.Scalars("hellaswag/gpt2_124m")
    assert [point.value for point in line] == pytest.approx([0.2955] * 3)
    assert "loss/gpt2_124m" not in board.Tags()["scalars"]  # this is no FineWeb


def test_training_goes_on_where_there_is_no_hellaswag(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def nowhere(*_: object, **__: object) -> None:
        raise DataError("HellaSwag is not in data/hellaswag and cannot be loaded")

    monkeypatch.setattr(hellaswag, "load", nowhere)
    result = trainer.run(small_config(data_root, tmp_path, hellaswag_interval=5))
    assert (result.state, result.hellaswag) == ("finished", None)
    [warning] = [line for line in capsys.readouterr().err.splitlines() if "HellaSwag" in line]
    assert warning.startswith("WARNING: training continues without HellaSwag: HellaSwag is not in")


def test_a_file_that_was_named_must_be_there(data_root: Path, tmp_path: Path):
    settings = {"hellaswag_interval": 5, "hellaswag_path": tmp_path / "none.jsonl"}
    with pytest.raises(DataError, match=r"cannot read HellaSwag tasks from .*none\.jsonl"):
        trainer.run(small_config(data_root, tmp_path, **settings))


@pytest.mark.parametrize(("corpus", "loss"), [("fineweb_edu", 3.2924), ("fineweb", 3.425)])
def test_the_loss_of_gpt2_is_shown_beside_fineweb_alone(data_root: Path, tmp_path, corpus, loss):
    world = World(0, 1, torch.device("cpu"))
    run = small_config(data_root, tmp_path)
    replica = Replica(run, world)
    data = load_index(Storage(str(data_root)))
    assert Evaluator(run, world, replica, data).references() == {}
    fineweb = replace(data, corpus=corpus)
    assert Evaluator(run, world, replica, fineweb).references() == {"loss/gpt2_124m": loss}


def test_a_stop_within_hellaswag_loses_no_validation(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """What was measured before the stop is in its checkpoint, and what comes later gets there."""
    tasks = write_tasks(tmp_path / "tasks.jsonl")
    flags = {"hellaswag_interval": 10, "hellaswag_path": tasks, "eval_interval": 10}
    evaluate = hellaswag.evaluate

    def stopped(*arguments: object, stop, **options: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments, stop=stop, **options)

    config = small_config(data_root, tmp_path, **flags, max_steps=10)
    with monkeypatch.context() as patch:
        patch.setattr(hellaswag, "evaluate", stopped)
        result = trainer.run(config)
    assert (result.state, result.step) == ("stopped", 10)
    (kept,) = store.list_checkpoints(tmp_path / "checkpoints")
    assert kept.training.val_loss == result.val_loss

    resumed = small_config(data_root, tmp_path, **flags, max_steps=10, resume="latest")
    result = trainer.run(resumed)
    assert (result.state, result.hellaswag is None) == ("finished", False)
    assert "Nothing to do" not in capsys.readouterr().out
    log = (tmp_path / "logs/log.txt").read_text()
    assert (log.count("step 10 | epoch 0 | val loss"), log.count("hellaswag:")) == (1, 1)
    trainer.run(resumed)  # it is known now
    assert "Nothing to do: step 10 of 10 is reached" in capsys.readouterr().out
    assert (tmp_path / "logs/log.txt").read_text().count("hellaswag:") == 1


def test_a_broken_model_has_no_score(data_root: Path, tmp_path: Path):
    tasks = hellaswag.load(write_tasks(tmp_path / "tasks.jsonl"))
    broken = hellaswag.score(tasks, [[1.0, 2.0, 3.0, float("nan")]] * len(tasks))
    assert math.isnan(broken.acc) and math.isnan(broken.acc_norm)
