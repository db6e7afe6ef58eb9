"""Loss and gradients of the output head in one pass over the logits, on the CPU.

Plain operations write the logits of all tokens, their log-softmax and its gradient to memory, three
times N · V numbers, and read them again. Here, chunks of tokens share one buffer: their logits are
exponentiated in place, and the loss and both gradients are computed from that. The softmax
denominator, and the 1 that the gradient subtracts at the target, are applied to arrays of the
model's width: that is cheaper, and the 1 is not rounded to the eight bits of a bfloat16.

Shape suffixes: N tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TOKENS_AT_ONCE = 1024
"""a buffer of 200 MB for GPT-2's vocabulary in float32; smaller matrix products are slower"""


def summed_cross_entropy(features_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """`cross_entropy(features_ND @ weight_VD.T, targets_N, reduction="sum")`, a scalar.

    Needs at least one token. Under autocast, matrix products have its dtype. The gradients are
    computed together with the loss, so use it only where both are differentiated, once.
    """
    dtype = features_ND.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    apply: Callable[..., Tensor] = _SummedCrossEntropy.apply
    with torch.autocast("cpu", enabled=False):
        return apply(features_ND, weight_VD, targets_N, dtype)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, dtype: torch.dtype
    ) -> Tensor:
        loss = weight_VD.new_zeros(())
        gradient_ND = torch.empty_like(features_ND, dtype=weight_VD.dtype)
        gradient_VD = torch.empty_like(weight_VD)
        matrix_VD = weight_VD.to(dtype)
        buffer_NV = matrix_VD.new_empty(min(TOKENS_AT_ONCE, len(features_ND)), len(weight_VD))
        for begin in range(0, len(features_ND), TOKENS_AT_ONCE):
            some = slice(begin, begin + TOKENS_AT_ONCE)
            some_ND, targets_N1 = features_ND[some], targets_N[some].unsqueeze(1)
            work_NV = buffer_NV[: len(some_ND)]
            torch.mm(some_ND.to(dtype), matrix_VD.T, out=work_NV)
            right_N1, highest_N1 = work_NV.gather(1, targets_N1), work_NV.amax(1, keepdim=True)
            work_NV.sub_(highest_N1).exp_()
            sum_N1 = work_NV.sum(1, keepdim=True, dtype=weight_VD.dtype)
            loss += (sum_N1.log() + highest_N1 - right_N1).sum()
            torch.div(work_NV @ matrix_VD, sum_N1, out=gradient_ND[some])
            scaled_ND = (some_ND / sum_N1).to(dtype)
            if dtype is gradient_VD.dtype:
                gradient_VD.addmm_(work_NV.T, scaled_ND, beta=0 if begin == 0 else 1)
            elif begin == 0:
                gradient_VD.copy_(work_NV.T @ scaled_ND)
            else:
                gradient_VD += work_NV.T @ scaled_ND
        gradient_ND -= weight_VD[targets_N]
        gradient_VD.index_add_(0, targets_N, features_ND.to(weight_VD.dtype), alpha=-1)
        ctx.gradients = gradient_ND.to(features_ND.dtype), gradient_VD
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gradient_ND, gradient_VD = ctx.gradients
        del ctx.gradients
        return gradient_ND.mul_(scale), gradient_VD.mul_(scale), None, None
