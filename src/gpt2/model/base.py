"""What the rest of the house asks of a model, whatever its architecture.

Shape suffixes: B batch, T time, D width (n_embd), V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.config.model import ModelConfig
from gpt2.model.cross_entropy import summed_cross_entropy

INITIAL_STD = 0.02
RESIDUAL_WRITERS = ("attention.out.weight", "mlp.down.weight")


@dataclass
class Cache:
    """What a model keeps of the tokens so far. A length of 0 forgets them.

    A beginning that all rows share may go through the model as one row: it is kept for all.
    """

    length: int


Context = Cache | Tensor | None


class LanguageModel(nn.Module, ABC):
    """Tells the next token; the head is tied to the embedding.

    An architecture adds its layers and calls `_initialise`, and says what `features` are.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.fast_head = False
        """whether loss and gradients of the head are computed together: on the CPU only"""
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross entropy of `targets_BT` in nats, summed over all B · T targets: a scalar of float32
        (of float64 in a float64 model)."""
        return self.loss(self._read(tokens_BT, None), targets_BT)

    def loss(self, features_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """The same, of the features of the tokens."""
        if self.fast_head and torch.is_grad_enabled():
            features_ND, targets_N = features_BTD.flatten(0, 1), targets_BT.flatten()
            return summed_cross_entropy(features_ND, self.token_embedding.weight, targets_N)
        logits_BTV = self.unembed(features_BTD)
        if logits_BTV.dtype is torch.bfloat16:
            logits_BTV = logits_BTV.float()
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")

    def logits(self, tokens_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Scores of the next token, (B, T, V), unnormalised.

        With a cache, `tokens_BT` continues the tokens that went through it before.
        """
        return self.unembed(self._read(tokens_BT, cache))

    def next_logits(self, tokens_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Scores of the token after `tokens_BT`, (B, V): the last ones of `logits`, alone."""
        return self.unembed(self._read(tokens_BT, cache)[:, -1])

    @abstractmethod
    def features(self, tokens_BT: Tensor, positions_T: Tensor, context: Context) -> Tensor:
        """What the last layer knows at each token, (B, T, D); `unembed` makes logits of it.

        `positions_T` is (T) or (B, T). Each token sees those before it in its row; with a cache,
        also those in there; with a mask, (B, T, T), those of its row for which its line is true.
        """

    def hidden_matrices(self) -> Iterator[nn.Parameter]:
        """The matrices between embedding and head: what takes features to features."""
        embeddings = {id(part.weight) for part in self.modules() if isinstance(part, nn.Embedding)}
        for part in self.parameters():
            if part.dim() == 2 and id(part) not in embeddings:
                yield part

    @abstractmethod
    def empty_cache(self, batch_size: int) -> Cache:
        """A cache for so many rows of block_size tokens."""

    def unembed(self, features_D: Tensor) -> Tensor:
        """Logits, (…, V), of features, (…, D)."""
        return F.linear(features_D, self.token_embedding.weight)

    def _read(self, tokens_BT: Tensor, cache: Cache | None) -> Tensor:
        """Features of `tokens_BT`, (B, T, D), which are in the cache afterwards."""
        start = cache.length if cache else 0
        length = tokens_BT.size(1)
        positions_T = torch.arange(start, start + length, device=tokens_BT.device)
        features_BTD = self.features(tokens_BT, positions_T, cache)
        if cache:
            cache.length += length
        return features_BTD

    def _initialise(self) -> None:
        """N(0, 0.02), and the layers that write to the residual stream scaled down by the square
        root of their number (Radford et al. 2019, section 2.3)."""
        parameters = dict(self.named_parameters())
        writers = [name for name in parameters if name.endswith(RESIDUAL_WRITERS)]
        for name, parameter in parameters.items():
            if name in writers:
                nn.init.normal_(parameter, std=INITIAL_STD / math.sqrt(len(writers)))
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=INITIAL_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
