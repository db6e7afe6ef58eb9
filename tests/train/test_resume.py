from pathlib import Path

import torch

from gpt2.config import options
from gpt2.distributed import world
from gpt2.train.resume import StartingPoint
from support import small_config


def test_it_says_that_dropout_cannot_go_on_on_another_number_of_ranks(tmp_path: Path):
    run = small_config(tmp_path, tmp_path)
    before = StartingPoint(checkpoint={"config": run.to_dict(), "rng": [{}, {}, {}]})
    worlds = [world.World(0, size, torch.device("cpu")) for size in (3, 2)]
    assert before.notes(run, worlds[0]) == []
    assert before.notes(run, worlds[1]) == [
        "Ranks: 3 before, 2 from here; the data is the same",
        "Dropout draws other numbers: its random streams belong to the ranks",
    ]
    without = options.overlay(run, {"dropout": 0.0})
    assert before.notes(without, worlds[1])[-1] == (
        "Ranks: 3 before, 2 from here; the data is the same"
    )
