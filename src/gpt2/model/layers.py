"""Layers that several architectures share.

Shape suffixes: B batch, T time, D width (n_embd), H heads, K width of a head.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2.config.model import ModelConfig
from gpt2.model.base import Cache, Context

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class FeedForward(nn.Module):
    """Two linear layers, applied to each token, with four times the width between them."""

    def __init__(
        self, config: ModelConfig, activation: Callable[[Tensor], Tensor], bias: bool
    ) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=bias)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = self.dropout(self.down(self.activation(self.up(x_BTD))))
        return out_BTD


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation (Hendrycks & Gimpel 2016, section 2), which GPT-2 was trained with."""
    return F.gelu(x, approximate="tanh")


@dataclass
class KeyValueCache(Cache):
    """Keys and values of the tokens so far, one (B, H, block_size, K) buffer each per layer."""

    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def empty(cls, config: ModelConfig, batch_size: int, like: Tensor) -> "KeyValueCache":
        """An empty cache with the dtype and on the device of `like`."""
        width = config.n_embd // config.n_head
        shape = (batch_size, config.n_head, config.block_size, width)
        return cls(
            length=0,
            keys=[like.new_empty(shape) for _ in range(config.n_layer)],
            values=[like.new_empty(shape) for _ in range(config.n_layer)],
        )

    def extend(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Appends new keys and values; returns all of them, for the number of new rows."""
        rows, end = k_BHTK.size(0), self.length + k_BHTK.size(2)
        self.keys[layer][:, :, self.length : end] = k_BHTK
        self.values[layer][:, :, self.length : end] = v_BHTK
        return self.keys[layer][:rows, :, :end], self.values[layer][:rows, :, :end]

    def causal_mask(self, new: int) -> Tensor | None:
        """The mask (new, length + new) with which a token sees itself and all tokens before it.

        None if the cache is empty or the token is the only new one: kernels are faster without.
        """
        if self.length == 0 or new == 1:
            return None
        mask = torch.ones(new, self.length + new, dtype=torch.bool, device=self.keys[0].device)
        return mask.tril(self.length)


def attend(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    layer: int,
    context: Context,
    dropout: float = 0.0,
    window: Tensor | None = None,
) -> Tensor:
    """Causal attention, (B, T, D), by scaled_dot_product_attention, which has flash kernels; with
    the mask of a `window`, those that take a mask."""
    mask = window
    if isinstance(context, KeyValueCache):
        k_BHTK, v_BHTK = context.extend(layer, k_BHTK, v_BHTK)
    if mask is None:
        if isinstance(context, KeyValueCache):
            mask = context.causal_mask(q_BHTK.size(2))
        elif isinstance(context, Tensor):
            mask = context.unsqueeze(1)
    # With a context, lengths vary, and cuDNN would prepare a plan for each of them.
    with sdpa_kernel(WITHOUT_CUDNN) if context is not None else contextlib.nullcontext():
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            k_BHTK,
            v_BHTK,
            attn_mask=mask,
            dropout_p=dropout,
            # Without a mask: all tokens at once, or a single one that sees all the others.
            is_causal=mask is None and q_BHTK.size(2) == k_BHTK.size(2),
        )
    return y_BHTK.transpose(1, 2).flatten(2)


def window_mask(positions_T: Tensor, context: Context, window: int) -> Tensor:
    """True where a token sees another one: itself, and those of `context` and of its row that are
    less than `window` positions before it. (T, S) for T tokens and S with those in a cache; for
    positions (B, T), (B, 1, T, T)."""
    seen_S = positions_T
    if isinstance(context, KeyValueCache):
        end = context.length + positions_T.size(-1)
        seen_S = torch.arange(end, device=positions_T.device)
    distance_TS = positions_T.unsqueeze(-1) - seen_S.unsqueeze(-2)
    mask_TS = (distance_TS >= 0) & (distance_TS < window)
    return (mask_TS & context).unsqueeze(1) if isinstance(context, Tensor) else mask_TS


def split_heads(qkv_BTD: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (B, H, T, K) each, from their concatenation, (B, T, 3 · D)."""
    q_BHTK, k_BHTK, v_BHTK = (
        part.view(*part.shape[:2], n_head, -1).transpose(1, 2) for part in qkv_BTD.chunk(3, dim=2)
    )
    return q_BHTK, k_BHTK, v_BHTK
