"""Shards of llm.c, modded-nanogpt and nanoGPT are read token for token."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import foreign_shards
from gpt2.data import tokenizer
from gpt2.data.manifest import Split
from gpt2.data.remote import Storage
from gpt2.data.shards import TokenDataset, load_index

BLOCK_SIZE = 8


def rows(root: Path, split: Split) -> list[list[int]]:
    """Every row of a split with its last target, as training reads it."""
    dataset = TokenDataset(load_index(Storage(str(root))), split, BLOCK_SIZE)
    places = [(shard, row) for shard, n in enumerate(dataset.rows_per_shard) for row in range(n)]
    inputs, targets = dataset.read(np.array(places))
    return np.concatenate([inputs, targets[:, -1:]], axis=1).tolist()


def cut(tokens: list[int]) -> list[list[int]]:
    """The rows of one shard: BLOCK_SIZE tokens and the next one."""
    starts = range(0, len(tokens) - BLOCK_SIZE, BLOCK_SIZE)
    return [tokens[start : start + BLOCK_SIZE + 1] for start in starts]


@pytest.mark.parametrize("name", ["edu_fineweb", "fineweb"])  # of llm.c and of modded-nanogpt
def test_llmc(tmp_path: Path, name: str):
    size = 50
    tokens = foreign_shards.llmc_fineweb(tmp_path, size, name)
    assert (tmp_path / f"{name}_val_000000.bin").stat().st_size == 1024 + 2 * size
    assert rows(tmp_path, "val") == cut(tokens[:size])
    shards = [tokens[start : start + size] for start in range(size, len(tokens), size)]
    assert len(shards) > 2
    assert rows(tmp_path, "train") == [row for shard in shards for row in cut(shard)]
    assert load_index(Storage(str(tmp_path))).tokens("train") == len(tokens) - size


def test_nanogpt(tmp_path: Path):
    splits = foreign_shards.nanogpt_openwebtext(tmp_path)
    assert rows(tmp_path, "train") == cut(splits["train"])
    assert rows(tmp_path, "val") == cut(splits["val"])
    text = tokenizer.decode([row[0] for row in rows(tmp_path, "val")])
    assert tokenizer.decode(splits["val"]).startswith(text[:1])
    assert load_index(Storage(str(tmp_path))).vocabulary is None


def test_nanogpt_characters(tmp_path: Path):
    splits = foreign_shards.nanogpt_characters(tmp_path)
    index = load_index(Storage(str(tmp_path)))
    characters = sorted(set(splits["train"] + splits["val"]))
    assert index.vocabulary == tuple(characters)
    assert index.vocab_size == len(characters)
    read = [token for row in rows(tmp_path, "train") for token in row[:-1]]
    text = index.tokenizer.decode(read)
    assert text == splits["train"][: len(text)] != ""
    assert len(splits["train"]) - len(text) <= BLOCK_SIZE
    written = len(text.encode())
    assert index.tokenizer.text_bytes(np.array(read)) == written > len(text)


def test_a_mixed_folder_has_no_vocabulary(tmp_path: Path):
    """A folder above data sets of several vocabularies."""
    foreign_shards.nanogpt_characters(tmp_path / "char")
    shutil.copytree(tmp_path / "char", tmp_path / "again" / "char")
    assert load_index(Storage(str(tmp_path))).vocab_size < 100
    foreign_shards.nanogpt_openwebtext(tmp_path / "owt")
    with pytest.raises(Exception, match=r"several vocabularies, .*char/meta\.pkl and GPT-2's"):
        load_index(Storage(str(tmp_path)))
    assert load_index(Storage(f"{tmp_path}/owt")).vocabulary is None
    assert load_index(Storage(f"{tmp_path}/[ac]*/**/*.bin")).vocab_size < 100
