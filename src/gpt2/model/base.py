"""The interface of all models.

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
from gpt2.model.cross_entropy import summed_and_single_losses, summed_cross_entropy

INITIAL_STD = 0.02
RESIDUAL_WRITERS = ("attention.out.weight", "mlp.down.weight")


@dataclass
class Cache:
    """State of the tokens that a model has read, so that generation does not read them again.

    A prefix that all rows share can be read as a single row: it counts for all of them. Setting
    `length` to 0 empties the cache.
    """

    length: int
    """tokens in the cache"""


Context = Cache | Tensor | None
"""what a token sees besides the tokens before it: see `LanguageModel.features`"""


class LanguageModel(nn.Module, ABC):
    """Predicts the next token. The output head shares the weights of the token embedding, unless a
    subclass has another `head_weight`.

    A subclass defines `features` and `empty_cache`; its constructor adds layers and then calls
    `_initialise`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.plain_head = False
        """whether the loss is computed from the logits of all tokens, by plain operations; for runs
        that began so"""
        self.residual_dtype: torch.dtype | None = None
        """under autocast, the type of the residual stream; None is that of the weights"""
        self.token_embedding = nn.Embedding(config.embedding_rows, config.n_embd)

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor, by_row: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Cross entropy of `targets_BT` in nats, summed over all B · T targets; a float32 scalar
        (float64 if the model is). `by_row` adds the sum of each row, (B), without gradients."""
        features_BTD = self._read(tokens_BT, None)
        if not by_row:
            return self.loss(features_BTD, targets_BT)
        loss, losses_BT = summed_and_single_losses(
            features_BTD, self.head_weight, targets_BT, self.config.logit_softcap
        )
        return loss, losses_BT.sum(1)

    def loss(self, features_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """The summed cross entropy of `forward`, from the features of the tokens."""
        weight_VD = self.head_weight
        if not self.plain_head:
            return summed_cross_entropy(
                features_BTD, weight_VD, targets_BT, self.config.logit_softcap
            )
        logits_BTV = self.unembed(features_BTD).to(weight_VD.dtype)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")

    def logits(self, tokens_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits of the next token at each position, (B, T, V).

        With a cache, `tokens_BT` continue the tokens in it.
        """
        return self.unembed(self._read(tokens_BT, cache))

    def next_logits(self, tokens_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits of the token after `tokens_BT`, (B, V)."""
        return self.unembed(self._read(tokens_BT, cache)[:, -1])

    @abstractmethod
    def features(self, tokens_BT: Tensor, positions_T: Tensor, context: Context) -> Tensor:
        """Output of the last layer at each token, (B, T, D), which `unembed` turns into logits.

        `positions_T` is (T) or (B, T). Without `context`, each token sees itself and the tokens
        before it in its row. With a cache, it also sees the tokens in the cache. With a boolean
        mask, (B, T, T), token t sees the tokens s of its row where mask[b, t, s] is true.
        """

    @property
    def head_weight(self) -> Tensor:
        """The matrix of the output head, (V, D)."""
        return self.token_embedding.weight

    def hidden_matrices(self) -> Iterator[nn.Parameter]:
        """The matrices between embedding and head: all other two-dimensional weights."""
        outer = {*map(id, self.embeddings()), id(self.head_weight)}
        for part in self.parameters():
            if part.dim() == 2 and id(part) not in outer:
                yield part

    def embeddings(self) -> Iterator[Tensor]:
        """The tables in which a weight is looked up by token or position."""
        for part in self.modules():
            if isinstance(part, nn.Embedding):
                yield part.weight

    @abstractmethod
    def empty_cache(self, batch_size: int) -> Cache:
        """A cache for `batch_size` rows of up to block_size tokens."""

    def as_residual(self, x_BTD: Tensor) -> Tensor:
        """`x_BTD` in the type of the residual stream."""
        is_cast = torch.is_autocast_enabled(x_BTD.device.type)
        return (
            x_BTD if self.residual_dtype is None or not is_cast else x_BTD.to(self.residual_dtype)
        )

    def unembed(self, features_D: Tensor) -> Tensor:
        """Logits, (…, V), of features, (…, D)."""
        logits_V = F.linear(features_D, self.head_weight)
        softcap = self.config.logit_softcap
        return logits_V if softcap is None else softcap * (logits_V / softcap).tanh()

    def _read(self, tokens_BT: Tensor, cache: Cache | None) -> Tensor:
        """Features of `tokens_BT`, (B, T, D); adds the tokens to the cache."""
        start = cache.length if cache else 0
        length = tokens_BT.size(1)
        positions_T = torch.arange(start, start + length, device=tokens_BT.device)
        features_BTD = self.features(tokens_BT, positions_T, cache)
        if cache:
            cache.length += length
        return features_BTD

    def _initialise(self) -> None:
        """Draws weights from N(0, 0.02). Layers that write to the residual stream are scaled down
        by the square root of their number (Radford et al. 2019, section 2.3)."""
        parameters = dict(self.named_parameters())
        writers = [name for name in parameters if name.endswith(RESIDUAL_WRITERS)]
        for name, parameter in parameters.items():
            if name in writers:
                nn.init.normal_(parameter, std=INITIAL_STD / math.sqrt(len(writers)))
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=INITIAL_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
