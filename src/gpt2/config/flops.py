"""Numbers of a run: parameters, bytes, FLOPs, utilisation, durations. Pure."""

from collections import Counter

from gpt2.config.model import ARCHITECTURES, ModelConfig


def parameter_count(model: ModelConfig) -> int:
    """Number of weights."""
    return ARCHITECTURES[model.architecture].parameters(model)


def state_bytes(model: ModelConfig, optimizer: str) -> int:
    """Bytes of a checkpoint without random states: float32 weights and the optimiser's moments."""
    return 4 * parameter_count(model) + sum(moment_bytes(model, optimizer))


def training_bytes(model: ModelConfig, optimizer: str) -> int:
    """Bytes of weights, gradients and moments."""
    return state_bytes(model, optimizer) + 4 * parameter_count(model)


def moment_bytes(model: ModelConfig, optimizer: str, ranks: int = 1) -> tuple[int, int]:
    """Bytes of the moments of Muon, of which each of `ranks` has its share, and of AdamW, whole.

    AdamW has two of each weight, Muon one of each weight of a hidden matrix; NorMuon also has one
    of each neuron.
    """
    hidden = ARCHITECTURES[model.architecture].hidden_matrices(model)
    if optimizer not in ("muon", "normuon"):
        hidden = []
    weights = sum(rows * columns for rows, columns in hidden)
    muon = 0
    for shape, count in Counter(hidden).items():
        neurons = max(shape) if optimizer == "normuon" else 0
        muon += 4 * -(-count // ranks) * (shape[0] * shape[1] + neurons)
    return muon, 8 * (parameter_count(model) - weights)


def flops_per_token(model: ModelConfig) -> float:
    """FLOPs of forward and backward for one token.

    6 per weight of a matrix product, plus 12 · width · context for the attention of each layer
    (Chowdhery et al. 2022, PaLM, appendix B), whose context is that of its window. A token
    embedding that is also the output head counts. What is looked up, as position embeddings are,
    norms and rotations do not count.
    """
    architecture = ARCHITECTURES[model.architecture]
    seen = sum(
        model.window_of(layer) or model.block_size
        for layer in range(model.n_layer if architecture.attends else 0)
    )
    weights = architecture.parameters(model) - architecture.look_ups(model)
    return 6.0 * weights + 12.0 * model.n_embd * seen


def mfu(tokens_per_s: float, model: ModelConfig, peak_flops: float) -> float:
    """Model FLOPs utilisation: the used share of `peak_flops`, the FLOP/s of all devices."""
    return tokens_per_s * flops_per_token(model) / peak_flops


def duration(seconds: float) -> str:
    """`8d 21h`, `3h 05m`, `4m 10s` or `7s`: the two largest units."""
    total = max(0, round(seconds))
    days, hours, minutes = total // 86400, total // 3600 % 24, total // 60 % 60
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    if minutes:
        return f"{minutes}m {total % 60:02d}s"
    return f"{total}s"
