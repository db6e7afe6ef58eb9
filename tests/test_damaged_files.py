"""Whatever a file holds, what reads it gives a result or a UserError: never another exception.

Each test damages a file of one kind in one place (`mutations`), again and again, and calls in this
process what reads it. MUTATIONS=2000 in the environment looks for faults for longer.
"""

import io
import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import mutations
from gpt2.base.errors import UserError
from gpt2.base.text import PlainConsole
from gpt2.checkpoint import measurements, store
from gpt2.checkpoint.metadata import TrainingMetadata
from gpt2.cli import loading
from gpt2.cli.model_source import ModelSource
from gpt2.config import options
from gpt2.config.run import RunConfig
from gpt2.inspection import checkpoints
from gpt2.train import trainer
from gpt2.train.saved_run import SavedRun
from support import small_config


def check(path: Path, mutate: mutations.Mutate, read: Callable[[], object]) -> None:
    """Calls `read` for one damaged version of `path` after the other."""
    for content in mutations.each(mutate):
        path.write_bytes(content)
        with mutations.named(content):
            read()


def accepted(function, *arguments, **options):
    """The result of a call; None where it raises a UserError."""
    try:
        return function(*arguments, **options)
    except UserError as error:
        assert str(error)


def paper() -> PlainConsole:
    console = PlainConsole(width=100)
    console.file = io.StringIO()
    return console


def save_checkpoint(folder: Path, step: int) -> Path:
    training = TrainingMetadata(step, 0, step * 10, 2.0, 1.5, 1, "run", "0", 0.25, 0.9, True, "id")
    state = {"model": {"weight": torch.zeros(3)}}
    return store.save(folder, state, training, keep_last=10)


def test_checkpoint_metadata(tmp_path: Path):
    """Without the newest checkpoint, the one before it is used."""
    older, newest = (save_checkpoint(tmp_path, step) for step in (1, 2))
    metadata, weights = newest.with_suffix(".json"), newest.read_bytes()

    def read() -> None:
        newest.write_bytes(weights)
        checkpoints.print_checkpoints(tmp_path, paper())
        for which in ("best", "2"):
            accepted(store.find, tmp_path, which)
        accepted(store.load, newest)
        if store.list_checkpoints(tmp_path)[-1].path == newest:
            measurements.add(newest, val_loss=1.0)
        found = store.find(tmp_path, "latest", set_aside=True)
        assert found in (older, newest)
        assert newest.exists() == (found == newest)

    check(metadata, mutations.of_json(json.loads(metadata.read_text())), read)


ODD_PARTS = (None, -1, "text", [], {}, math.inf, torch.zeros(3), torch.zeros(2, 2, dtype=torch.int))
"""in place of tensors and plain values"""


def test_a_checkpoint_of_ours_with_other_content(characters: Path, tmp_path: Path):
    """It is signed, and lacks a part, or has something else in its place."""
    config = small_config(characters, tmp_path, max_steps=2, resume="latest", warmup_steps=1)
    trainer.run(config)
    (complete,) = store.list_checkpoints(tmp_path / "checkpoints")
    whole = store.load(complete.path)
    parts = {part.name for part in fields(SavedRun)}

    def configure(stored: Mapping[str, Any] | None) -> RunConfig:
        return config if stored is None else options.on_stored(config, stored)

    def mutate(rng: random.Random) -> dict[str, Any]:
        name = rng.choice(sorted(parts & whole.keys()))
        kind = rng.choice(("value", "missing"))
        is_whole = rng.random() < 0.3 or not whole[name] or isinstance(whole[name], str)
        if is_whole:
            return mutations.changed(rng, {name: whole[name]}, kind, ODD_PARTS)
        return {name: mutations.changed(rng, whole[name], kind, ODD_PARTS)}

    for content in mutations.each(mutate, mutations.EXAMPLES // 2):
        with mutations.named(content):
            state = {name: part for name, part in whole.items() if name not in content}
            store.save(complete.path.parent, state | content, complete.training, keep_last=10)
            accepted(loading.load_model, ModelSource(str(complete.path)))
            accepted(trainer.run, config, configure=configure)
