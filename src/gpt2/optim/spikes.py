"""Finite divergence: updates whose loss or gradient norm is far above those before them."""

import torch
from torch import Tensor

LENGTH = 128
"""updates that the statistics are of"""
MIN_COUNT = LENGTH // 2
"""updates before which none is a spike"""
MIN_STD = 1e-6
"""least standard deviation, as a share of the mean: rounding makes no spike of equal updates"""
LIMIT_STD = 6.0
"""standard deviations above the mean that make a spike"""


class SpikeDetector:
    """Loss and gradient norm of the last LENGTH updates, on the device: the host never waits.

    A spike is above the mean of either by more than LIMIT_STD standard deviations (length and limit
    as in OLMo-core's `SkipStepOptimizer`).
    """

    def __init__(self, device: torch.device) -> None:
        self._window = torch.zeros((LENGTH, 2), dtype=torch.float64, device=device)
        """loss and gradient norm of each update; the rows beyond `_count` are not filled yet"""
        self._rows = torch.arange(LENGTH, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        """updates so far"""

    def add(self, numbers: Tensor, skip_spikes: bool) -> tuple[Tensor, Tensor]:
        """Whether an update with these `numbers`, its loss and its gradient norm, is to be applied,
        and whether it is a spike; boolean scalars on the device.

        It is not to be applied if a number is NaN or infinite, or if it is a spike and
        `skip_spikes` is set. Only applied updates enter the statistics.
        """
        is_finite = numbers.isfinite().all()
        filled = self._count.clamp(max=LENGTH)
        mean = self._window.sum(dim=0) / filled
        deviations = (self._window - mean) * (self._rows < filled).unsqueeze(1)
        std = (deviations.square().sum(dim=0) / (filled - 1)).sqrt()
        std = torch.maximum(std, MIN_STD * mean.abs())
        is_above = (numbers > mean + LIMIT_STD * std).any()
        is_spike = is_finite & is_above & (self._count >= MIN_COUNT)
        is_applied = is_finite & ~is_spike if skip_spikes else is_finite
        row = (self._count % LENGTH).view(1)
        entered = torch.where(is_applied, numbers, self._window[row])
        self._window.index_copy_(0, row, entered.view(1, 2))
        self._count += is_applied
        return is_applied, is_spike

    def state_dict(self) -> dict[str, Tensor]:
        return {"window": self._window, "count": self._count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._window.copy_(state["window"])
        self._count.copy_(state["count"])
