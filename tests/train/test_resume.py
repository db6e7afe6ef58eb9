from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch

from gpt2.base.errors import CheckpointError
from gpt2.checkpoint import measurements, store
from gpt2.checkpoint.metadata import TrainingMetadata, read_metadata
from gpt2.cli import train
from gpt2.config import lr_schedule, options
from gpt2.data import training_data
from gpt2.data.training_data import TrainingData
from gpt2.distributed import world
from gpt2.train import resume, trainer
from gpt2.train.evaluator import Validation
from gpt2.train.resume import StartingPoint
from gpt2.train.state import TrainState
from support import small_config

T = TypeVar("T")


def test_it_says_that_dropout_cannot_go_on_on_another_number_of_ranks(tmp_path: Path):
    run = small_config(tmp_path, tmp_path)
    before = StartingPoint(checkpoint={"config": run.to_dict(), "rng": [{}, {}, {}]})
    worlds = [world.World(0, size, torch.device("cpu")) for size in (3, 2)]
    data = TrainingData({})
    assert before.notes(run, worlds[0], data) == []
    assert before.notes(run, worlds[1], data) == [
        "Ranks: 3 before, 2 from here; the data is the same",
        "Dropout draws other numbers: its random streams belong to the ranks",
    ]
    without = options.overlay(run, {"dropout": 0.0})
    assert before.notes(without, worlds[1], data)[-1] == (
        "Ranks: 3 before, 2 from here; the data is the same"
    )


COSINE = {"max_steps": 100, "warmup_steps": 10, "schedule": "cosine", "learning_rate": 1.0}


@pytest.mark.parametrize(
    ("before", "changes", "step", "words"),
    [
        ({}, {}, 50, None),
        (
            {},
            {"max_steps": 200},
            100,
            ["0.1 before, 0.", " from here: its decay ended at step 100"],
        ),
        ({}, {"max_steps": 200}, 100, ["--decay_steps 100", "--schedule wsd"]),
        ({}, {"max_steps": 200, "decay_steps": 100}, 100, None),
        ({}, {"max_steps": 60}, 50, ["0.644 before, 0.186 from here"]),
        ({}, {"max_steps": 200}, 5, None),  # still in the warm-up
        ({}, {"max_steps": 50}, 50, None),  # no update follows
        ({}, {"learning_rate": 0.5}, 50, ["0.644 before, 0.314 from here"]),
        ({}, {"learning_rate": 0.5}, 5, ["0.5 before, 0.3 from here"]),
        ({}, {"weight_decay": 0.5, "mini_batch_size": 4}, 50, None),
        ({}, {"schedule": "wsd"}, 50, ["0.644 before, 1 from here"]),
        ({"schedule": "wsd"}, {"max_steps": 200}, 50, None),
        ({"schedule": "wsd"}, {"max_steps": 200}, 100, ["0.145 before, 1 from here"]),
        ({"schedule": "wsd", "cooldown": 0.01}, {"max_steps": 200}, 100, None),  # one step of it
        ({"max_steps": None, "epochs": 1}, {"epochs": 2}, 100, ["--decay_steps 100"]),
        ({"max_steps": None, "epochs": 1}, {"max_steps": 100}, 50, None),
    ],
)
def test_a_learning_rate_that_jumps_is_a_warning(tmp_path, before, changes, step, words):
    old = small_config(tmp_path, tmp_path, **COSINE | before)
    start = StartingPoint(checkpoint={"config": old.to_dict(), "rng": [{}]})
    said = start.rate_warning(options.overlay(old, changes), {"": 100 * old.rows_per_step}, step)
    assert (said is None) == (words is None)
    for text in words or ():
        assert text in said


def test_what_is_typed_after_a_finished_run_does_not_jump(tmp_path: Path):
    choices = [{}, {"decay_steps": 50}, {"decay_steps": 500}, {"schedule": "wsd"}]
    for options_ in (*choices, {"warmup_steps": 150}):
        run = small_config(tmp_path, tmp_path, **COSINE | options_)
        text = train.next_commands(run, ["--preset", "demo", "--max_steps=100"], 1, step=100)
        flags = text.partition("--preset demo ")[2].splitlines()[0].split()
        stored = StartingPoint(checkpoint={"config": run.to_dict(), "rng": [{}]})
        now = train.parse_run(train.TrainCommand, flags, stored=run.to_dict()).run
        assert (now.data.max_steps, now.checkpoint.resume) == (200, "latest")
        assert stored.rate_warning(now, {"": 10**6}, 100) is None
        assert lr_schedule.warning(now.lr_schedule(200), 200) is None


@pytest.mark.parametrize("decay_steps", [None, 50])
def test_what_is_typed_after_a_run_whose_rate_fell_to_0_learns_again(
    tmp_path: Path, decay_steps: int | None
):
    fell = {"schedule": "wsd", "min_lr_ratio": 0.0, "decay_steps": decay_steps}
    run = small_config(tmp_path, tmp_path, **COSINE | fell)
    text = train.next_commands(run, ["--preset", "demo", "--max_steps=100"], 1, step=100)
    flags = text.partition("--preset demo ")[2].splitlines()[0].split()
    now = train.parse_run(train.TrainCommand, flags, stored=run.to_dict()).run
    assert lr_schedule.lr_at(100, now.lr_schedule(200)) > 0
    stored = StartingPoint(checkpoint={"config": run.to_dict(), "rng": [{}]})
    assert "to leave it there" not in stored.rate_warning(now, {"": 10**6}, 100)


