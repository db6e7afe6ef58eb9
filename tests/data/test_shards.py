import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gpt2.data import order
from gpt2.data.order import Order
from gpt2.data.shards import Manifest, ShardSet
from gpt2.errors import DataError


@pytest.fixture
def copy(data_root: Path, tmp_path: Path) -> Path:
    """The small corpus, to be damaged."""
    return Path(shutil.copytree(data_root, tmp_path / "small"))


def open_train(folder: Path, block_size: int = 32) -> ShardSet:
    return ShardSet(folder, Manifest.read(folder), "train", block_size)


def brute_force(folder: Path, block_size: int, shard_order: list[int]) -> list[list[int]]:
    """All rows of the training shards in this order, each block_size + 1 tokens."""
    files = sorted(folder.glob("*_train_*.npy"))
    rows = []
    for shard in shard_order:
        tokens = np.load(files[shard]).tolist()
        start = 0
        while start + block_size + 1 <= len(tokens):
            rows.append(tokens[start : start + block_size + 1])
            start += block_size
    return rows


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_two_epochs_of_tokens_are_those_of_a_brute_force_reading(data_root: Path, world_size: int):
    shards = open_train(data_root)
    line = Order(shards.rows_per_shard, rows_per_step=7, seed=3)
    expected = [
        row
        for epoch in range(3)
        for row in brute_force(data_root, 32, line.shards_of(epoch).tolist())
    ]
    steps = -(-2 * line.rows_per_epoch // line.rows_per_step)
    seen: list[list[int]] = []
    for step in range(steps):
        for rank in range(world_size):
            for micro in order.micro_batches(line.rows(step, rank, world_size), 2):
                inputs, targets = shards.read(micro)
                assert inputs.shape == targets.shape == (len(micro), 32)
                assert np.array_equal(inputs[:, 1:], targets[:, :-1])
                joined = np.concatenate([inputs, targets[:, -1:]], axis=1)
                seen += joined.tolist()
    assert len(shards.shards) > 1
    assert seen == expected[: len(seen)]
    assert len(seen) >= 2 * line.rows_per_epoch


def test_tokens_after_a_change_of_world_size_are_those_that_would_have_come(data_root: Path):
    shards = open_train(data_root)
    line = Order(shards.rows_per_shard, rows_per_step=7, seed=3)

    def tokens(step: int, world_size: int) -> list[list[int]]:
        parts = [shards.read(line.rows(step, rank, world_size))[0] for rank in range(world_size)]
        return np.concatenate(parts).tolist()

    alone = [tokens(step, 1) for step in range(9)]
    changing = [
        tokens(step, world_size) for step, world_size in enumerate((1, 1, 2, 2, 4, 3, 3, 1, 1))
    ]
    assert changing == alone


def test_fingerprint_is_that_of_the_training_tokens(data_root: Path, copy: Path):
    assert Manifest.read(data_root).fingerprint() == Manifest.read(copy).fingerprint()
    values = json.loads((copy / "manifest.json").read_text())
    values["shards"][-1]["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(values))
    assert Manifest.read(data_root).fingerprint() != Manifest.read(copy).fingerprint()


def test_missing_folder_names_the_command_that_makes_it():
    with pytest.raises(DataError, match=r"make it with: gpt2 data fineweb-edu$"):
        Manifest.read(Path("data/fineweb_edu"))
    with pytest.raises(DataError, match="gpt2 data python-stdlib --out /nowhere/python_stdlib"):
        Manifest.read(Path("/nowhere/python_stdlib"))
    with pytest.raises(DataError, match="gpt2 data NAME --out /nowhere/mine"):
        Manifest.read(Path("/nowhere/mine"))


def test_shards_without_a_manifest_are_unfinished(copy: Path):
    (copy / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"unfinished; run: gpt2 data"):
        Manifest.read(copy)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"shards": [{"file": 1}]}'])
def test_damaged_manifest(copy: Path, text: str):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json cannot be read.*--overwrite"):
        Manifest.read(copy)


def test_truncated_shard_is_named(copy: Path):
    victim = sorted(copy.glob("*_train_*.npy"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"{victim.name} is truncated or damaged.*--overwrite"):
        open_train(copy)


def test_shard_of_another_length_or_type_is_named(copy: Path):
    victim = sorted(copy.glob("*_train_*.npy"))[0]
    tokens = np.load(victim)
    np.save(victim, tokens[:-1])
    with pytest.raises(DataError, match=rf"{victim.name} holds .* the manifest says"):
        open_train(copy)
    np.save(victim, tokens.astype(np.int32))
    with pytest.raises(DataError, match=rf"{victim.name} holds .*int32"):
        open_train(copy)


def test_missing_shard_is_named(copy: Path):
    victim = sorted(copy.glob("*_train_*.npy"))[0]
    victim.unlink()
    with pytest.raises(DataError, match=rf"{victim.name} is in the manifest, but it is missing"):
        open_train(copy)


def test_context_longer_than_a_shard(data_root: Path):
    with pytest.raises(DataError, match=r"too few for one row of block_size=9000"):
        open_train(data_root, block_size=9000)
