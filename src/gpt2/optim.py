"""The optimiser and its parameter groups."""

import inspect

import torch
from torch import nn
from torch.optim import Optimizer

from gpt2.config import OptimConfig


class AdamW(torch.optim.AdamW):
    """torch's, without the wrappers that load torch.compile's machinery: two seconds of work for
    each process, at the first update, for an optimiser that is never compiled."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def build(model: nn.Module, config: OptimConfig) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused; matrices and embeddings decay, vectors do not."""
    parameters = [part for part in model.parameters() if part.requires_grad]
    groups = [
        {
            "params": [part for part in parameters if part.dim() >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [part for part in parameters if part.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=1e-8, fused=True
    )


def set_options(optimizer: torch.optim.Optimizer, config: OptimConfig) -> None:
    """Sets what a loaded state would bring along from another configuration."""
    decayed, _ = optimizer.param_groups
    decayed["weight_decay"] = config.weight_decay
    for group in optimizer.param_groups:
        group["betas"] = (config.beta1, config.beta2)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip(model: nn.Module, largest_norm: float | None) -> torch.Tensor:
    """Scales the gradient down to `largest_norm`; returns its global L2 norm before."""
    limit = float("inf") if largest_norm is None else largest_norm
    return torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
