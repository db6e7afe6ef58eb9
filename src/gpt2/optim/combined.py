"""Several optimisers, each of other weights, as one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class CombinedOptimizer:
    """Several optimisers, each of other weights, with one state."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def clip_and_step(
        self,
        norm: Tensor,
        max_norm: float | None,
        is_finite: Tensor,
        scale: Tensor | None = None,
    ) -> None:
        """As `TrainOptimizer.clip_and_step`, but the host waits for the device: torch's optimisers
        can neither scale gradients nor skip a step."""
        if is_finite:
            weights = [part for group in self.param_groups for part in group["params"]]
            if scale is not None:
                gradients = [part.grad for part in weights if part.grad is not None]
                torch._foreach_div_(gradients, scale)
            if max_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(weights, max_norm, norm)
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
