"""Losses of several endings of a text under a model, computed for many texts at once.

A context and its endings are packed into one sequence: the context once, then all endings, each at
the positions that follow the context, with a mask that hides the endings from each other. Sequences
of similar length form a batch; on CUDA, whose libraries prepare for each new shape, their lengths
are rounded up to a few. Logits are computed only where a token of an ending is predicted.

Shapes: B sequences, T time, D width, V vocabulary, S positions whose logits are needed, E tokens of
endings.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpt2.data import tokenizer
from gpt2.distributed import precision
from gpt2.distributed.world import World
from gpt2.evaluation.rounds import in_rounds
from gpt2.model import evaluating
from gpt2.model.base import LanguageModel

BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
"""tokens of a batch with padding, by device"""
LENGTH_STEP = {"cpu": 1, "cuda": 32}
"""lengths are multiples of it: for HellaSwag, 32 means 15 shapes in place of 95, and 9 % padding"""
MIN_LENGTH_RATIO = 0.9
"""of the shortest to the longest sequence of a batch: the difference is padding"""
LOGITS_AT_ONCE = {"cpu": 512, "cuda": 4096}
"""positions; float32 logits of 512 positions take 100 MB"""
TokenIds = tuple[int, ...]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Question:
    """Token ids of a context and of its endings, none of them empty."""

    context: TokenIds
    endings: tuple[TokenIds, ...]


@dataclass(frozen=True)
class OtherWork:
    """What rank 0 does in place of its first batches, while the other ranks compute theirs."""

    rounds: int
    """number of rounds in which rank 0 has no batch, the same on every rank"""
    advance: Callable[[], None]
    """called on rank 0 in each of them; it never raises"""


@torch.no_grad()
def ending_losses(
    model: LanguageModel,
    questions: list[Question],
    world: World,
    autocast: torch.autocast,
    batch_tokens: int | None = None,
    stop: Callable[[], int] = lambda: 0,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
    other_work: OtherWork | None = None,
    vocab_size: int = tokenizer.VOCAB_SIZE,
) -> list[list[float]] | None:
    """Summed cross entropy in nats of each ending of each question, the same on every rank.

    Ids from `vocab_size` on, which pad the vocabulary, get no probability. A text that is longer
    than the model's context is cut at its beginning. The ranks share the batches of `batch_tokens`
    (None: BATCH_TOKENS), which do not depend on the number of ranks. Returns None if `stop()` was
    not 0 on some rank before the end; raises MeasurementFailed on all ranks if one of them fails.
    `track` wraps the loop over rounds of batches, for a progress bar. Of several ranks, the first
    does `other_work`.
    """
    ends = np.cumsum([len(question.endings) for question in questions])
    sequences = list(_sequences(questions, model.config.block_size))
    kind = world.device.type
    batches = list(_batches(sequences, batch_tokens or BATCH_TOKENS[kind], LENGTH_STEP[kind]))
    losses = torch.zeros(int(ends[-1]) if len(ends) else 0, dtype=torch.float64)

    rounds = list(_rounds(len(batches), world.size, other_work.rounds if other_work else 0))

    def add_batch(number: int) -> None:
        if world.rank in rounds[number]:
            batch = batches[rounds[number][world.rank]]
            endings, token_losses = _batch_losses(model, batch, world, autocast, vocab_size)
            losses.index_add_(0, torch.from_numpy(endings), token_losses)
        elif other_work and world.is_rank0:
            other_work.advance()

    with evaluating(model), precision.without_tf32(world.device):  # endings may differ by less
        if not in_rounds(world, track(range(len(rounds))), add_batch, stop):
            return None
    flat = world.all_reduce_sum(losses).tolist()  # on the CPU: a full GPU must not fail one rank
    return [
        flat[end - len(question.endings) : end]
        for question, end in zip(questions, ends, strict=True)
    ]


def _rounds(batches: int, ranks: int, without_rank0: int) -> Iterator[dict[int, int]]:
    """The number of the batch that each rank computes in each round. With several ranks, rank 0 has
    none in the first rounds."""
    begin = 0
    while begin < batches:
        first_rank = int(ranks > 1 and without_rank0 > 0)
        end = min(begin + ranks - first_rank, batches)
        yield dict(enumerate(range(begin, end), first_rank))
        begin, without_rank0 = end, without_rank0 - 1


@dataclass(frozen=True)
class _Sequence:
    """A context and its endings, packed."""

    tokens: Integers
    positions: Integers
    segments: Integers
    """0 for tokens of the context, then 1, 2, … for tokens of each ending"""
    sources: Integers
    """for each token of an ending, the index in the sequence whose logits predict it"""
    targets: Integers
    """the tokens of the endings"""
    endings: Integers
    """for each of these tokens, the number of its ending among the endings of all questions"""

    def __len__(self) -> int:
        return len(self.tokens)


def _sequences(questions: list[Question], block_size: int) -> Iterator[_Sequence]:
    """One sequence per question, or one per ending if the question is longer than the context."""
    number = 0
    for question in questions:
        longest = max(map(len, question.endings))
        if len(question.context) + longest - 1 <= block_size:  # the last token is no input
            yield _pack(question.context, question.endings, number)
        else:
            for offset, ending in enumerate(question.endings):
                whole = (*question.context, *ending)[-block_size - 1 :]
                begin = max(1, len(whole) - len(ending))
                yield _pack(whole[:begin], (whole[begin:],), number + offset)
        number += len(question.endings)


def _pack(context: TokenIds, endings: tuple[TokenIds, ...], number: int) -> _Sequence:
    """The sequence of endings whose numbers start at `number`."""
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
    return _Sequence(*(np.asarray(column, np.int64) for column in columns))


@dataclass(frozen=True)
class _Batch:
    """Sequences that are computed together, padded to `length` tokens."""

    sequences: list[_Sequence]
    length: int


def _batches(sequences: list[_Sequence], batch_tokens: int, length_step: int) -> Iterator[_Batch]:
    """Sequences of similar length, at most `batch_tokens` with padding. The longest come first, so
    that lack of memory shows at once."""
    batch: list[_Sequence] = []
    length = 0
    for sequence in sorted(sequences, key=len, reverse=True):
        if batch and (
            (len(batch) + 1) * length > batch_tokens
            or len(sequence) < MIN_LENGTH_RATIO * len(batch[0])
        ):
            yield _Batch(batch, length)
            batch = []
        if not batch:
            length = -(-len(sequence) // length_step) * length_step
        batch.append(sequence)
    if batch:
        yield _Batch(batch, length)


def _batch_losses(
    model: LanguageModel, batch: _Batch, world: World, autocast: torch.autocast, vocab_size: int
) -> tuple[Integers, Tensor]:
    """For each token of an ending in the batch, the number of its ending and its loss in nats."""
    shape = (len(batch.sequences), batch.length)
    tokens_BT, positions_BT = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segments_BT = np.full(shape, -1)  # of padding: no token attends to it
    for index, sequence in enumerate(batch.sequences):
        tokens_BT[index, : len(sequence)] = sequence.tokens
        positions_BT[index, : len(sequence)] = sequence.positions
        segments_BT[index, : len(sequence)] = sequence.segments
    sources_E = np.concatenate(
        [index * batch.length + sequence.sources for index, sequence in enumerate(batch.sequences)]
    )
    targets_E = np.concatenate([sequence.targets for sequence in batch.sequences])
    endings_E = np.concatenate([sequence.endings for sequence in batch.sequences])
    in_order = np.argsort(sources_E, kind="stable")
    targets_E, endings_E = targets_E[in_order], endings_E[in_order]
    sources_S, source_of_E = np.unique(sources_E[in_order], return_inverse=True)

    arrays = (tokens_BT, positions_BT, segments_BT, sources_S, source_of_E, targets_E)
    tokens, positions, segments, sources, source_of, targets = world.to_device(
        *map(torch.from_numpy, arrays)
    )
    with autocast:  # not for the logits: bfloat16 has too few digits for near ties
        features_BTD = model.features(tokens, positions, _mask(segments))
    features_SD = features_BTD.flatten(0, 1)[sources].to(model.token_embedding.weight.dtype)
    losses_E = torch.empty(len(targets), device=world.device)
    at_once = LOGITS_AT_ONCE[world.device.type]
    for begin in range(0, len(sources), at_once):
        logits_SV = model.unembed(features_SD[begin : begin + at_once])
        logits_SV = logits_SV[:, :vocab_size]
        # The host knows the place of each token, so that it does not wait for the device.
        here = slice(*np.searchsorted(source_of_E, (begin, begin + at_once)).tolist())
        at = source_of[here] - begin
        losses_E[here] = logits_SV.logsumexp(1)[at] - logits_SV[at, targets[here]]
    return endings_E, losses_E.double().cpu()


def _mask(segments_BT: Tensor) -> Tensor:
    """(B, T, T): true where the token of the first T attends to that of the second: earlier tokens
    of its own ending, and the context."""
    queries_BT1, keys_B1T = segments_BT.unsqueeze(2), segments_BT.unsqueeze(1)
    length = segments_BT.size(1)
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril()
    return causal_TT & ((keys_B1T == queries_BT1) | (keys_B1T == 0))
