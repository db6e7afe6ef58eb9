import logging
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt2.base import atomic_files
from gpt2.base.errors import CheckpointError
from gpt2.checkpoint import metadata, store
from gpt2.checkpoint.async_save import BackgroundWriter, HostCopy, Saver
from gpt2.config.run import CheckpointConfig
from gpt2.distributed import world

WORLD = world.World(0, 1, torch.device("cpu"))


def training(step: int) -> metadata.TrainingMetadata:
    return metadata.TrainingMetadata(step, 0, 0, 1.0, None, 1, "run", "0")


def test_a_copy_is_apart_from_its_original_and_reuses_its_memory():
    weight = torch.arange(6.0).reshape(2, 3)
    state = {"a": {"w": weight, "tied": weight}, "list": [weight.t(), (1, "x")], "n": 5}
    copy = HostCopy()
    first = copy.copy(state)
    weight += 1
    assert torch.equal(first["a"]["w"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(first["list"][0], torch.arange(6.0).reshape(2, 3).t())
    assert (first["list"][1], first["n"]) == ((1, "x"), 5)
    assert first["a"]["w"].data_ptr() == first["a"]["tied"].data_ptr()
    addresses = (first["a"]["w"].data_ptr(), first["list"][0].data_ptr())
    second = copy.copy(state)
    assert (second["a"]["w"].data_ptr(), second["list"][0].data_ptr()) == addresses
    assert torch.equal(second["a"]["w"], weight)


def test_tied_weights_are_stored_once(tmp_path: Path):
    weight = torch.zeros(1000)
    saver = Saver(WORLD, CheckpointConfig(checkpoint_dir=tmp_path), None, None)
    saver.save_in_background(training(1), lambda: {"a": weight, "b": weight})
    saver.wait()
    assert (tmp_path / "step_000001.pt").stat().st_size < 2 * weight.nbytes + 20_000


def test_the_next_save_waits_for_the_one_before_it(tmp_path: Path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    may_end = threading.Event()
    save = store.save

    def slow(*arguments: object, **options: object) -> Path:
        assert may_end.wait(10)
        return save(*arguments, **options)

    monkeypatch.setattr(store, "save", slow)
    saver = Saver(WORLD, CheckpointConfig(checkpoint_dir=tmp_path), None, None)
    weight = torch.full((10,), 1.0)
    saver.save_in_background(training(1), lambda: {"w": weight})
    weight.fill_(2)
    threading.Timer(0.2, may_end.set).start()
    saver.save_in_background(training(2), lambda: {"w": weight})
    assert caplog.messages == [
        "Waiting: the previous checkpoint is still being written",
        f"Saved checkpoint: {tmp_path / 'step_000001.pt'}",
    ]
    saver.wait()
    states = [store.load(tmp_path / f"step_00000{n}.pt") for n in (1, 2)]
    assert [float(state["w"][0]) for state in states] == [1.0, 2.0]


def test_a_failed_save_is_tried_again_at_the_end(tmp_path: Path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    save = store.save

    def full(*_: object, **__: object) -> Path:
        raise CheckpointError("cannot save: no space")

    saver = Saver(WORLD, CheckpointConfig(checkpoint_dir=tmp_path), None, None)
    monkeypatch.setattr(store, "save", full)
    saver.save_in_background(training(1), lambda: {})
    with pytest.raises(CheckpointError, match="no space"):
        saver.save_now(training(1), lambda: {})
    assert caplog.record_tuples == [
        (
            "gpt2.checkpoint.async_save",
            logging.WARNING,
            "training continues without this checkpoint: cannot save: no space",
        )
    ]
    caplog.clear()
    monkeypatch.setattr(store, "save", save)
    saver.save_now(training(1), lambda: {})
    assert caplog.messages == [f"Saved checkpoint: {tmp_path / 'step_000001.pt'}"]
    saver.save_now(training(1), lambda: {})  # there is one
    assert len(caplog.messages) == 1


def test_a_measurement_is_added_to_the_checkpoint_of_its_step_only(tmp_path: Path, monkeypatch):
    """Step 1 has a checkpoint of an earlier course of the run, which is not replaced."""
    save, may_end = store.save, threading.Event()
    save(tmp_path, {}, training(1), keep_last=3)

    def full(*_: object, **__: object) -> Path:
        assert may_end.wait(10)
        raise CheckpointError("cannot save: no space")

    saver = Saver(WORLD, CheckpointConfig(checkpoint_dir=tmp_path), None, None)
    monkeypatch.setattr(store, "save", full)
    saver.save_in_background(training(1), lambda: {})
    saver.add_measured(1, val_loss=3.0)  # while it is being written
    may_end.set()
    saver.wait()
    saver.add_measured(1, hellaswag=0.3)
    monkeypatch.setattr(store, "save", save)
    saver.save_now(training(2), lambda: {})
    saver.add_measured(1, val_loss=3.0)
    kept = [item.training for item in store.list_checkpoints(tmp_path)]
    assert [(item.step, item.val_loss, item.hellaswag) for item in kept] == [
        (1, None, None),
        (2, None, None),
    ]
    saver.add_measured(2, val_loss=2.0, bits_per_byte=0.75, is_evaluated=True)
    newest = store.list_checkpoints(tmp_path)[-1].training
    assert (newest.val_loss, newest.bits_per_byte, newest.is_evaluated) == (2.0, 0.75, True)
    saver.add_measured(2, val_loss=1.5, validated="web", val_rows=9)
    newest = store.list_checkpoints(tmp_path)[-1].training
    assert (newest.val_loss, newest.validated, newest.val_rows) == (1.5, "web", 9)


def test_links_that_a_kill_left_behind_are_repaired(tmp_path: Path):
    """A run that was killed after its last save, before the links, has no later save to do it."""
    settings = CheckpointConfig(checkpoint_dir=tmp_path)
    saver = Saver(WORLD, settings, None, None)
    for step, loss in ((1, 3.0), (2, 2.0)):
        saver.save_now(replace(training(step), val_loss=loss), dict)
    for name in (store.LATEST, store.BEST):
        atomic_files.point(tmp_path / name, "step_000001.pt")
    Saver(WORLD, settings, None, 2)
    links = [(tmp_path / name).readlink().name for name in (store.LATEST, store.BEST)]
    assert links == ["step_000002.pt"] * 2


def test_what_is_no_checkpoint_error_is_raised():
    writer = BackgroundWriter()
    writer.start({}, lambda state: 1 / 0)
    writer.wait()
    with pytest.raises(ZeroDivisionError):
        list(writer.outcomes())
