"""How likely a model finds each of several endings of a text, computed for many texts at once.

A text and its endings are one row: the text once, every ending behind it, at the positions that it
would have there, and with a mask that hides the endings from each other. Rows of like length go
through the model together, and logits are computed only where an ending's token is to be told.

Shapes: B rows, T time, D width, V vocabulary, S places whose logits are needed, E ending tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpt2.data import tokenizer
from gpt2.distributed.world import World
from gpt2.model import evaluating
from gpt2.model.base import LanguageModel

BATCH_TOKENS = 4096
ALIKE = 0.9
"""the shortest row of a batch is at least this share of the longest: the rest is padding"""
LOGITS_AT_ONCE = 512
"""places; float32 logits of 512 take 100 MB"""
Tokens = tuple[int, ...]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Question:
    """Token ids of a text and of its endings, none of them empty."""

    context: Tokens
    endings: tuple[Tokens, ...]


@torch.no_grad()
def ending_losses(
    model: LanguageModel,
    questions: list[Question],
    world: World,
    autocast: torch.autocast,
    batch_tokens: int = BATCH_TOKENS,
    stop: Callable[[], int] = lambda: 0,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[list[float]] | None:
    """Summed cross entropy in nats of every ending of every question, the same on every rank.

    Ids of the padded vocabulary get no probability. A text that does not fit into the model's
    context loses its beginning. The ranks share the batches, which do not depend on their number.
    None if `stop()` was not 0 on some rank before the end; `track` sees the rounds go by.
    """
    ends = np.cumsum([len(question.endings) for question in questions])
    rows = list(_rows(questions, model.config.block_size))
    batches = list(_batches(rows, batch_tokens))
    losses = torch.zeros(int(ends[-1]) if len(ends) else 0, dtype=torch.float64)
    with evaluating(model):
        for first in track(range(0, len(batches), world.size)):
            if world.all_reduce_max(stop()):
                return None
            for batch in batches[first + world.rank : first + world.rank + 1]:
                of, parts = _batch_losses(model, batch, world, autocast)
                losses.index_add_(0, torch.from_numpy(of), parts)
    flat = world.all_reduce_sum(losses.to(world.device)).tolist()
    return [
        flat[end - len(question.endings) : end]
        for question, end in zip(questions, ends, strict=True)
    ]


@dataclass(frozen=True)
class _Row:
    """One text with endings, laid out as a sequence."""

    tokens: Integers
    positions: Integers
    segments: Integers
    """0 for the text, then 1, 2, … for the tokens of each ending"""
    sources: Integers
    """where in the sequence the logits of an ending's token are, for each such token"""
    targets: Integers
    """the tokens that are to be told there"""
    endings: Integers
    """the number of the ending, among all of all questions, that they belong to"""

    def __len__(self) -> int:
        return len(self.tokens)


def _rows(questions: list[Question], block_size: int) -> Iterator[_Row]:
    number = 0
    for question in questions:
        longest = max(map(len, question.endings))
        if len(question.context) + longest - 1 <= block_size:  # the last token is only told
            yield _row(question.context, question.endings, number)
        else:
            for offset, ending in enumerate(question.endings):
                whole = (*question.context, *ending)[-block_size - 1 :]
                begin = max(1, len(whole) - len(ending))
                yield _row(whole[:begin], (whole[begin:],), number + offset)
        number += len(question.endings)


def _row(context: Tokens, endings: tuple[Tokens, ...], number: int) -> _Row:
    """A row for endings that are counted from `number`."""
    length = len(context)
    tokens, positions, segments = list(context), list(range(length)), [0] * length
    sources: list[int] = []
    for segment, ending in enumerate(endings, 1):
        begin, inner = len(tokens), len(ending) - 1
        sources += [length - 1, *range(begin, begin + inner)]
        tokens += ending[:-1]
        positions += range(length, length + inner)
        segments += [segment] * inner
    targets = [token for ending in endings for token in ending]
    owners = np.repeat(np.arange(number, number + len(endings)), [len(item) for item in endings])
    columns = (tokens, positions, segments, sources, targets, owners)
    return _Row(*(np.asarray(column, np.int64) for column in columns))


def _batches(rows: list[_Row], batch_tokens: int) -> Iterator[list[_Row]]:
    """Rows of like length, at most `batch_tokens` with their padding; the longest come first, so
    that a lack of memory shows at once."""
    batch: list[_Row] = []
    for row in sorted(rows, key=len, reverse=True):
        if batch and (
            (len(batch) + 1) * len(batch[0]) > batch_tokens or len(row) < ALIKE * len(batch[0])
        ):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _batch_losses(
    model: LanguageModel, batch: list[_Row], world: World, autocast: torch.autocast
) -> tuple[Integers, Tensor]:
    """The endings whose tokens the batch tells, one entry per token, and the loss of each token."""
    shape = (len(batch), max(map(len, batch)))
    tokens_BT, positions_BT = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segments_BT = np.full(shape, -1)  # nobody looks at padding
    for line, row in enumerate(batch):
        tokens_BT[line, : len(row)] = row.tokens
        positions_BT[line, : len(row)] = row.positions
        segments_BT[line, : len(row)] = row.segments
    sources_E = np.concatenate([line * shape[1] + row.sources for line, row in enumerate(batch)])
    targets_E = np.concatenate([row.targets for row in batch])
    places_S, place_of_E = np.unique(sources_E, return_inverse=True)

    arrays = (tokens_BT, positions_BT, segments_BT, places_S, place_of_E, targets_E)
    tokens, positions, segments, places, place_of, targets = world.to_device(
        *map(torch.from_numpy, arrays)
    )
    with autocast:  # not for the logits: bfloat16 has too few digits for near ties
        features_BTD = model.features(tokens, positions, _mask(segments))
    features_SD = features_BTD.flatten(0, 1)[places].to(model.token_embedding.weight.dtype)
    losses_E = torch.empty(len(targets), device=world.device)
    for begin in range(0, len(places), LOGITS_AT_ONCE):
        logits_SV = model.unembed(features_SD[begin : begin + LOGITS_AT_ONCE])
        logits_SV = logits_SV[:, : tokenizer.VOCAB_SIZE]
        here = (place_of >= begin) & (place_of < begin + LOGITS_AT_ONCE)
        at = place_of[here] - begin
        losses_E[here] = logits_SV.logsumexp(1)[at] - logits_SV[at, targets[here]]
    return np.concatenate([row.endings for row in batch]), losses_E.double().cpu()


def _mask(segments_BT: Tensor) -> Tensor:
    """(B, T, T): true where the first T may look at the second."""
    asks_BT1, asked_B1T = segments_BT.unsqueeze(2), segments_BT.unsqueeze(1)
    length = segments_BT.size(1)
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril()
    return causal_TT & ((asked_B1T == asks_BT1) | (asked_B1T == 0))
