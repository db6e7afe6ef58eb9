import itertools
import math
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt2.base import log
from gpt2.base.errors import DataError
from gpt2.base.text import console
from gpt2.checkpoint import store
from gpt2.checkpoint.metadata import TrainingMetadata
from gpt2.data import training_data
from gpt2.data.remote import Storage
from gpt2.data.sampler import Rows
from gpt2.data.shards import TokenDataset, load_index
from gpt2.data.training_data import TrainingData
from gpt2.data.vocabulary import Characters
from gpt2.distributed import device
from gpt2.distributed.world import World
from gpt2.evaluation import choices, hellaswag
from gpt2.inference import generate
from gpt2.inspection import checkpoints, run_status
from gpt2.model.gpt2 import GPT2
from gpt2.train import trainer
from gpt2.train.evaluator import EvaluationStopped, Evaluator
from gpt2.train.replica import Replica
from gpt2.train.report import Answer
from gpt2.train.state import RunResult
from support import loss_lines, small_config, write_tasks

LINE = r"step (\d+) \| epoch 0 \| hellaswag: (0\.\d{4}) acc_norm \| (0\.\d{4}) acc \| 5 tasks"


@pytest.fixture(autouse=True)
def logged_as_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Messages on standard output, warnings on standard error."""
    log.setup(info_stream="stdout")


def test_hellaswag_in_training(gpt2_tokens: Path, tmp_path: Path, capsys):
    flags = {"hellaswag_interval": 8, "hellaswag_limit": 5, "use_tensorboard": True}
    tasks = write_tasks(tmp_path / "tasks.jsonl")
    reported = []

    def report(**metrics: float) -> Answer:
        reported.append(metrics)
        return "go"

    result = trainer.run(small_config(gpt2_tokens, tmp_path, **flags, hellaswag_path=tasks), report)
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
    assert [point.step for point in board.Scalars("main/hellaswag")] == [8, 16, 20]
    line = board.Scalars("reference/hellaswag_gpt2_124m")
    assert [point.value for point in line] == pytest.approx([0.2955] * 3)
    assert "reference/loss_gpt2_124m" not in board.Tags()["scalars"]  # this is no FineWeb


@pytest.mark.parametrize("architecture", ["gpt2", "modern", "mlp"])
def test_samples_are_generated_in_the_type_of_the_training(
    architecture: str, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    world, seen = World(0, 1, torch.device("cpu")), set[torch.dtype]()
    options = {"sample_interval": 1, "dtype": "bfloat16", "architecture": architecture}
    run = small_config(data_root, tmp_path, **options)
    linear = torch.nn.functional.linear

    def noted(*given: torch.Tensor) -> torch.Tensor:
        seen.add((result := linear(*given)).dtype)
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    replica = Replica(run, world)
    evaluator = Evaluator(run, world, replica, training_data.load({"": str(data_root)}))
    texts = evaluator.samples(1, is_last=False)
    assert len(texts) == 3 and all(text.startswith("def") for text in texts)
    assert seen == {torch.bfloat16}
    assert evaluator.failed_step is None


class FirstOfTwo(World):
    """Rank 0, whose other rank agrees with it and measures nothing."""

    def all_reduce_max(self, value: int) -> int:
        return value

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def run_on_rank0(self, function: Callable[[], Any]) -> Any:
        return function()


@pytest.fixture
def beside(gpt2_tokens: Path, tmp_path: Path) -> Evaluator:
    """Of rank 0 of two, with HellaSwag and samples due at every step."""
    tasks = write_tasks(tmp_path / "tasks.jsonl", count=40)
    options = {"sample_interval": 1, "hellaswag_interval": 1, "hellaswag_path": tasks}
    run = small_config(gpt2_tokens, tmp_path, **options)
    world = FirstOfTwo(0, 2, torch.device("cpu"))
    replica = Replica(run, World(0, 1, world.device))
    return Evaluator(run, world, replica, training_data.load({"": str(gpt2_tokens)}))


def test_rank_0_samples_while_other_ranks_compute_hellaswag(
    beside: Evaluator, monkeypatch: pytest.MonkeyPatch
):
    """The texts are the same as without; the model is in its mode again, with dropout."""
    net = beside._replica.model
    expected = beside.samples(3, is_last=False)
    drawn = torch.get_rng_state()
    monkeypatch.setitem(choices.BATCH_TOKENS, "cpu", 1)  # 20 rounds
    assert beside.hellaswag(3, lambda: 0, is_last=False) is not None
    assert net.training
    monkeypatch.setattr(type(net), "features", Mock(side_effect=AssertionError("already sampled")))
    assert beside.samples(3, is_last=False) == expected
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_stop_within_hellaswag_ends_the_sampling_beside_it(
    beside: Evaluator, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(choices.BATCH_TOKENS, "cpu", 1)
    stops = iter([0, 0, 15])
    with pytest.raises(EvaluationStopped):
        beside.hellaswag(3, lambda: next(stops), is_last=False)
    assert beside._replica.model.training
    assert len(beside.samples(3, is_last=False)) == 3


def test_sampling_that_fails_costs_no_hellaswag(
    beside: Evaluator, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(generate, "pick", Mock(side_effect=RuntimeError("no more memory")))
    for step in (1, 2, 3, 4):
        assert beside.hellaswag(step, lambda: 0, is_last=False) is not None
        assert beside.samples(step, is_last=False) == []
        assert beside.failed_step == step
        assert beside._replica.model.training
    assert beside.switched_off == ("sampling",)
    error = capsys.readouterr().err
    assert error.count("RuntimeError: no more memory") == 3


@pytest.fixture
def fail_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], bool]], None]:
    """Makes forward passes of evaluations fail whose number, from 0 on, is chosen."""
    features = GPT2.features
    calls = itertools.count()

    def fail(is_chosen: Callable[[int], bool]) -> None:
        def failing(net: GPT2, *given: Any) -> torch.Tensor:
            if not net.training and is_chosen(next(calls)):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return features(net, *given)

        monkeypatch.setattr(GPT2, "features", failing)

    return fail


def kept_metadata(out: Path) -> list[TrainingMetadata]:
    return [item.training for item in store.list_checkpoints(out / "checkpoints")]


def test_a_measurement_that_fails_costs_no_training(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Validation fails at step 10: the run goes on, and one that resumes there makes it up."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer.run(small_config(data_root, whole, eval_rows=2))
    validations = itertools.count()
    read = TokenDataset.read

    def fails_at_step_10(data: TokenDataset, rows: Rows, *options: Any) -> object:
        if threading.current_thread() is threading.main_thread():
            torch.rand(1)  # which must not change the dropout of the training
            if next(validations) == 2:
                raise DataError("the disk is gone")
        return read(data, rows, *options)

    with monkeypatch.context() as patch:
        patch.setattr(TokenDataset, "read", fails_at_step_10)
        result = trainer.run(small_config(data_root, parts, eval_rows=2))
    assert (result.state, result.step, result.exit_code) == ("finished", 20, 0)
    error = capsys.readouterr().err
    assert "WARNING: step 10: validation failed; training continues\nTraceback" in error
    assert "DataError: the disk is gone" in error
    assert "DataError: the disk is gone" in (parts / "logs/log.txt").read_text()
    measured, lacking = kept_metadata(whole), kept_metadata(parts)
    assert [item.val_loss for item in lacking] == [None, measured[1].val_loss]
    assert [item.is_evaluated for item in lacking] == [False, True]
    logs = [loss_lines(out / "logs/log.txt") for out in (whole, parts)]
    assert [line for line in logs[0] if not line.startswith("step 10 | epoch 0 | val")] == logs[1]

    trainer.run(small_config(data_root, parts, eval_rows=2, resume="10"))
    assert [item.val_loss for item in kept_metadata(parts)] == [item.val_loss for item in measured]
    assert all(item.is_evaluated for item in kept_metadata(parts))


def test_a_measurement_that_fails_at_the_last_step_is_made_up_by_a_resume(
    data_root: Path, tmp_path: Path, fail_in_evaluation, capsys
):
    fail_in_evaluation(lambda call: 4 <= call < 5)  # of step 20
    assert trainer.run(small_config(data_root, tmp_path, eval_rows=2)).val_loss is None
    result = trainer.run(small_config(data_root, tmp_path, eval_rows=2, resume="latest"))
    assert (result.state, result.val_loss is None) == ("finished", False)
    assert "Nothing to do" not in capsys.readouterr().out
    trainer.run(small_config(data_root, tmp_path, eval_rows=2, resume="latest"))
    assert "Nothing to do: step 20 of 20 is reached" in capsys.readouterr().out


def test_what_fails_three_times_in_a_row_is_switched_off(
    data_root: Path, tmp_path: Path, fail_in_evaluation, capsys
):
    failing: list[int] = []
    fail_in_evaluation(lambda call: failing.append(call) is None)
    intervals = {"sample_interval": 2, "eval_interval": 2, "eval_rows": 2, "max_steps": 12}
    assert trainer.run(small_config(data_root, tmp_path, **intervals)).state == "finished"
    assert len(failing) == 6, "three validations and three samples, then none"
    error = capsys.readouterr().err
    for name in ("validation", "sampling"):
        assert f"WARNING: {name} is SWITCHED OFF: it failed 3 times in a row" in error
    run = run_status.newest_run(tmp_path / "checkpoints")
    assert run is not None
    assert run.status.switched_off == ("validation", "sampling")
    run_status.print_state(run, console())
    shown = capsys.readouterr().out
    assert "validation is switched off: it failed again and again" in " ".join(shown.split())


def test_a_success_between_failures_counts_from_one_again(
    data_root: Path, tmp_path: Path, fail_in_evaluation, capsys
):
    fail_in_evaluation(lambda call: call % 3 != 0)
    trainer.run(small_config(data_root, tmp_path, eval_interval=2, eval_rows=2))
    assert "SWITCHED OFF" not in capsys.readouterr().err


def test_an_error_that_leaves_the_device_unusable_ends_the_run(
    data_root: Path, tmp_path: Path, fail_in_evaluation, monkeypatch: pytest.MonkeyPatch
):
    """On CUDA, an assertion in a kernel makes every later call fail."""
    world = World(0, 1, torch.device("cpu"))
    run = small_config(data_root, tmp_path)
    evaluator = Evaluator(run, world, Replica(run, world), training_data.load({"": str(data_root)}))
    fail_in_evaluation(lambda call: True)
    monkeypatch.setattr(device, "recover", Mock(side_effect=RuntimeError("CUDA error")))
    with pytest.raises(RuntimeError, match="CUDA error"):
        evaluator.validation_losses(0, lambda: 0, is_last=False)


def test_training_goes_on_where_there_is_no_hellaswag(
    gpt2_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def nowhere(*_: object, **__: object) -> None:
        raise DataError("HellaSwag is not in data/hellaswag and cannot be loaded")

    monkeypatch.setattr(hellaswag, "load", nowhere)
    result = trainer.run(small_config(gpt2_tokens, tmp_path, hellaswag_interval=5))
    assert (result.state, result.hellaswag) == ("finished", None)
    [warning] = [line for line in capsys.readouterr().err.splitlines() if "HellaSwag" in line]
    assert warning.startswith("WARNING: training continues without HellaSwag: HellaSwag is not in")


def test_a_file_that_was_named_must_be_there(gpt2_tokens: Path, tmp_path: Path):
    settings = {"hellaswag_interval": 5, "hellaswag_path": tmp_path / "none.jsonl"}
    with pytest.raises(DataError, match=r"cannot read HellaSwag tasks from .*none\.jsonl"):
        trainer.run(small_config(gpt2_tokens, tmp_path, **settings))


@pytest.mark.parametrize(("corpus", "loss"), [("fineweb_edu", 3.2924), ("fineweb", 3.425)])
def test_the_loss_of_gpt2_is_shown_beside_its_tokens_of_fineweb_alone(
    gpt2_tokens: Path, tmp_path: Path, corpus: str, loss: float
):
    world = World(0, 1, torch.device("cpu"))
    run = small_config(gpt2_tokens, tmp_path)
    replica = Replica(run, world)
    index = load_index(Storage(str(gpt2_tokens)))

    def references(**changes: Any) -> dict[str, float]:
        data = TrainingData({"": replace(index, **changes)})
        return Evaluator(run, world, replica, data).references()

    assert references() == {}
    assert references(corpus=corpus) == {"reference/loss_gpt2_124m": loss}
    of_other_tokens = Characters(tuple(map(str, range(50257))))
    assert references(corpus=corpus, tokenizer=of_other_tokens) == {}


def test_a_stop_within_hellaswag_loses_no_validation(
    gpt2_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """What was measured before the stop is in its checkpoint, and what comes later gets there."""
    tasks = write_tasks(tmp_path / "tasks.jsonl")
    flags = {"hellaswag_interval": 10, "hellaswag_path": tasks, "eval_interval": 10}
    evaluate = hellaswag.evaluate

    def stopped(*arguments: object, stop, **options: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments, stop=stop, **options)

    config = small_config(gpt2_tokens, tmp_path, **flags, max_steps=10)
    with monkeypatch.context() as patch:
        patch.setattr(hellaswag, "evaluate", stopped)
        result = trainer.run(config)
    assert (result.state, result.step) == ("stopped", 10)
    (kept,) = store.list_checkpoints(tmp_path / "checkpoints")
    assert kept.training.val_loss == result.val_loss

    resumed = small_config(gpt2_tokens, tmp_path, **flags, max_steps=10, resume="latest")
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


def test_losses_of_other_rows_do_not_decide_which_checkpoint_is_the_best(
    data_root: Path, tmp_path: Path, capsys
):
    """The rate after the resume is far too high, so that all later losses are higher."""

    def train(steps: int, rows: int, **changes: object) -> RunResult:
        changes |= {"max_steps": steps, "eval_rows": rows, "decay_steps": 8, "resume": "latest"}
        intervals = {"checkpoint_interval": 2, "eval_interval": 2, "keep_last": 9}
        return trainer.run(small_config(data_root, tmp_path, **intervals | changes))

    train(2, 2)
    first = train(4, 2)
    assert "validation:" not in capsys.readouterr().err
    result = train(8, 5, learning_rate=10.0)
    warning = "WARNING: validation: on 2 rows before, on 5 from here"
    assert capsys.readouterr().err.count(warning) == 1
    assert "val loss does not compare" in (tmp_path / "logs/log.txt").read_text()
    assert result.best_val_loss > first.best_val_loss
    train(10, 5, learning_rate=10.0)
    assert "validation:" not in capsys.readouterr().err
    assert [item.val_rows for item in kept_metadata(tmp_path)] == [2, 2, 5, 5, 5]
    best = store.find_best(store.list_checkpoints(tmp_path / "checkpoints"))
    assert best is not None and best.training.step in (6, 8, 10)
    checkpoints.print_checkpoints(tmp_path, console())
    assert "val rows" in capsys.readouterr().out
    train(12, 2, eval_interval=None)
    assert "validation:" not in capsys.readouterr().err


def test_a_finished_run_that_is_resumed_with_other_rows_is_validated_on_them(
    data_root: Path, tmp_path: Path, capsys
):
    def train(steps: int, rows: int) -> RunResult:
        changes = {"max_steps": steps, "eval_rows": rows, "decay_steps": 8, "resume": "latest"}
        return trainer.run(small_config(data_root, tmp_path, checkpoint_interval=4, **changes))

    def measured() -> list[tuple[int, int | None]]:
        return [(item.step, item.val_rows) for item in kept_metadata(tmp_path)]

    first = train(4, 2)
    result = train(4, 5)
    assert "Nothing to do" not in capsys.readouterr().out
    assert result.val_loss not in (None, first.val_loss)
    assert (result.best_val_loss, measured()) == (result.val_loss, [(4, 5)])
    again = train(4, 5)
    assert again.val_loss == result.val_loss
    assert train(4, 2).val_loss == first.val_loss
    train(8, 5)
    assert measured() == [(4, 2), (8, 5)], "in mid-run, what is measured stays"
