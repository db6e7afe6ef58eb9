"""GPT-2 with changes of later models.

Rotary positions (Su et al. 2021, RoFormer); RMSNorm (Zhang & Sennrich 2019), also of queries and
keys (Henry et al. 2020); squared ReLU (So et al. 2021, Primer); no biases. The norms have no gain:
the matrix after a norm can represent it, and Xu et al. 2019 find models without it as good.

Other parts, each with a flag of the model:

- `zero_init`: every block begins as the identity (Zhang et al. 2019, Fixup; as muP, Yang et al.
  2022, appendix D.2).
- `sliding_window`: most blocks see the last tokens alone (Beltagy et al. 2020, Longformer, section
  3.1), every fourth one the whole context.
- `untied_head`: the output head has weights of its own, near zero at the beginning.
- `logit_softcap`: bounded logits (Gemma Team 2024, section 2).
- `value_embeddings`: some blocks add an embedding of the token to their values (after Zhou et al.
  2024, ResFormer, who add the values of the first block), gated by head.
- `embedding_skip`: each block reads a learned mix of the residual stream and the embedding.
- `layer_skip`: late blocks read the output of early ones, the last that of the first (Ronneberger
  et al. 2015, U-Net).

The last four are from modded-nanogpt (Jordan et al. 2024, github.com/KellerJordan/modded-nanogpt).

Shape suffixes: B batch, T time, D width (n_embd), H heads, K width of a head, G elements that a
gate reads, R half of K: the pairs that are rotated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.config.model import ModelConfig
from gpt2.model.base import RESIDUAL_WRITERS, Context, LanguageModel
from gpt2.model.layers import FeedForward, KeyValueCache, attend, split_heads, window_mask

ROTATION_BASE = 10_000.0
"""about the number of tokens per radian of the slowest pair (Su et al. 2021, section 3.2.2)"""
EPSILON = 1e-6
EMBEDDING_SCALE = 0.1
"""share of the embedding that each block reads at the beginning"""
UNTIED_HEAD_STD = 0.001
"""of the initial weights of an untied head: all logits are near 0"""
Rotation = tuple[Tensor, Tensor]
"""cosines and sines of each position's angles, (T, R) or (B, 1, T, R)"""


class Modern(LanguageModel):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        if config.embedding_skip:
            self.stream_scales = nn.Parameter(torch.ones(config.n_layer))
            self.embedding_scales = nn.Parameter(torch.full((config.n_layer,), EMBEDDING_SCALE))
        if config.layer_skip and config.n_layer > 1:
            self.skip_scales = nn.Parameter(torch.zeros(config.n_layer // 2))
        if config.untied_head:
            self.head = nn.Linear(config.n_embd, config.embedding_rows, bias=False)
        self._initialise()

    @property
    def head_weight(self) -> Tensor:
        return self.head.weight if self.config.untied_head else self.token_embedding.weight

    def features(self, tokens_BT: Tensor, positions_T: Tensor, context: Context) -> Tensor:
        config, dtype = self.config, self.token_embedding.weight.dtype
        rotation = rotation_of(positions_T, config.n_embd // config.n_head, dtype)
        window = (
            window_mask(positions_T, context, config.sliding_window)
            if config.sliding_window
            else None
        )
        x_BTD = self.dropout(self.token_embedding(tokens_BT))
        if config.embedding_skip:
            x_BTD = norm(x_BTD)
        embedded_BTD = x_BTD = self.as_residual(x_BTD)
        skips = config.n_layer // 2 if config.layer_skip else 0
        early: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            if config.embedding_skip:
                x_BTD = self.stream_scales[layer] * x_BTD
                x_BTD = x_BTD + self.embedding_scales[layer] * embedded_BTD
            if layer >= config.n_layer - skips:
                x_BTD = x_BTD + self.skip_scales[config.n_layer - 1 - layer] * early.pop()
            seen = window if config.window_of(layer) else None
            x_BTD = block(x_BTD, tokens_BT, rotation, layer, context, seen)
            if layer < skips:
                early.append(x_BTD)
        return norm(x_BTD.to(dtype))

    def empty_cache(self, batch_size: int) -> KeyValueCache:
        return KeyValueCache.empty(self.config, batch_size, self.token_embedding.weight)

    def _initialise(self) -> None:
        super()._initialise()
        if self.config.untied_head:
            nn.init.normal_(self.token_embedding.weight)
            nn.init.normal_(self.head.weight, std=UNTIED_HEAD_STD)
        zeros = ("value_gate.weight", *(RESIDUAL_WRITERS if self.config.zero_init else ()))
        for name, parameter in self.named_parameters():
            if name.endswith("value_embedding.weight"):
                nn.init.normal_(parameter, std=self.config.n_embd**-0.5)
            elif name.endswith(zeros):
                nn.init.zeros_(parameter)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = FeedForward(config, squared_relu, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        tokens_BT: Tensor,
        rotation: Rotation,
        layer: int,
        context: Context,
        window: Tensor | None,
    ) -> Tensor:
        x_BTD = x_BTD + self.attention(norm(x_BTD), tokens_BT, rotation, layer, context, window)
        x_BTD = x_BTD + self.mlp(norm(x_BTD))
        return x_BTD


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.query_key_value = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.residual_dropout = nn.Dropout(config.dropout)
        self.embeds_values = layer in config.value_layers
        if self.embeds_values:
            self.value_embedding = nn.Embedding(config.embedding_rows, config.n_embd)
            self.value_gate = nn.Linear(config.value_gate_width, config.n_head, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        tokens_BT: Tensor,
        rotation: Rotation,
        layer: int,
        context: Context,
        window: Tensor | None,
    ) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = split_heads(self.query_key_value(x_BTD), self.n_head)
        q_BHTK, k_BHTK = normed_and_rotated(q_BHTK, rotation), normed_and_rotated(k_BHTK, rotation)
        if self.embeds_values:
            v_BHTK = v_BHTK + self._embedded_values(x_BTD, tokens_BT).to(v_BHTK.dtype)
        dropout = self.dropout if self.training else 0.0
        y_BTD = attend(q_BHTK, k_BHTK, v_BHTK, layer, context, dropout, window)
        out_BTD: Tensor = self.residual_dropout(self.out(y_BTD))
        return out_BTD

    def _embedded_values(self, x_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        """An embedding of each token, (B, H, T, K); each head has a gate of 0 to 2."""
        gates_BTH = 2 * self.value_gate(x_BTD[..., : self.value_gate.in_features]).sigmoid()
        embedded_BTHK = self.value_embedding(tokens_BT).unflatten(2, (self.n_head, -1))
        values_BTHK: Tensor = gates_BTH.unsqueeze(3) * embedded_BTHK
        return values_BTHK.transpose(1, 2)


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
