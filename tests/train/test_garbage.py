import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2.train import trainer
from gpt2.train.garbage import Garbage
from support import losses, small_config

MODULES = 10_000
"""the objects of Python's modules are many more"""


@pytest.fixture(autouse=True)
def nothing_frozen() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.freeze()  # as the tests' configuration does


def test_what_exists_after_the_first_step_is_frozen_until_the_run_is_over(
    data_root: Path, tmp_path: Path
):
    counts: list[int] = []

    def report(**metrics: float) -> str:
        if "loss" in metrics:
            counts.append(gc.get_freeze_count())
        return "go"

    trainer.run(small_config(data_root, tmp_path / "one", max_steps=3), report)
    assert counts[0] == 0
    assert min(counts[1:]) > MODULES
    assert gc.get_freeze_count() == 0
    gc.freeze()  # a process that has frozen its modules itself
    trainer.run(small_config(data_root, tmp_path / "two", max_steps=3))
    assert gc.get_freeze_count() > MODULES, "and stays as it was"
    one, other = (losses(tmp_path / name / "logs/log.txt") for name in ("one", "two"))
    assert one == other


def test_what_was_garbage_by_then_is_not_kept():
    class Node:
        alive = 0

        def __init__(self) -> None:
            self.itself = self
            Node.alive += 1

        def __del__(self) -> None:
            Node.alive -= 1

    gc.disable()
    try:
        Node()
        assert Node.alive == 1
        garbage = Garbage()
        garbage.after_step()
        assert Node.alive == 0
        garbage.close()
    finally:
        gc.enable()
