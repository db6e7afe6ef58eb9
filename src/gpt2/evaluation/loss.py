"""Validation loss: the mean over fixed rows, the same for every world size."""

import itertools
from collections.abc import Callable

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
    stop: Callable[[], int] = lambda: 0,
) -> float | None:
    """Mean cross entropy in nats per token over `rows`, which all ranks share between them.

    `net(tokens_BT, targets_BT)` gives the summed loss. The result is the same on every rank; it is
    None if `stop()` was not 0 on some rank before the end.
    """
    mine = order.share(len(rows), world.rank, world.size)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    micros = order.micro_batches(rows[mine.start : mine.stop], mini_batch_size)
    largest_share = -(-len(rows) // world.size)
    with evaluating(net), autocast:
        for _ in range(-(-largest_share // mini_batch_size)):  # as many rounds on every rank
            if world.highest(stop()):
                return None
            for micro in itertools.islice(micros, 1):
                tokens_BT, targets_BT = world.to_device(*map(torch.tensor, shards.read(micro)))
                total += net(tokens_BT, targets_BT)
    return float(world.sum(total)) / (len(rows) * shards.block_size)
