"""AdamW, which clips and leaves an update out on the device."""

import inspect

import torch
from torch import Tensor
from torch.optim import Optimizer


class Uncompiled:
    """torch's optimiser without the wrappers that load torch.compile's machinery: two seconds of
    work for each process, at the first update, for an optimiser that is never compiled."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


class AdamW(Uncompiled, torch.optim.AdamW):
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
