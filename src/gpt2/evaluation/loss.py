"""Validation loss: the mean over fixed rows, the same for every world size."""

import torch
from torch import nn

from gpt2.data import order
from gpt2.data.order import Rows
from gpt2.data.shards import ShardSet
from gpt2.distributed import World
from gpt2.model import evaluating


@torch.no_grad()
def validation_loss(
    net: nn.Module,
    shards: ShardSet,
    rows: Rows,
    world: World,
    mini_batch_size: int,
    autocast: torch.autocast,
) -> float:
    """Mean cross entropy in nats per token over `rows`, which all ranks share between them.

    `net(tokens_BT, targets_BT)` gives the summed loss. The result is the same on every rank.
    """
    mine = order.share(len(rows), world.rank, world.size)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    with evaluating(net), autocast:
        for micro in order.micro_batches(rows[mine.start : mine.stop], mini_batch_size):
            tokens_BT, targets_BT = world.to_device(*map(torch.tensor, shards.read(micro)))
            total += net(tokens_BT, targets_BT)
    return float(world.sum(total)) / (len(rows) * shards.block_size)
