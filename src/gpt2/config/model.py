"""The shape of a model: its flags, their limits, and the sizes that follow from them. Pure.

ARCHITECTURES is the table of all architectures: a new one is a file in `gpt2.model`, and its entry
here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from gpt2.base.validation import nearest_multiples, require, require_at_least, suggestion
from gpt2.data import tokenizer


@dataclass(frozen=True)
class ModelConfig:
    """Architecture (Radford et al. 2019, table 2)."""

    architecture: str = "gpt2"
    """gpt2; modern: rotary positions, RMSNorm, squared ReLU, no biases; mlp: no attention"""
    n_layer: int = 12
    """blocks"""
    n_head: int = 12
    """attention heads per block; mlp has none"""
    n_embd: int = 768
    """width of the residual stream"""
    vocab_size: int = 50304
    """rows of the embedding: the tokeniser's 50257, padded to a multiple of 128"""
    block_size: int = 1024
    """context length in tokens"""
    window: int = 16
    """mlp: tokens that it sees, itself included"""
    dropout: float = 0.0
    """dropout probability; GPT-2's pretraining runs well without"""
    bias: bool = True
    """biases in linear layers and layer norms, as in GPT-2; modern has none, whatever this says"""

    def __post_init__(self) -> None:
        require(
            self.architecture in ARCHITECTURES,
            f"architecture={self.architecture} is unknown"
            f"{suggestion(self.architecture, list(ARCHITECTURES))}; "
            f"there are {', '.join(ARCHITECTURES)}",
        )
        require_at_least(self, 1, "n_layer", "n_head", "n_embd", "block_size", "window")
        ARCHITECTURES[self.architecture].check(self)
        require(
            self.vocab_size >= tokenizer.VOCAB_SIZE,
            f"vocab_size={self.vocab_size} is smaller than the tokeniser's "
            f"{tokenizer.VOCAB_SIZE}; use 50304",
        )
        require(0 <= self.dropout < 1, f"dropout={self.dropout} must be at least 0 and less than 1")


@dataclass(frozen=True)
class Architecture:
    """What is known of an architecture without building it, and where it is built."""

    model: str
    """`module:class`, of a LanguageModel"""
    check: Callable[[ModelConfig], None]
    """raises ConfigError for sizes that it cannot have"""
    parameters: Callable[[ModelConfig], int]
    """how many; the output head shares the token embedding"""
    look_ups: Callable[[ModelConfig], int]
    """those of them that are in no matrix product"""
    attends: bool
    """whether each token looks at all before it"""


def _require_whole_heads(model: ModelConfig) -> None:
    require(
        model.n_embd % model.n_head == 0,
        f"n_embd={model.n_embd} is not a multiple of n_head={model.n_head}; "
        f"nearest: {nearest_multiples(model.n_embd, model.n_head)}",
    )


def _require_even_heads(model: ModelConfig) -> None:
    pairs = 2 * model.n_head
    require(
        model.n_embd % pairs == 0,
        f"n_embd={model.n_embd} is not a multiple of 2 × n_head={pairs}: rotary positions need "
        f"heads of even width; nearest: {nearest_multiples(model.n_embd, pairs)}",
    )


def _require_window_in_context(model: ModelConfig) -> None:
    require(
        model.window <= model.block_size,
        f"window={model.window} is more than block_size={model.block_size}; "
        f"use --window {model.block_size} or less",
    )


def _gpt2_parameters(model: ModelConfig) -> int:
    width, layers = model.n_embd, model.n_layer
    matrices = 12 * width * width * layers
    norms = (2 * layers + 1) * width
    biases = (layers * (9 + 2) + 1) * width if model.bias else 0
    return model.vocab_size * width + model.block_size * width + matrices + norms + biases


def _modern_parameters(model: ModelConfig) -> int:
    return model.vocab_size * model.n_embd + 12 * model.n_embd * model.n_embd * model.n_layer


def _mlp_parameters(model: ModelConfig) -> int:
    width, layers = model.n_embd, model.n_layer
    matrices = (model.window + 8 * layers) * width * width
    norms = (layers + 1) * width
    biases = (1 + 5 * layers) * width + norms if model.bias else 0
    return model.vocab_size * width + matrices + norms + biases


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        model="gpt2.model.gpt2:GPT2",
        check=_require_whole_heads,
        parameters=_gpt2_parameters,
        look_ups=lambda model: model.block_size * model.n_embd,  # positions
        attends=True,
    ),
    "modern": Architecture(
        model="gpt2.model.modern:Modern",
        check=_require_even_heads,
        parameters=_modern_parameters,
        look_ups=lambda _: 0,
        attends=True,
    ),
    "mlp": Architecture(
        model="gpt2.model.mlp:MLP",
        check=_require_window_in_context,
        parameters=_mlp_parameters,
        look_ups=lambda _: 0,
        attends=False,
    ),
}
