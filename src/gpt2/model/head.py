"""Loss and gradients of the output head in one pass over the logits, for float32 on the CPU.

The plain way writes the logits of all tokens, their log-softmax and its gradient to memory, three
times N · V numbers, and reads them again. Here some tokens at a time share a buffer: their logits
become probabilities in place, of which the loss and both gradients are taken.

Shape suffixes: N tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TOKENS_AT_ONCE = 512
"""a buffer of 100 MB for GPT-2's vocabulary; fewer make the matrix products slower"""


def summed_cross_entropy(features_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """`cross_entropy(features_ND @ weight_VD.T, targets_N, reduction="sum")`, a scalar.

    Its gradients are computed with it: only for what is differentiated, and once.
    """
    apply: Callable[..., Tensor] = _SummedCrossEntropy.apply
    return apply(features_ND, weight_VD, targets_N)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        loss = features_ND.new_zeros(())
        gradient_ND = torch.empty_like(features_ND)
        gradient_VD = torch.zeros_like(weight_VD)
        buffer_NV = features_ND.new_empty(min(TOKENS_AT_ONCE, len(features_ND)), len(weight_VD))
        for begin in range(0, len(features_ND), TOKENS_AT_ONCE):
            some = slice(begin, begin + TOKENS_AT_ONCE)
            some_ND, targets_N1 = features_ND[some], targets_N[some].unsqueeze(1)
            work_NV = torch.mm(some_ND, weight_VD.T, out=buffer_NV[: len(some_ND)])
            highest_N = work_NV.amax(1)
            right_N = work_NV.gather(1, targets_N1).squeeze(1)
            torch.softmax(work_NV, 1, out=work_NV)
            # The sum of exp(logits) is that of the likeliest token over its probability.
            loss += (highest_N - work_NV.amax(1).log() - right_N).sum()
            work_NV.scatter_add_(1, targets_N1, work_NV.new_tensor(-1.0).expand_as(targets_N1))
            torch.mm(work_NV, weight_VD, out=gradient_ND[some])
            gradient_VD.addmm_(work_NV.T, some_ND)
        ctx.gradients = gradient_ND, gradient_VD
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, None]:
        gradient_ND, gradient_VD = ctx.gradients
        del ctx.gradients
        return gradient_ND.mul_(scale), gradient_VD.mul_(scale), None
