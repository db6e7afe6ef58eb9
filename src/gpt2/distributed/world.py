"""Processes of one run: who they are, where they compute and how they agree.

The only reader of the variables that torchrun sets. A run without torchrun is a world of one, in
which every collective is the identity.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gpt2.distributed.watchdog import Watchdog

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all that train together.

    Control messages (objects, flags) go over gloo on the CPU and never wait for the GPU; gradients
    and losses go over NCCL where there is CUDA.
    """

    rank: int
    size: int
    device: torch.device
    long_timeout_group: dist.ProcessGroup | None = None
    """for waiting until rank 0 has done something alone"""
    watchdog: Watchdog | None = None
    """who knows of the other ranks' failures"""

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    @property
    def queues_work(self) -> bool:
        """Whether the host is ahead of the device, and waits for what it reads."""
        return self.device.type == "cuda"

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors on this rank's device; the host does not wait where they are pinned."""
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)

    def to_host(self, tensor: Tensor) -> Tensor:
        """The tensor on the host, where it is as soon as a `Moment` after this has passed."""
        if not tensor.is_cuda:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum of `tensor` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, value: int) -> int:
        """The largest `value` of any rank, known to all."""
        if self.size == 1:
            return value
        box = torch.tensor(value)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return int(box)

    def gather(self, value: float) -> list[float]:
        """Each rank's `value`, in rank order, known to all."""
        if self.size == 1:
            return [value]
        boxes = [torch.zeros((), dtype=torch.float64) for _ in range(self.size)]
        dist.all_gather(boxes, torch.tensor(value, dtype=torch.float64))
        return [float(box) for box in boxes]

    def gather_objects(self, value: T) -> list[T]:
        """Each rank's object on rank 0, an empty list elsewhere."""
        if self.size == 1:
            return [value]
        boxes: list[Any] | None = [None] * self.size if self.is_rank0 else None
        dist.gather_object(value, boxes)
        return boxes or []

    def reason(self, error: BaseException) -> str:
        """Why this rank ends with `error`; another rank's failure, where that is behind it."""
        return self.watchdog.reason(error) if self.watchdog else f"{type(error).__name__}: {error}"

    def run_on_rank0(self, function: Callable[[], T]) -> T:
        """The result of `function`, called on rank 0 alone; its exception is raised everywhere."""
        if self.size == 1:
            return function()
        box: list[Any] = [None, None]
        if self.is_rank0:
            try:
                box[0] = function()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, group=self.long_timeout_group)
        if box[1] is not None:
            raise box[1]
        result: T = box[0]
        return result