def test_all_ranks_take_the_measurements_that_rank_0_reads(tmp_path: Path):
    """An older copy of the metadata on another machine would send its ranks to another collective
    than rank 0."""
    training = TrainingMetadata(5, 0, 0, 1.0, None, 1, "run", "0")
    path = store.save(tmp_path, {}, training, keep_last=3)
    before = read_metadata(path.with_suffix(".json"))
    measurements.add(path, val_loss=3.0, bits_per_byte=1.0, is_evaluated=True)

    class Rank1(world.World):
        def run_on_rank0(self, function: Callable[[], T]) -> T:
            return before

    checkpoint = {"progress": {"step": 5}, "config": {"machine": {}}}
    rank_1 = Rank1(1, 2, torch.device("cpu"))
    assert resume.train_state(checkpoint, path, rank_1).evaluated_step is None
    rank_0 = resume.train_state(checkpoint, path)
    assert (rank_0.val_loss, rank_0.best_val_loss, rank_0.evaluated_step) == (3.0, 3.0, 5)
    assert rank_0.bits_per_byte == 1.0


def test_a_loss_on_other_validation_rows_is_not_taken_for_one_on_the_rows_from_here_on(
    tmp_path: Path,
):
    """A stop ends the validation of a step; a resume with other rows measures it, is killed, and is
    resumed without them."""

    def state(before: int, now: int, val_rows: int | None, validated: str = "") -> TrainState:
        facts = TrainingMetadata(5, 0, 0, 1.0, 3.0, 1, "run", "0")
        facts = replace(facts, validated=validated, val_rows=val_rows, is_evaluated=True)
        path = store.save(tmp_path, {}, facts, keep_last=3)
        progress = {"step": 5, "val_loss": 2.0, "validated_step": 4, "best_val_loss": 2.0}
        checkpoint = {"progress": progress, "config": {"machine": {}}}
        rows = Validation("", before), Validation("", now)
        return resume.train_state(checkpoint, path, validations=rows)

    for before, now, val_rows, losses in [
        (2, 2, 2, (3.0, 2.0)),
        (2, 2, None, (3.0, 2.0)),  # an earlier version measured on the rows of its configuration
        (2, 2, 5, (2.0, 2.0)),
        (2, 5, 5, (3.0, 3.0)),
        (2, 5, 2, (None, None)),
        (2, 5, None, (None, None)),
    ]:
        found = state(before, now, val_rows)
        assert (found.val_loss, found.best_val_loss) == losses
        assert (found.validated_step == 5) == (losses[0] == 3.0)
        assert found.evaluated_step == 5, "in mid-run, nothing is measured a second time"
    assert state(2, 2, 2, validated="web").val_loss == 2.0


def test_a_run_that_began_without_the_single_pass_goes_on_without_it(tmp_path: Path):
    for fast in (True, False):  # --fast was an option of earlier versions
        config = {"machine": {"fast": fast}}
        state = resume.train_state({"progress": {"step": 5}, "config": config}, tmp_path / "a.pt")
        assert state.plain_head is not fast
        own = {"progress": state.to_dict(), "config": {"machine": {}}}
        assert resume.train_state(own, tmp_path / "a.pt").plain_head is not fast


def test_foreign_data_of_which_no_digest_is_known_is_told_apart_by_its_ends(
    data_root: Path, tmp_path: Path
):
    """A run may be killed before its shards were verified, and remote ones are not hashed."""
    folders = [tmp_path / name for name in ("one", "other")]
    for folder, count in zip(folders, (2000, 3000), strict=True):
        folder.mkdir()
        for split in ("train", "val"):
            np.save(folder / f"x_{split}_0.npy", np.arange(count, dtype="<u2"))
    one, other = (training_data.load({"": str(folder)}) for folder in folders)
    config = small_config(folders[0], tmp_path)
    checkpoint = {"config": config.to_dict(), "data_fingerprint": one.fingerprints()}
    start = StartingPoint(path=tmp_path / "step_000001.pt", checkpoint=checkpoint)
    start.require_agreement(config, one)
    assert start.completed(one) == one
    with pytest.raises(CheckpointError, match="1 of 1 shard differ in content"):
        start.require_agreement(config, other)


def test_weights_of_another_shape_name_the_flags_that_fit(data_root: Path, tmp_path: Path):
    first = small_config(data_root, tmp_path / "first", max_steps=1, eval_interval=None)
    trainer.run(first)
    path = tmp_path / "first/checkpoints/step_000001.json"
    other = small_config(data_root, tmp_path / "other", n_layer=1, init_from=str(path))
    with pytest.raises(CheckpointError, match="do not fit this model") as caught:
        resume.load_weights(other)
    assert str(caught.value).endswith("; add --n_layer 2")


def test_the_decay_is_blamed_for_a_jump_only_if_it_is_the_cause(tmp_path: Path):
    run = small_config(tmp_path, tmp_path, max_steps=20)
    start = StartingPoint(checkpoint={"config": run.to_dict()})
    longer = small_config(tmp_path, tmp_path, max_steps=40)
    assert "use --decay_steps 20" in start.rate_warning(longer, {"": 1000}, 15)
    slower = small_config(tmp_path, tmp_path, max_steps=40, learning_rate=1e-4)
    assert "--decay_steps" not in start.rate_warning(slower, {"": 1000}, 15)
