"""Validation loss: the mean over fixed rows, the same for every world size."""

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from gpt2.data import order
from gpt2.data.order import Rows
from gpt2.data.shards import ShardSet
from gpt2.distributed import World
from gpt2.model import evaluating
from gpt2.model.gpt2 import GPT2

LOGITS_AT_ONCE = 1024
"""tokens; float32 logits of 1024 take 200 MB"""


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


@torch.no_grad()
def row_losses(
    model: GPT2,
    shards: ShardSet,
    rows: Rows,
    world: World,
    autocast: torch.autocast,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[float]:
    """Cross entropy of each of `rows` in nats per token, the same on every rank.

    `track` sees the rounds go by.
    """
    losses = torch.zeros(len(rows), dtype=torch.float64, device=world.device)
    with evaluating(model), autocast:
        for first in track(range(0, len(rows), world.size)):
            for number in range(first, len(rows))[world.rank : world.rank + 1]:
                tokens_BT, targets_BT = world.to_device(
                    *map(torch.tensor, shards.read(rows[number : number + 1]))
                )
                positions_T = torch.arange(tokens_BT.size(1), device=world.device)
                features_TD = model.features(tokens_BT, positions_T, None)[0]
                for begin in range(0, shards.block_size, LOGITS_AT_ONCE):
                    part = slice(begin, begin + LOGITS_AT_ONCE)
                    logits = model.unembed(features_TD[part]).float()
                    losses[number] += F.cross_entropy(logits, targets_BT[0, part], reduction="sum")
    return [float(loss) / shards.block_size for loss in world.sum(losses)]
