"""Validation loss: the mean over fixed rows, the same for every world size."""

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from gpt2.data import sampler
from gpt2.data.sampler import Rows
from gpt2.data.shards import TokenDataset
from gpt2.distributed.world import World
from gpt2.evaluation.rounds import in_rounds
from gpt2.model import evaluating
from gpt2.model.base import LanguageModel

ROW_TOKENS = {"cpu": 8192, "cuda": 16384}
"""tokens per forward pass of `row_losses`, by device"""


@torch.no_grad()
def validation_loss(
    net: nn.Module,
    shards: TokenDataset,
    rows: Rows,
    world: World,
    mini_batch_size: int,
    autocast: torch.autocast,
    stop: Callable[[], int] = lambda: 0,
) -> float | None:
    """Mean cross entropy in nats per token over `rows`, the same on every rank.

    The ranks share the rows. `net(tokens_BT, targets_BT)` returns the summed loss. Returns None if
    `stop()` was not 0 on some rank before the end; raises MeasurementFailed on all ranks if one of
    them fails.
    """
    mine = sampler.share(len(rows), world.rank, world.size)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    micros = sampler.micro_batches(rows[mine.start : mine.stop], mini_batch_size)
    largest_share = -(-len(rows) // world.size)

    def add_micro_batch(_round: int) -> None:
        for micro in itertools.islice(micros, 1):  # the ranks with smaller shares have none left
            tokens_BT, targets_BT = world.to_device(*map(torch.tensor, shards.read(micro)))
            total.add_(net(tokens_BT, targets_BT))

    with evaluating(net), autocast:
        rounds = range(-(-largest_share // mini_batch_size))
        if not in_rounds(world, rounds, add_micro_batch, stop):
            return None
    return float(world.all_reduce_sum(total)) / (len(rows) * shards.block_size)


@torch.no_grad()
def row_losses(
    model: LanguageModel,
    shards: TokenDataset,
    rows: Rows,
    world: World,
    autocast: torch.autocast,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[float]:
    """Cross entropy of each of `rows` in nats per token, the same on every rank.

    `track` wraps the loop over rounds, for a progress bar.
    """
    losses = torch.zeros(len(rows), dtype=torch.float64, device=world.device)
    at_once = max(1, ROW_TOKENS[world.device.type] // shards.block_size)
    with evaluating(model):
        for first in track(range(0, len(rows), at_once * world.size)):
            begin = first + at_once * world.rank
            mine = rows[begin : begin + at_once]
            if len(mine):
                tokens_BT, targets_BT = world.to_device(*map(torch.tensor, shards.read(mine)))
                positions_T = torch.arange(shards.block_size, device=world.device)
                with autocast:  # not for the logits
                    features_BTD = model.features(tokens_BT, positions_T, None)
                features_BTD = features_BTD.to(model.token_embedding.weight.dtype)
                for number in range(len(mine)):
                    row = slice(number, number + 1)
                    losses[begin + number] = model.loss(features_BTD[row], targets_BT[row])
    return [float(loss) / shards.block_size for loss in world.all_reduce_sum(losses)]
