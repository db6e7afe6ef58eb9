"""Arithmetic of a run: FLOPs, utilisation, parameters, time. Pure."""

import re

from gpt2.config.model import ARCHITECTURES, ModelConfig

# Dense bfloat16 matrix rate per GPU in FLOP/s, from the makers' data sheets. Longer names first:
# the first one that occurs in the device's name counts.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 150e12,
    "A6000": 155e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 4080": 97e12,
    "RTX 3090": 71e12,
    "RTX 3080": 60e12,
}


def parameter_count(model: ModelConfig) -> int:
    """Weights of the model; the output head shares the token embedding."""
    return ARCHITECTURES[model.architecture].parameters(model)


def state_bytes(model: ModelConfig) -> int:
    """Bytes of a checkpoint, random states aside: float32 weights and AdamW's two moments."""
    return 3 * 4 * parameter_count(model)


def flops_per_token(model: ModelConfig) -> float:
    """FLOPs of forward and backward for one token.

    6 per weight that takes part in a matrix product, and, where there is attention, 12 · layers ·
    width · context for it (Chowdhery et al. 2022, PaLM, appendix B). The position embedding is a
    look-up and does not count; the token embedding does, as the output head. Norms and rotations
    are left out, as there.
    """
    facts = ARCHITECTURES[model.architecture]
    attention = 12.0 * model.n_layer * model.n_embd * model.block_size if facts.attends else 0.0
    return 6.0 * (facts.parameters(model) - facts.look_ups(model)) + attention


def mfu(tokens_per_s: float, model: ModelConfig, peak_flops: float) -> float:
    """Model FLOPs utilisation: the share of `peak_flops` (FLOP/s of all devices) that is used."""
    return tokens_per_s * flops_per_token(model) / peak_flops


def known_peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by its name, or None if the table lacks it."""
    return next(
        (rate for name, rate in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None
    )


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
