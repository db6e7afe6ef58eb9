"""The loss over fixed rows of a split, per token and per byte, the same for every world size."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Loss:
    """Cross entropy of a model on the targets of some rows."""

    nats: float
    """summed over the targets"""
    targets: int
    """number of tokens"""
    text_bytes: int
    """UTF-8 bytes of the text of the targets, in which <|endoftext|> has none"""

    @classmethod
    def of_all(cls, losses: Iterable["Loss"]) -> "Loss":
        """On the targets of all of them together."""
        parts = list(losses)
        return cls(
            sum(part.nats for part in parts),
            sum(part.targets for part in parts),
            sum(part.text_bytes for part in parts),
        )

    @property
    def per_token(self) -> float:
        """Nats per token."""
        return self.nats / self.targets

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the model needs for a byte of text; None if the targets have no text.

        Unlike nats per token, it compares models with different tokenisers. As in The Pile (Gao et
        al. 2020, section 3.1): nats / ln 2 / UTF-8 bytes. The nats of <|endoftext|>, which ends
        each document and has no bytes, count here, too.
        """
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else None


@torch.no_grad()
def validation_loss(
    net: nn.Module,
    shards: TokenDataset,
    rows: Rows,
    world: World,
    mini_batch_size: int,
    autocast: torch.autocast,
    stop: Callable[[], int] = lambda: 0,
) -> Loss | None:
    """Cross entropy over `rows`, the same on every rank.

    The ranks share the rows. `net(tokens_BT, targets_BT)` returns the summed loss. Returns None if
    `stop()` was not 0 on some rank before the end; raises MeasurementFailed on all ranks if one of
    them fails.
    """
    mine = sampler.share(len(rows), world.rank, world.size)
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    text_bytes = torch.zeros((), dtype=torch.int64)
    micros = sampler.micro_batches(rows[mine.start : mine.stop], mini_batch_size)
    largest_share = -(-len(rows) // world.size)

    def add_micro_batch(_round: int) -> None:
        for micro in itertools.islice(micros, 1):  # the ranks with smaller shares have none left
            inputs, targets = shards.read(micro)
            tokens_BT, targets_BT = world.to_device(torch.tensor(inputs), torch.tensor(targets))
            nats.add_(net(tokens_BT, targets_BT))
            text_bytes.add_(shards.text_bytes(targets))  # while a GPU computes

    with evaluating(net), autocast:
        rounds = range(-(-largest_share // mini_batch_size))
        if not in_rounds(world, rounds, add_micro_batch, stop):
            return None
    return Loss(
        nats=float(world.all_reduce_sum(nats)),
        targets=len(rows) * shards.block_size,
        text_bytes=int(world.all_reduce_sum(text_bytes.to(world.device))),
    )


@torch.no_grad()
def row_losses(
    model: LanguageModel,
    shards: TokenDataset,
    rows: Rows,
    world: World,
    autocast: torch.autocast,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[Loss]:
    """Cross entropy of each of `rows`, the same on every rank.

    `track` wraps the loop over rounds, for a progress bar.
    """
    nats = torch.zeros(len(rows), dtype=torch.float64, device=world.device)
    text_bytes = torch.zeros(len(rows), dtype=torch.int64)
    at_once = max(1, ROW_TOKENS[world.device.type] // shards.block_size)
    with evaluating(model):
        for first in track(range(0, len(rows), at_once * world.size)):
            begin = first + at_once * world.rank
            mine = rows[begin : begin + at_once]
            if len(mine):
                inputs, targets = shards.read(mine)
                tokens_BT, targets_BT = world.to_device(torch.tensor(inputs), torch.tensor(targets))
                positions_T = torch.arange(shards.block_size, device=world.device)
                with autocast:  # not for the logits
                    features_BTD = model.features(tokens_BT, positions_T, None)
                features_BTD = features_BTD.to(model.token_embedding.weight.dtype)
                for number in range(len(mine)):
                    row = slice(number, number + 1)
                    nats[begin + number] = model.loss(features_BTD[row], targets_BT[row])
                    text_bytes[begin + number] = shards.text_bytes(targets[number])
    found = world.all_reduce_sum(nats).tolist()
    lengths = world.all_reduce_sum(text_bytes.to(world.device)).tolist()
    return [
        Loss(of_row, shards.block_size, length)
        for of_row, length in zip(found, lengths, strict=True)
    ]
