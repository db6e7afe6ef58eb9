"""GPT-2 with changes of later models.

Rotary positions (Su et al. 2021, RoFormer); RMSNorm (Zhang & Sennrich 2019), also of queries and
keys (Henry et al. 2020); squared ReLU (So et al. 2021, Primer); no biases. The norms have no gain:
the matrix after a norm can represent it, and Xu et al. 2019 find models without it as good. The
output head is tied to the embedding, as in GPT-2.

Shape suffixes: B batch, T time, D width (n_embd), H heads, K width of a head, R half of it: the
pairs that are rotated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.config.model import ModelConfig
from gpt2.model.base import Context, LanguageModel
from gpt2.model.layers import FeedForward, KeyValueCache, attend, split_heads

ROTATION_BASE = 10_000.0
"""about the number of tokens per radian of the slowest pair (Su et al. 2021, section 3.2.2)"""
EPSILON = 1e-6
Rotation = tuple[Tensor, Tensor]
"""cosines and sines of each position's angles, (T, R) or (B, 1, T, R)"""


class Modern(LanguageModel):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self._initialise()

    def features(self, tokens_BT: Tensor, positions_T: Tensor, context: Context) -> Tensor:
        config, dtype = self.config, self.token_embedding.weight.dtype
        rotation = rotation_of(positions_T, config.n_embd // config.n_head, dtype)
        x_BTD = self.dropout(self.token_embedding(tokens_BT))
        for layer, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rotation, layer, context)
        return norm(x_BTD)

    def empty_cache(self, batch_size: int) -> KeyValueCache:
        return KeyValueCache.empty(self.config, batch_size, self.token_embedding.weight)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp = FeedForward(config, squared_relu, bias=False)

    def forward(self, x_BTD: Tensor, rotation: Rotation, layer: int, context: Context) -> Tensor:
        x_BTD = x_BTD + self.attention(norm(x_BTD), rotation, layer, context)
        x_BTD = x_BTD + self.mlp(norm(x_BTD))
        return x_BTD


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.query_key_value = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, rotation: Rotation, layer: int, context: Context) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = split_heads(self.query_key_value(x_BTD), self.n_head)
        q_BHTK, k_BHTK = normed_and_rotated(q_BHTK, rotation), normed_and_rotated(k_BHTK, rotation)
        dropout = self.dropout if self.training else 0.0
        y_BTD = attend(q_BHTK, k_BHTK, v_BHTK, layer, context, dropout)
        out_BTD: Tensor = self.residual_dropout(self.out(y_BTD))
        return out_BTD


def norm(x: Tensor) -> Tensor:
    """Each vector, scaled to a root mean square of 1."""
    # The default epsilon of bfloat16 would be larger than the mean square of an embedding.
    return F.rms_norm(x, (x.size(-1),), eps=EPSILON)


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def rotation_of(positions_T: Tensor, width: int, dtype: torch.dtype) -> Rotation:
    """The rotation of the pairs of a head of `width` at each position: pair r turns by
    10000^(-2 r / width) radians per token."""
    pairs_R = torch.arange(width // 2, device=positions_T.device, dtype=dtype)
    speeds_R = ROTATION_BASE ** (-2 * pairs_R / width)
    angles_TR = positions_T.unsqueeze(-1) * speeds_R
    if positions_T.dim() == 2:
        angles_TR = angles_TR.unsqueeze(1)  # the same for all heads
    return angles_TR.cos(), angles_TR.sin()


def normed_and_rotated(x_BHTK: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys, normalised and rotated by their positions: the product of a query and a key
    depends on their distance. Computed in the dtype of `rotation`, as bfloat16 is too coarse for
    angles."""
    cos_TR, sin_TR = rotation
    first_BHTR, second_BHTR = norm(x_BHTK.to(cos_TR.dtype)).chunk(2, dim=-1)
    turned = (
        first_BHTR * cos_TR - second_BHTR * sin_TR,
        first_BHTR * sin_TR + second_BHTR * cos_TR,
    )
    return torch.cat(turned, dim=-1).to(x_BHTK.dtype)
