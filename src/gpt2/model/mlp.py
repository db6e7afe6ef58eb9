"""A baseline without attention: each token sees a fixed window of tokens.

The embeddings of the window are concatenated and projected to one vector (Bengio et al. 2003,
section 2), which passes through GPT-2's feed-forward layers. The window is padded with zeros before
the first token of a row.

Shape suffixes: B batch, T time, D width (n_embd), W window, newest token first; S tokens in the
cache that a window reaches, and T new ones.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.config.model import ModelConfig
from gpt2.model.base import Cache, Context, LanguageModel
from gpt2.model.layers import FeedForward, gelu


class MLP(LanguageModel):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        width = config.n_embd
        self.dropout = nn.Dropout(config.dropout)
        self.join = nn.Linear(config.window * width, width, bias=config.bias)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = nn.LayerNorm(width, bias=config.bias)
        self._initialise()

    def features(self, tokens_BT: Tensor, positions_T: Tensor, context: Context) -> Tensor:
        """As in LanguageModel; `positions_T` is not used, as the window has the order."""
        known_BS, new = tokens_BT, tokens_BT.size(1)
        if isinstance(context, TokenCache):
            known_BS = context.extend(tokens_BT, self.config.window)
        known_BSD = self.dropout(self.token_embedding(known_BS))
        if isinstance(context, Tensor):
            seen_BTWD = windows_of_mask(known_BSD, context, self.config.window)
        else:
            seen_BTWD = windows(known_BSD, new, self.config.window)
        x_BTD = self.join(seen_BTWD.flatten(2))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        features_BTD: Tensor = self.final_norm(x_BTD)
        return features_BTD

    def empty_cache(self, batch_size: int) -> "TokenCache":
        shape = (batch_size, self.config.block_size)
        device = self.token_embedding.weight.device
        return TokenCache(length=0, tokens=torch.zeros(shape, dtype=torch.long, device=device))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mlp_norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = FeedForward(config, gelu, config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return out_BTD


@dataclass
class TokenCache(Cache):
    """The tokens so far, a (B, block_size) buffer."""

    tokens: Tensor

    def extend(self, tokens_BT: Tensor, window: int) -> Tensor:
        """Appends new tokens; returns them after the old ones that their windows reach, (B, S)."""
        rows, end = tokens_BT.size(0), self.length + tokens_BT.size(1)
        self.tokens[:, self.length : end] = tokens_BT
        return self.tokens[:rows, max(0, self.length - window + 1) : end]


def windows(known_BSD: Tensor, new: int, window: int) -> Tensor:
    """The window of each of the last `new` tokens, (B, T, W, D): itself and those before it."""
    padded = F.pad(known_BSD, (0, 0, window - 1, 0))
    begin = padded.size(1) - new
    shifted = [padded[:, begin - back : begin - back + new] for back in range(window)]
    return torch.stack(shifted, dim=2)


def windows_of_mask(known_BTD: Tensor, mask_BTT: Tensor, window: int) -> Tensor:
    """The window of each token under a mask, (B, T, W, D): the last W tokens that it may see."""
    length = mask_BTT.size(2)
    numbers_T = torch.arange(1, length + 1, device=mask_BTT.device)
    last_BTW = (mask_BTT * numbers_T).topk(min(window, length), dim=2).values
    last_BTW = F.pad(last_BTW, (0, window - last_BTW.size(2)))  # 0 is the padding
    padded = F.pad(known_BTD, (0, 0, 1, 0))
    rows_B11 = torch.arange(len(padded), device=padded.device)[:, None, None]
    return padded[rows_B11, last_BTW]
