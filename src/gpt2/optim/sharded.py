"""AdamW whose moments are divided among the ranks: each updates its share of the weights, and sends
them to the others (ZeRO-1, Rajbhandari et al. 2020, arXiv:1910.02054, section 5.1)."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpt2.config.run import OptimConfig
from gpt2.optim import adamw

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""names in the state of torch's AdamW"""


class ShardedAdamW:
    """`AdamW`, bit by bit, of which each rank has the moments of some weights. Gradients are the
    same on all ranks. Its state is the same as that of `AdamW`.

    A weight belongs to one rank as a whole: the largest ones go first, each to the rank that has
    least.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], config: OptimConfig) -> None:
        self.param_groups = [dict(group) for group in groups]
        self._weights: list[Tensor] = [part for group in groups for part in group["params"]]
        ranks, self._rank = dist.get_world_size(), dist.get_rank()
        self._owners = owners([weight.numel() for weight in self._weights], ranks)
        numbers = itertools.count()
        own = [
            [part for part in group["params"] if self._owners[next(numbers)] == self._rank]
            for group in groups
        ]
        self._own = adamw.of_groups(
            [{**group, "params": some} for group, some in zip(groups, own, strict=True)], config
        )
        self._has_state = False
        """whether there are moments; all ranks agree"""
        for group, of_own in zip(self.param_groups, self._own.param_groups, strict=True):
            group.update({name: of_own[name] for name in of_own if name != "params"})

    @torch.no_grad()
    def clip_and_step(
        self,
        norm: Tensor,
        max_norm: float | None,
        is_finite: Tensor,
        scale: Tensor | None = None,
    ) -> None:
        """As `TrainOptimizer.clip_and_step`."""
        for group, of_own in zip(self.param_groups, self._own.param_groups, strict=True):
            of_own.update({name: group[name] for name in group if name != "params"})
        self._own.clip_and_step(norm, max_norm, is_finite, scale)
        self._has_state = True
        pending = [
            dist.broadcast(weight, owner, async_op=True)
            for weight, owner in zip(self._weights, self._owners, strict=True)
        ]
        for work in pending:
            work.wait()

    def zero_grad(self, set_to_none: bool = True) -> None:
        adamw.zero_gradients(self._weights, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The whole state on rank 0, its tensors on the CPU; that of other ranks lacks them. Every
        rank calls it."""
        state: dict[int, dict[str, Tensor]] = {}
        for number, weight in enumerate(self._weights if self._has_state else ()):
            moments = self._moments_of(weight, self._owners[number])
            if self._rank == 0:
                state[number] = {name: moment.cpu() for name, moment in moments.items()}
        ends = itertools.accumulate(len(group["params"]) for group in self.param_groups)
        return {
            "state": state,
            "param_groups": [
                {**group, "params": list(range(end - len(group["params"]), end))}
                for group, end in zip(self.param_groups, ends, strict=True)
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes this rank's share of a state of `AdamW`."""
        known = state["state"]
        self._has_state = bool(known)
        self._own.state.clear()
        for number, weight in enumerate(self._weights):
            if self._owners[number] == self._rank and number in known:
                self._own.state[weight] = {
                    name: known[number][name].to(weight.device, copy=True) for name in MOMENTS
                }
        for group, given in zip(self.param_groups, state["param_groups"], strict=True):
            group.update({name: given[name] for name in given if name != "params"})

    def _moments_of(self, weight: Tensor, owner: int) -> dict[str, Tensor]:
        """The moments of a weight, which its owner sends to the others."""
        if owner == self._rank:
            moments: dict[str, Tensor] = self._own.state[weight]
        else:
            step = torch.zeros((), device=weight.device)
            moments = {
                name: step if name == "step" else torch.empty_like(weight) for name in MOMENTS
            }
        if owner != 0:  # rank 0, which alone needs them, has its own
            for name in MOMENTS:
                dist.broadcast(moments[name], owner)
        return moments


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """The rank of each of some tensors of these sizes: largest first, each to the rank that has
    least so far."""
    found, taken = [0] * len(sizes), [0] * ranks
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        rank = min(range(ranks), key=lambda rank: (taken[rank], rank))
        found[number] = rank
        taken[rank] += sizes[number]
    return found


def largest_share(sizes: Sequence[int], ranks: int) -> int:
    """The elements that the rank with most of them has."""
    of_ranks = [0] * ranks
    for size, owner in zip(sizes, owners(sizes, ranks), strict=True):
        of_ranks[owner] += size
    return max(of_ranks)
