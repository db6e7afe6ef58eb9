"""The optimiser of a run, by the name that its configuration gives."""

import importlib
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gpt2.config.run import OPTIMIZERS, OptimConfig
from gpt2.model.base import LanguageModel


class TrainOptimizer(Protocol):
    """What training needs of an optimiser. `CombinedOptimizer([…])` makes one of any of torch's."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def clip_and_step(
        self,
        norm: Tensor,
        max_norm: float | None,
        is_finite: Tensor,
        scale: Tensor | None = None,
    ) -> None:
        """Divides the gradients by `scale` (None: 1), which makes their L2 norm `norm`; clips them
        to `max_norm` (None: no clipping), and updates the weights. Leaves weights and moments as
        they are unless `is_finite`."""
        ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def build_optimizer(model: LanguageModel, config: OptimConfig) -> TrainOptimizer:
    """The optimiser that `config` names."""
    module, name = OPTIMIZERS[config.optimizer].split(":")
    optimizer: TrainOptimizer = getattr(importlib.import_module(module), name)(model, config)
    return optimizer


def set_options(optimizer: TrainOptimizer, config: OptimConfig) -> None:
    """Sets the options of `config` again after a state was loaded, which brings its own along."""
    for group in optimizer.param_groups:
        if any(part.dim() >= 2 for part in group["params"]):
            group["weight_decay"] = config.weight_decay / group.get("lr_ratio", 1.0)
        if "betas" in group:
            group["betas"] = (config.beta1, config.beta2)


def set_learning_rate(optimizer: TrainOptimizer, rate: float) -> None:
    """Sets the rate of every parameter group, whose ratio it is multiplied by."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)


def gradient_norm(model: nn.Module) -> Tensor:
    """The global L2 norm of the gradients, a scalar on their device."""
    return torch.nn.utils.get_total_norm(
        [part.grad for part in model.parameters() if part.grad is not None]
    )
