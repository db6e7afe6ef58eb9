import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2.data.loader import Loader
from gpt2.data.remote import Storage
from gpt2.data.sampler import Sampler, micro_batches
from gpt2.data.shards import TokenDataset, load_index


@pytest.fixture
def dataset(data_root: Path) -> TokenDataset:
    return TokenDataset(load_index(Storage(str(data_root))), "train", 32)


@pytest.mark.parametrize("world_size", [1, 3])
def test_batches_are_those_of_the_sampler(dataset: TokenDataset, world_size: int):
    sampler = Sampler(dataset.rows_per_shard, 8, seed=1)
    for rank in range(world_size):
        with Loader(
            dataset, sampler, range(5, 12), rank=rank, world_size=world_size, mini_batch_size=2
        ) as loader:
            for step in range(5, 12):
                micros = loader.next_step()
                rows = list(micro_batches(sampler.rows(step, rank, world_size), 2))
                assert len(micros) == len(rows)
                for (tokens_BT, targets_BT), part in zip(micros, rows, strict=True):
                    inputs, targets = dataset.read(part)
                    assert tokens_BT.dtype == targets_BT.dtype == torch.int64
                    assert np.array_equal(tokens_BT.numpy(), inputs)
                    assert np.array_equal(targets_BT.numpy(), targets)


def test_closing_early_leaves_no_thread(dataset: TokenDataset):
    before = threading.active_count()
    sampler = Sampler(dataset.rows_per_shard, 8, seed=1)
    loader = Loader(dataset, sampler, range(10**9), mini_batch_size=8)
    loader.next_step()
    loader.close()
    assert threading.active_count() == before


def test_an_error_of_the_thread_is_raised_by_next_step(dataset: TokenDataset):
    sampler = Sampler((10**6,), 8, seed=1)  # more rows than there are
    loader = Loader(dataset, sampler, range(10**5, 10**6), mini_batch_size=8)
    with loader, pytest.raises(ValueError, match="broadcast"):
        loader.next_step()
