"""The ranks of one run: this rank's number and device, and the collectives of all ranks.

A run without torchrun is a world of one rank, in which every collective is the identity.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gpt2.base.errors import described
from gpt2.distributed.gpu_usage import GpuUsage
from gpt2.distributed.watchdog import Watchdog

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This rank among all ranks that train together.

    Control messages (objects, flags) go over gloo on the CPU and never wait for the GPU. Gradients
    and losses go over NCCL where there is CUDA.
    """

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0
    """number of this rank on its machine"""
    long_timeout_group: dist.ProcessGroup | None = None
    """for collectives in which the other ranks wait for work that one rank does alone"""
    watchdog: Watchdog | None = None
    """knows the failures of other ranks"""
    measure_gpu: Callable[[], GpuUsage] = GpuUsage
    """what this rank uses of its GPU; by default nothing is known"""

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    @property
    def is_local_rank0(self) -> bool:
        """Whether this is the first rank of its machine."""
        return self.local_rank == 0

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors on this rank's device. The host does not wait for pinned ones."""
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, value: int) -> int:
        """The largest `value` of all ranks, a signed 64-bit integer."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The `values` of each rank, in rank order, on all ranks. Their number is the same on every
        rank."""
        if self.size == 1:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64)
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(gathered, own)
        return [of_rank.tolist() for of_rank in gathered]

    def gather_objects(self, value: T) -> list[T]:
        """The object of each rank, in rank order, on rank 0; an empty list on other ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_rank0 else None
        dist.gather_object(value, values)
        return values or []

    def reason(self, error: BaseException) -> str:
        """Why this rank ends with `error`: another rank's failure if that is the cause."""
        return self.watchdog.reason(error) if self.watchdog else described(error)

    def run_on_rank0(self, function: Callable[[], T]) -> T:
        """Calls `function` on rank 0 only. All ranks return its result, or raise its exception."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_rank0:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, group=self.long_timeout_group)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def run_on_local_rank0(self, function: Callable[[], T]) -> T:
        """Calls `function` on the first rank of each machine. All ranks wait for all machines, and
        return the result of their own, or raise the exception of the first that failed."""
        if self.size == 1:
            return function()
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.is_local_rank0:
            try:
                outcome = (function(), None)
            except Exception as raised:
                outcome = (None, raised)
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, outcome, group=self.long_timeout_group)
        for _, error in outcomes:
            if error is not None:
                raise error
        result: T = outcomes[self.rank - self.local_rank][0]  # torchrun numbers ranks by machine
        return result
