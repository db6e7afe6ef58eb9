"""AdamW that clips the gradients, and leaves out an update that is not finite, on the device."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt2.config.run import OptimConfig
from gpt2.model.base import LanguageModel


class Uncompiled:
    """torch's optimiser without the wrappers that import torch.compile's machinery: that costs
    every process two seconds at its first update, and an optimiser is never compiled here."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


class AdamW(Uncompiled, torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) by torch's fused kernel."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def clip_and_step(
        self,
        norm: Tensor,
        max_norm: float | None,
        is_finite: Tensor,
        scale: Tensor | None = None,
    ) -> None:
        """As `TrainOptimizer.clip_and_step`.

        The fused kernel does all of it, as it does for a GradScaler: no extra pass over the
        gradients, and the host does not wait for the device.
        """
        self.found_inf, self.grad_scale = is_finite.logical_not().float(), scale
        if max_norm is not None:
            clipping = (norm / max_norm).clamp(min=1).float()
            self.grad_scale = clipping if scale is None else clipping * scale
        self.step()
        self.found_inf = self.grad_scale = None


def zero_gradients(weights: Iterable[Tensor], set_to_none: bool) -> None:
    """As `Optimizer.zero_grad`."""
    for weight in weights:
        if set_to_none:
            weight.grad = None
        elif weight.grad is not None:
            weight.grad.zero_()


def of_groups(groups: list[dict[str, Any]], config: OptimConfig) -> AdamW:
    """AdamW for some parameter groups."""
    return AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=1e-8,
        fused=True,
    )


def parameter_groups(
    model: LanguageModel, weights: Iterable[nn.Parameter], config: OptimConfig
) -> list[dict[str, Any]]:
    """The parameter groups of those weights of `model` that are trained: matrices and embeddings
    have weight decay, vectors do not.

    Weights with a learning rate of their own have `lr_ratio`, by which `config.learning_rate` is
    multiplied. It does not change how much of a weight decays in a step.
    """
    embeddings = {id(part) for part in model.embeddings()}
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for part in weights:
        ratio = 1.0
        if part.dim() < 2:
            ratio = config.scalar_lr_ratio
        elif id(part) in embeddings:
            ratio = config.embedding_lr_ratio
        elif part is model.head_weight:
            ratio = config.head_lr_ratio
        if part.requires_grad:
            groups.setdefault((part.dim() >= 2, ratio), []).append(part)
    return [
        {"params": parts, "weight_decay": config.weight_decay / ratio if decays else 0.0}
        | ({} if ratio == 1 else {"lr_ratio": ratio})
        for (decays, ratio), parts in groups.items()
    ]
