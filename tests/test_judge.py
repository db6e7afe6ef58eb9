import re
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt2 import judge, train
from gpt2.data.shards import catalog
from gpt2.data.storage import Storage
from gpt2.errors import DataError
from gpt2.evaluation import hellaswag
from support import run_command, small_config, small_flags, train_command, write_tasks

LINE = r"step (\d+) \| epoch 0 \| hellaswag: (0\.\d{4}) acc_norm \| (0\.\d{4}) acc \| 5 tasks"


def test_hellaswag_in_training(data_root: Path, tmp_path: Path, capsys):
    flags = {"hellaswag_interval": 8, "hellaswag_limit": 5, "use_tensorboard": True}
    tasks = write_tasks(tmp_path / "tasks.jsonl")
    told = []

    def report(**metrics: float) -> train.Answer:
        told.append(metrics)
        return "go"

    result = train.run(small_config(data_root, tmp_path, **flags, hellaswag_path=tasks), report)
    found = re.findall(LINE, (tmp_path / "logs/log.txt").read_text())
    assert [int(step) for step, *_ in found] == [8, 16, 20]
    assert re.findall(LINE, capsys.readouterr().out) == found
    assert [(item["step"], item["hellaswag"]) for item in told if "hellaswag" in item] == [
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


def test_hellaswag_does_not_depend_on_the_number_of_ranks(data_root: Path, tmp_path: Path):
    tasks = write_tasks(tmp_path / "tasks.jsonl")
    flags = {"hellaswag_interval": 5, "hellaswag_path": tasks, "max_steps": 5, "dropout": 0.0}
    found = []
    for ranks in (None, 2):
        out = tmp_path / str(ranks)
        run_command(train_command(small_flags(data_root, out, **flags), ranks))
        lines = (out / "logs/log.txt").read_text().splitlines()
        found.append([line for line in lines if "hellaswag:" in line])
    assert len(found[0]) == 1
    assert found[0] == found[1]


def test_training_goes_on_where_there_is_no_hellaswag(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def nowhere(*_: object, **__: object) -> None:
        raise DataError("HellaSwag is not in data/hellaswag and cannot be loaded")

    monkeypatch.setattr(hellaswag, "load", nowhere)
    result = train.run(small_config(data_root, tmp_path, hellaswag_interval=5))
    assert (result.state, result.hellaswag) == ("finished", None)
    [warning] = [line for line in capsys.readouterr().out.splitlines() if "HellaSwag" in line]
    assert warning.startswith("WARNING: training goes on without HellaSwag: HellaSwag is not in")


def test_a_file_that_was_named_must_be_there(data_root: Path, tmp_path: Path):
    settings = {"hellaswag_interval": 5, "hellaswag_path": tmp_path / "none.jsonl"}
    with pytest.raises(DataError, match=r"cannot read HellaSwag's tasks from .*none\.jsonl"):
        train.run(small_config(data_root, tmp_path, **settings))


def test_the_loss_of_gpt2_is_shown_beside_fineweb_alone(data_root: Path):
    data = catalog(Storage(str(data_root)))
    assert set(judge.references(data)) == {"hellaswag/gpt2_124m"}
    fineweb = replace(data, corpus="fineweb")
    assert judge.references(fineweb)["loss/gpt2_124m"] == 3.29
