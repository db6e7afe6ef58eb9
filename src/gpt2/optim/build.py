"""The optimiser and its parameter groups."""

import torch
from torch import Tensor, nn

from gpt2.config.run import OptimConfig
from gpt2.model.base import LanguageModel
from gpt2.optim.adamw import AdamW
from gpt2.optim.combined import CombinedOptimizer
from gpt2.optim.muon import Muon


def build_optimizer(model: LanguageModel, config: OptimConfig) -> AdamW | CombinedOptimizer:
    """The optimiser that `config` names. Matrices and embeddings have weight decay, vectors do not.

    With `muon`, Muon trains the matrices between embedding and head, and AdamW the rest. Muon's
    updates are scaled to the size of AdamW's, so that both have the same learning rate and decay
    (Liu et al. 2025, arXiv:2502.16982, eq. 4).
    """
    hidden = [] if config.optimizer == "adamw" else list(model.hidden_matrices())
    taken = {id(part) for part in hidden}
    others = [part for part in model.parameters() if part.requires_grad and id(part) not in taken]
    groups = [
        {
            "params": [part for part in others if part.dim() >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [part for part in others if part.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=1e-8, fused=True
    )
    if not hidden:
        return adamw
    muon = Muon(
        hidden,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return CombinedOptimizer([muon, adamw])


def set_options(optimizer: AdamW | CombinedOptimizer, config: OptimConfig) -> None:
    """Sets the options of `config` again after a state was loaded, which brings its own along."""
    for group in optimizer.param_groups:
        if any(part.dim() >= 2 for part in group["params"]):
            group["weight_decay"] = config.weight_decay
        if "betas" in group:
            group["betas"] = (config.beta1, config.beta2)


def set_learning_rate(optimizer: AdamW | CombinedOptimizer, rate: float) -> None:
    """Sets the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def gradient_norm(model: nn.Module) -> Tensor:
    """The global L2 norm of the gradients, a scalar on their device."""
    return torch.nn.utils.get_total_norm(
        [part.grad for part in model.parameters() if part.grad is not None]
    )
