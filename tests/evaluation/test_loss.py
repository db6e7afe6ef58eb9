from pathlib import Path

import pytest
import torch

from gpt2 import model
from gpt2.config.model import ModelConfig
from gpt2.data import sampler
from gpt2.data.remote import Storage
from gpt2.data.shards import TokenDataset, load_index
from gpt2.distributed.world import World
from gpt2.evaluation.loss import validation_loss

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


@pytest.mark.parametrize("mini_batch_size", [1, 3, 100])
def test_mean_over_the_rows_whatever_the_micro_batch(data_root: Path, mini_batch_size: int):
    torch.manual_seed(0)
    net = model.build(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=32, dropout=0.5))
    shards = TokenDataset(load_index(Storage(str(data_root))), "val", 32)
    rows = sampler.spread(shards.rows_per_shard, 10)
    autocast = torch.autocast("cpu", enabled=False)
    loss = validation_loss(net, shards, rows, ALONE, mini_batch_size, autocast)
    assert net.training
    net.eval()
    with torch.no_grad():
        tokens_BT, targets_BT = map(torch.tensor, shards.read(rows))
        logits_BTV = net.logits(tokens_BT)
        expected = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
    assert loss == pytest.approx(float(expected), rel=1e-6)
