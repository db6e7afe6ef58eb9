"""Loss scaling for float16, whose smallest numbers are larger than many gradients.

The loss is multiplied by a scale before the backward pass, and the gradients are divided by it
before they are used (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2). A scale that is too
large makes gradients infinite: such an update is left out, and the scale is halved.
"""

import math

import torch
from torch import Tensor

# The defaults of torch.amp.GradScaler, which would read all gradients once more.
INITIAL_SCALE = 2.0**16
GROWTH_FACTOR = 2.0
BACKOFF_FACTOR = 0.5
GROWTH_INTERVAL = 2000
"""updates in a row without overflow after which the scale grows"""
SMALLEST_SCALE = 1.0
"""at this scale, gradients that are not finite have another cause; GradScaler has no such limit"""


def is_too_large(scale: float | None, loss: float, norm: float) -> bool:
    """Whether the scale of an update (None: the loss is not scaled) may be why its gradients are
    not finite: not if the loss itself is not finite, nor at the smallest scale."""
    has_overflow = math.isfinite(loss) and not math.isfinite(norm)
    return scale is not None and scale > SMALLEST_SCALE and has_overflow


class LossScale:
    """The scale of the loss, on the device: the host never waits. It is a power of two, so that
    scaling rounds nothing. For types other than float16 there is none, and nothing is scaled."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.scale: Tensor | None = None
        """float32 scalar; None if the loss is not scaled"""
        self._steps = torch.zeros((), dtype=torch.int32, device=device)
        """updates without overflow since the scale changed"""
        if dtype is torch.float16:
            self.scale = torch.full((), INITIAL_SCALE, device=device)

    def times(self, factor: float) -> float | Tensor:
        """What to multiply the loss by before it is differentiated, in place of `factor`."""
        return factor if self.scale is None else factor * self.scale

    def unscaled(self, norm: Tensor) -> Tensor:
        """The norm of the gradients, from that of the scaled ones."""
        return norm if self.scale is None else norm / self.scale

    def update(self, norm: Tensor) -> Tensor:
        """Adapts the scale to an update with this gradient norm, which is the same on all ranks.

        Returns the scale that this update had, 0 if the loss is not scaled; a scalar on the device.
        """
        if self.scale is None:
            return torch.zeros_like(norm)
        before = self.scale.to(norm.dtype, copy=True)
        found_inf = norm.isfinite().logical_not().float()
        torch._amp_update_scale_(
            self.scale, self._steps, found_inf, GROWTH_FACTOR, BACKOFF_FACTOR, GROWTH_INTERVAL
        )
        self.scale.clamp_(min=SMALLEST_SCALE)
        return before

    def state_dict(self) -> dict[str, Tensor]:
        """Empty if the loss is not scaled."""
        return {} if self.scale is None else {"scale": self.scale, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes a scale over; begins with INITIAL_SCALE if `state` is empty."""
        if self.scale is not None and state:
            self.scale.copy_(state["scale"])
            self._steps.copy_(state["steps"])
