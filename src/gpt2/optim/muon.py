"""Muon, an optimiser for matrices.

Shapes: K matrices of M rows and N columns, in a stack of equal shape.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt2.optim.adamw import zero_gradients

MOMENTUM, FIRST_MOMENTUM = 0.95, 0.85
RMS_OF_ADAMW = 0.2
"""root mean square of an update of AdamW (Liu et al. 2025, arXiv:2502.16982, section 2.2)"""
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""coefficients of x, x³ and x⁵ in five iterations, for singular values from 0.001 on (Amsel et al.
2025, arXiv:2505.16932)"""
MARGIN = 1.02
"""by which the norm is overestimated: products in bfloat16 are inexact, and beyond 1 they grow"""
NEURON_BETA2 = 0.95
"""decay of the mean squares by neuron (Li et al. 2025, arXiv:2510.05491, section 4)"""
SMALLEST_ROOT = 1e-8
PRODUCTS = {"cuda": torch.bfloat16}
"""type of the orthogonalisation's matrix products by device, else float32"""


class Muon:
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) with Nesterov momentum.

    Its updates are scaled to the size of AdamW's, so that both have the same learning rate and
    decay (Liu et al. 2025, arXiv:2502.16982, eq. 4).

    With `beta2`, the part of an update that belongs to a neuron is divided by the root of the mean
    of its squares over the updates so far (NorMuon, Li et al. 2025, arXiv:2510.05491, algorithm 1).
    A neuron is a row of a tall matrix or, as in modded-nanogpt, a column of a wide one. With
    `is_cautious`, only those weights decay that the update moves towards zero (Chen et al. 2025,
    arXiv:2510.12402).

    With `momentum_warmup`, the momentum is lower in so many first updates: gradients change faster
    then than later on.

    Where torch.distributed has several ranks, each of them has the momentum of a share of the
    matrices, and updates these; then all of them gather the weights. Gradients are the same on all
    ranks. The host never waits for the device.
    """

    def __init__(
        self,
        weights: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        beta2: float | None = None,
        is_cautious: bool = False,
        momentum_warmup: int = 0,
    ) -> None:
        matrices = list(weights)
        self.param_groups: list[dict[str, Any]] = [
            {"params": matrices, "lr": lr, "weight_decay": weight_decay, "step": 0}
        ]
        self._beta2, self._is_cautious = beta2, is_cautious
        self._momentum_warmup = momentum_warmup
        by_shape: dict[torch.Size, list[int]] = {}
        for number, matrix in enumerate(matrices):
            by_shape.setdefault(matrix.shape, []).append(number)
        self._stacks = [_Stack(matrices, numbers) for numbers in by_shape.values()]

    @torch.no_grad()
    def clip_and_step(
        self,
        norm: Tensor,
        max_norm: float | None,
        is_finite: Tensor,
        scale: Tensor | None = None,
    ) -> None:
        """As `TrainOptimizer.clip_and_step`."""
        divisor = torch.ones_like(norm) if max_norm is None else (norm / max_norm).clamp(min=1)
        if scale is not None:
            divisor = divisor * scale
        self._step(divisor.float(), is_finite)

    @torch.no_grad()
    def step(self) -> None:
        """An update from the gradients as they are."""
        one = torch.ones((), device=self.param_groups[0]["params"][0].device)
        self._step(one, one.bool())

    def zero_grad(self, set_to_none: bool = True) -> None:
        zero_gradients(self.param_groups[0]["params"], set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As torch's Muon has it, the same on every rank; every rank calls it."""
        (group,) = self.param_groups
        moments: dict[int, dict[str, Tensor]] = {}
        for stack in self._stacks:
            for name, share in self._kept(stack).items():
                (whole,) = _gathered([share])
                if whole is not share:
                    whole = whole.cpu()  # a device may have no room for all of them
                for number, moment in zip(stack.numbers, whole, strict=False):
                    moments.setdefault(number, {})[name] = moment
        options = {name: value for name, value in group.items() if name != "params"}
        return {
            "state": dict(sorted(moments.items())),
            "param_groups": [{**options, "params": list(range(len(group["params"])))}],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the moments of this rank's share, also out of a state of torch's Muon, which is
        empty before the first update."""
        for stack in self._stacks:
            for name, share in self._kept(stack).items():
                for moment, number in zip(share, stack.own, strict=False):
                    if number in state["state"]:
                        moment.copy_(state["state"][number][name])
                    else:
                        moment.zero_()
        (options,) = state["param_groups"]
        for name in ("lr", "weight_decay"):
            self.param_groups[0][name] = options[name]
        # A state without the number of its updates is from before there was a warm-up.
        self.param_groups[0]["step"] = options.get("step", self._momentum_warmup)

    def _step(self, divisor: Tensor, is_finite: Tensor) -> None:
        (group,) = self.param_groups
        group["step"] += 1
        applied = is_finite.float()
        updated = [self._updated(stack, group, divisor, applied) for stack in self._stacks]
        for stack, matrices in zip(self._stacks, _gathered(updated), strict=True):
            torch._foreach_copy_(stack.weights, list(matrices[: len(stack.weights)]))

    def _kept(self, stack: "_Stack") -> dict[str, Tensor]:
        """The moments of this rank's share of a stack, by their names in a state."""
        kept = {"momentum_buffer": stack.momentum}
        return kept if self._beta2 is None else {**kept, "exp_avg_sq": stack.squares}

    def _updated(
        self, stack: "_Stack", group: Mapping[str, Any], divisor: Tensor, applied: Tensor
    ) -> Tensor:
        """This rank's share of the matrices after the update, (places, M, N). The gradients are
        divided by `divisor`; where `applied` is 0, nothing changes, else it is 1."""
        found = torch.empty_like(stack.momentum)
        if not stack.own:
            return found
        count = len(stack.own)
        gradients_KMN = torch.stack([_gradient(weight) for weight in stack.own_weights]) / divisor
        gradients_KMN = torch.where(applied.bool(), gradients_KMN, 0.0)
        momentum = momentum_at(group["step"], self._momentum_warmup)
        momentum_KMN = stack.momentum[:count]
        momentum_KMN.lerp_(gradients_KMN, (1 - momentum) * applied)
        nesterov_KMN = gradients_KMN.lerp_(momentum_KMN, momentum)
        directions_KMN = _orthogonalise(nesterov_KMN.device.type)(nesterov_KMN)
        if self._beta2 is not None:
            directions_KMN = normalised_by_neuron(
                directions_KMN, stack.squares[:count], (1 - self._beta2) * applied
            )
        weights_KMN = torch.stack(stack.own_weights)
        decay: Tensor = group["lr"] * group["weight_decay"] * applied
        if self._is_cautious:
            decay = decay * (weights_KMN * directions_KMN >= 0)
        size = RMS_OF_ADAMW * max(nesterov_KMN.shape[1:]) ** 0.5
        weights_KMN.mul_(1 - decay).sub_(directions_KMN * (group["lr"] * size * applied))
        found[:count] = weights_KMN
        return found


class _Stack:
    """Matrices of equal shape, and this rank's share of them.

    Every rank's share has as many places as the largest; what it has too many is never used.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], numbers: Sequence[int]) -> None:
        ranks, rank = _ranks()
        places = -(-len(numbers) // ranks)
        self.numbers = numbers
        """of all matrices of the stack, among those of the optimiser"""
        self.own = numbers[rank * places : (rank + 1) * places]
        self.weights: list[Tensor] = [matrices[number] for number in numbers]
        self.own_weights: list[Tensor] = [matrices[number] for number in self.own]
        rows, columns = self.weights[0].shape
        self.momentum = self.weights[0].new_zeros(places, rows, columns)
        by_neuron = (rows, 1) if rows >= columns else (1, columns)
        self.squares = self.weights[0].new_zeros(places, *by_neuron)
        """mean squares of each neuron's part of the directions"""


def momentum_at(update: int, warmup: int) -> float:
    """The momentum of an update, the first one of which is 1: it grows in a line over `warmup`
    updates (modded-nanogpt)."""
    if update >= warmup:
        return MOMENTUM
    return FIRST_MOMENTUM + (MOMENTUM - FIRST_MOMENTUM) * update / warmup


def normalised_by_neuron(directions_KMN: Tensor, squares: Tensor, weight: Tensor) -> Tensor:
    """Directions whose neurons have been divided by the root of their mean squares, which take up
    these directions with `weight`; each matrix gets the norm of an orthogonal one."""
    axis = 1 if squares.size(1) == 1 else 2
    squares.lerp_(directions_KMN.square().mean(axis, keepdim=True), weight)
    found: Tensor = directions_KMN / squares.sqrt().clamp(min=SMALLEST_ROOT)
    norms_K11 = torch.linalg.matrix_norm(found, keepdim=True)
    found *= min(found.shape[1:]) ** 0.5 / norms_K11.clamp(min=SMALLEST_ROOT)
    return found


def orthogonalised(matrices_KMN: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Nearly U·Vᵀ of each matrix U·S·Vᵀ, by matrix products of `dtype`; 0 of a matrix of zeros.

    In the dtype of `matrices_KMN`. Singular values from 0.002 of the norm on become 0.86 to 1.14.
    """
    norms_K11 = torch.linalg.matrix_norm(matrices_KMN, keepdim=True)
    found: Tensor = (matrices_KMN / (norms_K11 * MARGIN).clamp(min=1e-30)).to(dtype)
    is_tall = found.size(1) > found.size(2)
    if is_tall:
        found = found.mT
    for a, b, c in POLAR_EXPRESS:
        squares = found @ found.mT
        polynomial = torch.baddbmm(squares, squares, squares, beta=b, alpha=c)
        found = torch.baddbmm(found, polynomial, found, beta=a)
    return (found.mT if is_tall else found).to(matrices_KMN.dtype)


@functools.cache
def _orthogonalise(device: str) -> Callable[[Tensor], Tensor]:
    if device not in PRODUCTS:
        return orthogonalised
    on_device = functools.partial(orthogonalised, dtype=PRODUCTS[device])
    compiled: Callable[[Tensor], Tensor] = torch.compile(on_device, dynamic=False)
    return compiled


def _gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _ranks() -> tuple[int, int]:
    """How many ranks there are, and the number of this one."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def _gathered(shares: Sequence[Tensor]) -> list[Tensor]:
    """The shares (places, M, N) of all ranks, one after the other, by one collective."""
    ranks, _ = _ranks()
    if ranks == 1:
        return list(shares)
    own = torch.cat([share.flatten() for share in shares])
    of_all = own.new_empty(ranks, len(own))
    # Its name before torch 2.13, where that is deprecated.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(of_all.view(-1), own)
    ends = itertools.accumulate(share.numel() for share in shares)
    return [
        of_all[:, end - share.numel() : end].reshape(-1, *share.shape[1:])
        for share, end in zip(shares, ends, strict=True)
    ]
