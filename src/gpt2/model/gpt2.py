"""GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions, output head tied to embedding.

Shape suffixes: B batch, T time, D width (n_embd), H heads, K width of a head.
"""

from torch import Tensor, nn

from gpt2.config.model import ModelConfig
from gpt2.model.base import Context, LanguageModel
from gpt2.model.layers import FeedForward, KeyValueCache, attend, gelu, split_heads


class GPT2(LanguageModel):
    """Raises IndexError for more than block_size tokens in a row."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self._initialise()

    def features(self, tokens_BT: Tensor, positions_T: Tensor, context: Context) -> Tensor:
        x_BTD = self.token_embedding(tokens_BT) + self.position_embedding(positions_T)
        x_BTD = self.as_residual(self.dropout(x_BTD))
        for layer, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, layer, context)
        features_BTD: Tensor = self.final_norm(x_BTD.to(self.token_embedding.weight.dtype))
        return features_BTD

    def empty_cache(self, batch_size: int) -> KeyValueCache:
        return KeyValueCache.empty(self.config, batch_size, self.token_embedding.weight)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = FeedForward(config, gelu, config.bias)

    def forward(self, x_BTD: Tensor, layer: int, context: Context) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), layer, context)
        x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return x_BTD


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.query_key_value = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, layer: int, context: Context) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = split_heads(self.query_key_value(x_BTD), self.n_head)
        dropout = self.dropout if self.training else 0.0
        y_BTD = attend(q_BHTK, k_BHTK, v_BHTK, layer, context, dropout)
        out_BTD: Tensor = self.residual_dropout(self.out(y_BTD))
        return out_BTD
