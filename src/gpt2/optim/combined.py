"""Several optimisers of different weights as one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


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
