import copy
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

import foreign_shards
from gpt2 import model
from gpt2.config.model import ModelConfig
from gpt2.data import sampler, tokenizer
from gpt2.data.remote import Storage
from gpt2.data.shards import TokenDataset, load_index
from gpt2.distributed.world import World
from gpt2.evaluation.loss import Loss, row_losses, validation_loss
from gpt2.model.base import LanguageModel

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, device=CPU)
T = TypeVar("T")
BLOCK_SIZE = 16
DOCUMENTS = ("Größe, naïve Ἀθῆναι.\n", "漢字と仮名 🙂🙃 ", "", "plain ASCII text", "שלום ¿qué? ½ €")
"""characters of one to four bytes, which end within a row, and an empty document"""


@dataclass(frozen=True)
class RankInThread(World):
    """A rank whose other ranks are threads of this process."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    gathered: list[Tensor] = field(default_factory=list)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return self._gather(tensor).sum(0)

    def all_reduce_max(self, value: int) -> int:
        return int(self._gather(torch.tensor(value)).max())

    def _gather(self, tensor: Tensor) -> Tensor:
        self.gathered[self.rank] = tensor
        self.barrier.wait()
        tensors = torch.stack(self.gathered)
        self.barrier.wait()
        return tensors


def on_ranks(ranks: int, measure: Callable[[World], T]) -> list[T]:
    """What `measure` returns on each rank."""
    barrier, gathered = threading.Barrier(ranks), [torch.empty(0)] * ranks

    def on_rank(rank: int) -> T:
        try:
            return measure(RankInThread(rank, ranks, CPU, barrier=barrier, gathered=gathered))
        except BaseException:
            barrier.abort()  # else the other ranks would wait
            raise

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(on_rank, range(ranks)))


def no_autocast() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


def small_model(block_size: int) -> LanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=block_size, dropout=0.5)
    return model.build(config)


@pytest.fixture
def texts(tmp_path: Path) -> TokenDataset:
    """The documents, several times, with <|endoftext|> between them."""
    tokens = [
        token
        for text in DOCUMENTS * 9
        for token in (tokenizer.END_OF_TEXT, *tokenizer.encode(text))
    ]
    for split in ("train", "val"):
        np.save(tmp_path / f"{split}.npy", np.array(tokens, np.uint16))
    return TokenDataset(load_index(Storage(str(tmp_path))), "val", BLOCK_SIZE)


@pytest.mark.parametrize("mini_batch_size", [1, 3, 100])
def test_mean_over_the_rows_whatever_the_micro_batch(data_root: Path, mini_batch_size: int):
    net = small_model(32)
    shards = TokenDataset(load_index(Storage(str(data_root))), "val", 32)
    rows = sampler.spread(shards.rows_per_shard, 10)
    loss = validation_loss(net, shards, rows, ALONE, mini_batch_size, no_autocast())
    assert loss is not None
    assert net.training
    net.eval()
    with torch.no_grad():
        tokens_BT, targets_BT = map(torch.tensor, shards.read(rows))
        logits_BTV = net.logits(tokens_BT)
        expected = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
    assert loss.per_token == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_bits_per_byte_is_the_information_of_the_text_over_its_bytes(
    texts: TokenDataset, ranks: int
):
    """Against a direct computation on decoded text, with shares of unequal size."""
    net = small_model(BLOCK_SIZE)
    rows = sampler.spread(texts.rows_per_shard, 7)
    tokens_BT, targets_BT = texts.read(rows)
    with torch.no_grad():
        logits_BTV = copy.deepcopy(net).eval().logits(torch.tensor(tokens_BT))
    log_probs = torch.log_softmax(logits_BTV.double(), -1)
    log_probs_BT = log_probs.gather(-1, torch.tensor(targets_BT)[..., None]).squeeze(-1)
    written = [tokenizer.load().decode_bytes(row) for row in targets_BT.tolist()]
    texts_of_rows = [row.replace(b"<|endoftext|>", b"") for row in written]
    assert sum(map(len, texts_of_rows)) < sum(map(len, written))  # it stands in the rows
    with pytest.raises(UnicodeDecodeError):  # and a row ends within a character
        for text in texts_of_rows:
            text.decode()
    bits = -float(log_probs_BT.sum()) / math.log(2)
    expected = bits / len(b"".join(texts_of_rows))

    def measure(world: World) -> tuple[Loss | None, list[Loss]]:
        own = copy.deepcopy(net)
        return (
            validation_loss(own, texts, rows, world, 2, no_autocast()),
            row_losses(own, texts, rows, world, no_autocast()),
        )

    (whole, parts), *others = on_ranks(ranks, measure)
    assert all(other == (whole, parts) for other in others)
    assert whole is not None
    assert whole.bits_per_byte == pytest.approx(expected, rel=1e-6)
    assert whole.text_bytes == len(b"".join(texts_of_rows))
    assert [part.text_bytes for part in parts] == list(map(len, texts_of_rows))
    assert sum(part.nats for part in parts) == pytest.approx(whole.nats, rel=1e-6)


def test_the_bytes_of_characters_are_those_of_their_own_vocabulary(tmp_path: Path):
    text = foreign_shards.nanogpt_characters(tmp_path)["val"]
    shards = TokenDataset(load_index(Storage(str(tmp_path))), "val", BLOCK_SIZE)
    rows = sampler.spread(shards.rows_per_shard, 99)
    loss = validation_loss(small_model(BLOCK_SIZE), shards, rows, ALONE, 2, no_autocast())
    assert loss is not None
    starts = [row * BLOCK_SIZE + 1 for _, row in rows.tolist()]
    written = "".join(text[start : start + BLOCK_SIZE] for start in starts).encode()
    assert loss.text_bytes == len(written) > loss.targets


def test_rows_without_text_have_no_bits_per_byte():
    assert Loss(nats=160.0, targets=16, text_bytes=0).bits_per_byte is None
