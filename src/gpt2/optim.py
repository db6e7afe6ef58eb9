"""The optimiser and its parameter groups."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt2.config import OptimConfig
from gpt2.model.base import LanguageModel


class _Uncompiled:
    """torch's optimiser without the wrappers that load torch.compile's machinery: two seconds of
    work for each process, at the first update, for an optimiser that is never compiled."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


class AdamW(_Uncompiled, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    waits = False
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def update(self, norm: Tensor, largest_norm: float | None, is_good: Tensor) -> None:
        """Steps with gradients, whose norm is given, scaled down to `largest_norm`; leaves all as
        it is unless `is_good`. Its kernel does both on the way, as for a GradScaler: there is no
        pass over the gradients for that, and the host does not wait for the device."""
        self.found_inf = is_good.logical_not().float()
        if largest_norm is not None:
            self.grad_scale = (norm / largest_norm).clamp(min=1).float()
        self.step()
        self.found_inf = self.grad_scale = None


class Muon(_Uncompiled, torch.optim.Muon):
    step = torch.no_grad()(inspect.unwrap(torch.optim.Muon.step))


class Together:
    """Several optimisers of different weights as one, with one state."""

    waits = True
    """whether an update waits for the device"""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def update(self, norm: Tensor, largest_norm: float | None, is_good: Tensor) -> None:
        """As AdamW's. Muon knows neither a scale nor a step that is left out: the host waits."""
        if is_good:
            if largest_norm is not None:
                weights = [part for group in self.param_groups for part in group["params"]]
                torch.nn.utils.clip_grads_with_norm_(weights, largest_norm, norm)
            for part in self.parts:
                part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {type(part).__name__: part.state_dict() for part in self.parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part in self.parts:
            part.load_state_dict(state[type(part).__name__])


def build(model: LanguageModel, config: OptimConfig) -> AdamW | Together:
    """AdamW (Loshchilov & Hutter 2019), fused; matrices and embeddings decay, vectors do not.

    With `optimizer` muon, Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) trains the
    matrices between embedding and head. Its updates are scaled to the size of AdamW's, so that both
    have the same learning rate and decay (Liu et al. 2025, arXiv:2502.16982, eq. 4).
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
    return Together([muon, adamw])


def set_options(optimizer: AdamW | Together, config: OptimConfig) -> None:
    """Sets what a loaded state would bring along from another configuration."""
    for group in optimizer.param_groups:
        if any(part.dim() >= 2 for part in group["params"]):
            group["weight_decay"] = config.weight_decay
        if "betas" in group:
            group["betas"] = (config.beta1, config.beta2)


def set_learning_rate(optimizer: AdamW | Together, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def gradient_norm(model: nn.Module) -> Tensor:
    """The global L2 norm of the gradients, a scalar on their device."""
    return torch.nn.utils.get_total_norm(
        [part.grad for part in model.parameters() if part.grad is not None]
    )
