"""How ranks exchange gradients in half the bytes: a hook of DDP."""

import torch
import torch.distributed as dist
from torch import Tensor


def in_bfloat16(
    group: dist.ProcessGroup,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """The mean of a bucket of gradients over all ranks, in the bucket's dtype and memory. What is
    sent and added is rounded to bfloat16.

    As torch's `bf16_compress_hook`, which DDP refuses without NCCL.
    """
    gradients: Tensor = bucket.buffer()
    sent = gradients.div_(group.size()).to(torch.bfloat16)
    work = dist.all_reduce(sent, group=group, async_op=True)
    assert work is not None  # this rank is in the group

    def mean(done: torch.futures.Future[list[Tensor]]) -> Tensor:
        return gradients.copy_(done.value()[0])

    found: torch.futures.Future[Tensor] = work.get_future().then(mean)
    return found
