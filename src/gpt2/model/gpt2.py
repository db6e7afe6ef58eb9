"""GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions, the head tied to the embedding.

Shape suffixes: B batch, T time, D width (n_embd), H heads, K width of a head, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.config import ModelConfig


class GPT2(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self._initialise()

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross entropy of `targets_BT` in nats, summed over all B · T targets: a scalar of float32
        (of float64 in a float64 model).

        Raises IndexError for more than block_size tokens in a row.
        """
        logits_BTV = self.logits(tokens_BT)
        if logits_BTV.dtype is torch.bfloat16:
            logits_BTV = logits_BTV.float()
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")

    def logits(self, tokens_BT: Tensor, cache: "KeyValueCache | None" = None) -> Tensor:
        """Scores of the next token, (B, T, V), unnormalised.

        With a cache, `tokens_BT` continues the tokens that went through it before.
        """
        return self.unembed(self._read(tokens_BT, cache))

    def next_logits(self, tokens_BT: Tensor, cache: "KeyValueCache | None" = None) -> Tensor:
        """Scores of the token after `tokens_BT`, (B, V): the last ones of `logits`, alone."""
        return self.unembed(self._read(tokens_BT, cache)[:, -1])

    def _read(self, tokens_BT: Tensor, cache: "KeyValueCache | None") -> Tensor:
        """Features of `tokens_BT`, (B, T, D), which are in the cache afterwards."""
        start = cache.length if cache else 0
        length = tokens_BT.size(1)
        positions_T = torch.arange(start, start + length, device=tokens_BT.device)
        features_BTD = self.features(tokens_BT, positions_T, cache)
        if cache:
            cache.length += length
        return features_BTD

    def features(
        self, tokens_BT: Tensor, positions_T: Tensor, context: "KeyValueCache | Tensor | None"
    ) -> Tensor:
        """What the last block knows at each token, (B, T, D); `unembed` makes logits of it.

        `positions_T` is (T) or (B, T). Each token sees those before it in its row; with a cache,
        also those in there; with a mask, (B, T, T), those of its row for which its line is true.
        """
        x_BTD = self.token_embedding(tokens_BT) + self.position_embedding(positions_T)
        x_BTD = self.dropout(x_BTD)
        for layer, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, layer, context)
        features_BTD: Tensor = self.final_norm(x_BTD)
        return features_BTD

    def unembed(self, features_D: Tensor) -> Tensor:
        """Logits, (…, V), of features, (…, D)."""
        return F.linear(features_D, self.token_embedding.weight)

    def _initialise(self) -> None:
        """N(0, 0.02), and the layers that write to the residual stream scaled down by the square
        root of their number (Radford et al. 2019, section 2.3)."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                nn.init.normal_(parameter, std=residual_std)
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(
        self, x_BTD: Tensor, layer: int, context: "KeyValueCache | Tensor | None"
    ) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), layer, context)
        x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return x_BTD


class Attention(nn.Module):
    """Causal self-attention through scaled_dot_product_attention: flash kernels on CUDA."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.query_key_value = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BTD: Tensor, layer: int, context: "KeyValueCache | Tensor | None"
    ) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = (
            part.unflatten(2, (self.n_head, -1)).transpose(1, 2)
            for part in self.query_key_value(x_BTD).chunk(3, dim=2)
        )
        mask = None
        if isinstance(context, KeyValueCache):
            k_BHTK, v_BHTK = context.extend(layer, k_BHTK, v_BHTK)
            mask = context.causal_mask(q_BHTK.size(2))
        elif context is not None:
            mask = context.unsqueeze(1)
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            k_BHTK,
            v_BHTK,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            # Without a mask: all tokens at once, or one that sees all the others.
            is_causal=mask is None and q_BHTK.size(2) == k_BHTK.size(2),
        )
        y_BTD = y_BHTK.transpose(1, 2).flatten(2)
        out_BTD: Tensor = self.residual_dropout(self.out(y_BTD))
        return out_BTD


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden_BTD = F.gelu(self.up(x_BTD), approximate="tanh")
        out_BTD: Tensor = self.dropout(self.down(hidden_BTD))
        return out_BTD


@dataclass
class KeyValueCache:
    """Keys and values of the tokens so far, one (B, H, T, K) buffer per layer.

    A beginning that all rows share may go through the model as one row: it is stored for all.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0

    @classmethod
    def empty(cls, model: GPT2, batch_size: int) -> "KeyValueCache":
        config, weight = model.config, model.token_embedding.weight
        width = config.n_embd // config.n_head
        shape = (batch_size, config.n_head, config.block_size, width)
        return cls(
            keys=[weight.new_empty(shape) for _ in range(config.n_layer)],
            values=[weight.new_empty(shape) for _ in range(config.n_layer)],
        )

    def extend(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new keys and values behind the old ones; returns all of as many rows."""
        rows, end = k_BHTK.size(0), self.length + k_BHTK.size(2)
        self.keys[layer][:, :, self.length : end] = k_BHTK
        self.values[layer][:, :, self.length : end] = v_BHTK
        return self.keys[layer][:rows, :, :end], self.values[layer][:rows, :, :end]

    def causal_mask(self, new: int) -> Tensor | None:
        """(new, length + new): each new token sees all before it and itself. None where the
        kernels need no mask for that, and are faster: for a beginning, and for a single token."""
        if self.length == 0 or new == 1:
            return None
        mask = torch.ones(new, self.length + new, dtype=torch.bool, device=self.keys[0].device)
        return mask.tril(self.length)
