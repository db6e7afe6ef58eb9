"""The flags of a model, their valid values, and the table of architectures. Pure.

A new architecture is a file in `gpt2.model` and an entry of ARCHITECTURES.
"""

from collections.abc import Callable
from dataclasses import dataclass

from gpt2.base.validation import nearest_multiples, require, require_within, suggestion
from gpt2.data import tokenizer

VOCABULARY_STEP = 128
"""a matrix product is fast where its sizes are multiples of it"""


MODERN_FLAGS = (
    "zero_init",
    "untied_head",
    "logit_softcap",
    "value_embeddings",
    "embedding_skip",
    "layer_skip",
    "sliding_window",
)
VALUE_GATE_WIDTH = 32
WHOLE_CONTEXT_EVERY = 4
"""with a sliding window, every fourth block sees the whole context"""


def padded(tokens: int) -> int:
    """Rows of an embedding for this many tokens: 50304 for the 50257 of GPT-2."""
    return -(-tokens // VOCABULARY_STEP) * VOCABULARY_STEP


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
    vocab_size: int | None = None
    """rows of the embedding; None is the tokens of the data's tokenizer, padded to a multiple of
    128: 50304 for GPT-2's 50257"""
    block_size: int = 1024
    """context length in tokens"""
    window: int = 16
    """mlp: tokens that each position sees, including its own"""
    dropout: float = 0.0
    """dropout probability; pretraining needs none"""
    bias: bool = True
    """biases in linear layers and layer norms, as in GPT-2; modern never has any"""
    zero_init: bool = False
    """modern: matrices that write to the residual stream begin at zero"""
    untied_head: bool = False
    """modern: the output head has weights of its own"""
    logit_softcap: float | None = None
    """modern: logits z become softcap · tanh(z / softcap); None is no cap"""
    value_embeddings: bool = False
    """modern: every second block, the last one included, adds an embedding of the token to its
    values"""
    embedding_skip: bool = False
    """modern: every block also reads the embedding of the token"""
    layer_skip: bool = False
    """modern: late blocks also read the output of early ones"""
    sliding_window: int | None = None
    """modern: tokens that a block sees, including its own; every fourth block and the last one see
    the whole context, as all do with None"""

    def __post_init__(self) -> None:
        require(
            self.architecture in ARCHITECTURES,
            f"architecture={self.architecture} is unknown"
            f"{suggestion(self.architecture, list(ARCHITECTURES))}; "
            f"expected one of {', '.join(ARCHITECTURES)}",
        )
        require_within(self, 1, 10_000, "n_layer")
        require_within(self, 1, 10**6, "n_head", "n_embd")
        require_within(self, 1, 10**9, "block_size", "window")
        require_within(self, 1, 10**4, "logit_softcap")
        require_within(self, 1, 10**9, "sliding_window")
        _require_flags_of_architecture(self)
        ARCHITECTURES[self.architecture].check(self)
        require_within(self, 1, 10**9, "vocab_size")
        require(
            0 <= self.dropout < 1, f"dropout={self.dropout} is invalid; expected 0 <= dropout < 1"
        )

    @property
    def embedding_rows(self) -> int:
        """`vocab_size`; as for GPT-2's tokens while the data is not known."""
        return self.vocab_size or padded(tokenizer.VOCAB_SIZE)

    def window_of(self, layer: int) -> int | None:
        """Tokens that a block sees; None is the whole context."""
        sees_all = (layer + 1) % WHOLE_CONTEXT_EVERY == 0 or layer == self.n_layer - 1
        return None if sees_all else self.sliding_window

    @property
    def value_layers(self) -> range:
        """Blocks with value embeddings."""
        first = (self.n_layer - 1) % 2
        return range(first, self.n_layer if self.value_embeddings else 0, 2)

    @property
    def value_gate_width(self) -> int:
        """Elements of a block's input that the gates of its value embeddings read."""
        return min(VALUE_GATE_WIDTH, self.n_embd)


@dataclass(frozen=True)
class Architecture:
    """An entry of the table: the model class, and numbers that are known without building it."""

    model: str
    """`module:class` of the LanguageModel"""
    check: Callable[[ModelConfig], None]
    """raises ConfigError for sizes that the architecture does not support"""
    parameters: Callable[[ModelConfig], int]
    """number of weights"""
    look_ups: Callable[[ModelConfig], int]
    """number of weights that are not part of a matrix product"""
    attends: bool
    """whether each token attends to all tokens before it"""
    hidden_matrices: Callable[[ModelConfig], list[tuple[int, int]]] = lambda _: []
    """rows and columns of each matrix between embedding and head; without them, Muon's memory is
    estimated as AdamW's"""


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


def _require_flags_of_architecture(model: ModelConfig) -> None:
    used = [name for name in MODERN_FLAGS if getattr(model, name)]
    numbers = ("logit_softcap", "sliding_window")
    off = " ".join(f"--{name} None" if name in numbers else f"--no_{name}" for name in used)
    require(
        not used or model.architecture == "modern",
        f"{', '.join(used)}: only architecture=modern has such parts, got "
        f"architecture={model.architecture}; use --architecture modern, or {off}",
    )


def _require_shape_of_modern(model: ModelConfig) -> None:
    _require_even_heads(model)
    if model.sliding_window is not None:
        _require_in_context(model, "sliding_window")
        require(
            model.n_layer > 1,
            f"sliding_window={model.sliding_window} has no effect with n_layer=1: the last block "
            "sees the whole context; use --sliding_window None",
        )


def _require_in_context(model: ModelConfig, name: str) -> None:
    window = getattr(model, name)
    require(
        window <= model.block_size,
        f"{name}={window} is larger than block_size={model.block_size}; "
        f"use --{name} {model.block_size} or less",
    )


def _of_block(width: int) -> list[tuple[int, int]]:
    return [(3 * width, width), (width, width), *_of_feed_forward(width)]


def _of_feed_forward(width: int) -> list[tuple[int, int]]:
    return [(4 * width, width), (width, 4 * width)]


def _gpt2_parameters(model: ModelConfig) -> int:
    width, layers = model.n_embd, model.n_layer
    matrices = 12 * width * width * layers
    norms = (2 * layers + 1) * width
    biases = (layers * (9 + 2) + 1) * width if model.bias else 0
    return model.embedding_rows * width + model.block_size * width + matrices + norms + biases


def _modern_parameters(model: ModelConfig) -> int:
    gates = len(model.value_layers) * model.value_gate_width * model.n_head
    matrices = 12 * model.n_embd * model.n_embd * model.n_layer + gates
    scales = 2 * model.n_layer * model.embedding_skip + model.n_layer // 2 * model.layer_skip
    head = model.embedding_rows * model.n_embd
    return _modern_look_ups(model) + head + matrices + scales


def _modern_matrices(model: ModelConfig) -> list[tuple[int, int]]:
    gates = [(model.n_head, model.value_gate_width)] * len(model.value_layers)
    return _of_block(model.n_embd) * model.n_layer + gates


def _modern_look_ups(model: ModelConfig) -> int:
    tables = model.untied_head + len(model.value_layers)
    return tables * model.embedding_rows * model.n_embd


def _mlp_parameters(model: ModelConfig) -> int:
    width, layers = model.n_embd, model.n_layer
    matrices = (model.window + 8 * layers) * width * width
    norms = (layers + 1) * width
    biases = (1 + 5 * layers) * width + norms if model.bias else 0
    return model.embedding_rows * width + matrices + norms + biases


def _mlp_matrices(model: ModelConfig) -> list[tuple[int, int]]:
    first = (model.n_embd, model.window * model.n_embd)
    return [first, *_of_feed_forward(model.n_embd) * model.n_layer]


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        model="gpt2.model.gpt2:GPT2",
        check=_require_whole_heads,
        parameters=_gpt2_parameters,
        look_ups=lambda model: model.block_size * model.n_embd,  # positions
        attends=True,
        hidden_matrices=lambda model: _of_block(model.n_embd) * model.n_layer,
    ),
    "modern": Architecture(
        model="gpt2.model.modern:Modern",
        check=_require_shape_of_modern,
        parameters=_modern_parameters,
        look_ups=_modern_look_ups,
        attends=True,
        hidden_matrices=_modern_matrices,
    ),
    "mlp": Architecture(
        model="gpt2.model.mlp:MLP",
        check=lambda model: _require_in_context(model, "window"),
        parameters=_mlp_parameters,
        look_ups=lambda _: 0,
        attends=False,
        hidden_matrices=_mlp_matrices,
    ),
}
