"""Muon, an optimiser for matrices, with AdamW for everything else."""

import inspect

import torch

from gpt2.config.run import OptimConfig
from gpt2.model.base import LanguageModel
from gpt2.optim.adamw import AdamW, Uncompiled, adamw_of, build_adamw
from gpt2.optim.combined import CombinedOptimizer


class Muon(Uncompiled, torch.optim.Muon):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) by torch's implementation."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Muon.step))


def build_muon(model: LanguageModel, config: OptimConfig) -> AdamW | CombinedOptimizer:
    """Muon for the matrices between embedding and head, and AdamW for the rest.

    Muon's updates are scaled to the size of AdamW's, so that both have the same learning rate and
    decay (Liu et al. 2025, arXiv:2502.16982, eq. 4). A model without hidden matrices gets AdamW.
    """
    hidden = list(model.hidden_matrices())
    if not hidden:
        return build_adamw(model, config)
    muon = Muon(
        hidden,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    taken = {id(part) for part in hidden}
    others = (part for part in model.parameters() if id(part) not in taken)
    return CombinedOptimizer([muon, adamw_of(others, config)])
