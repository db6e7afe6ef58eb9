"""The loss of the output head and its gradients, computed together, a chunk of tokens at a time.

Plain operations write the logits of all tokens, their log-softmax and its gradient to memory, three
times N · V numbers, and read them again. Here, chunks of tokens share one buffer: their logits are
exponentiated in place, and the loss and both gradients are computed from that. So the memory does
not grow with the number of tokens, except for the gradient of the features. Matrix products have
the dtype of autocast, sums that of the weight. The softmax denominator, and the 1 that the gradient
subtracts at the target, are applied to arrays of the model's width: that is cheaper, and the 1 is
not rounded to the eight bits of a bfloat16.

For torch.compile it is one operator: no graph break, the same memory, and a graph that DDP can
split (an autograd.Function becomes a higher-order operator, which torch 2.9 refuses to split).

Shape suffixes: N tokens, D width, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpt2.config import memory

CHUNK_ELEMENTS = {"cpu": 1024 * 50304, "cuda": memory.HEAD_LOGITS}
"""Largest number of logits at once, by device: 1024 or 4096 tokens with GPT-2's vocabulary, which
take 206 MB in float32 and 412 MB in bfloat16. Smaller matrix products are slower; a GPU needs
larger ones to be busy."""


def summed_cross_entropy(
    features: Tensor, weight_VD: Tensor, targets: Tensor, softcap: float | None = None
) -> Tensor:
    """The cross entropy of `features @ weight_VD.T`, summed over all targets, a scalar.

    Features are (…, D), targets (…), at least one. With `softcap`, the logits z become
    softcap · tanh(z / softcap). Where gradients are enabled, they are computed together with the
    loss, and can be used once.
    """
    return summed_and_single_losses(features, weight_VD, targets, softcap)[0]


def summed_and_single_losses(
    features: Tensor, weight_VD: Tensor, targets: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """As `summed_cross_entropy`; also the cross entropy of each target, (…), without gradients."""
    device = features.device.type
    dtype = features.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    loss: Tensor
    losses: Tensor
    loss, losses, _, _ = torch.ops.gpt2.summed_cross_entropy(
        features,
        weight_VD,
        targets,
        dtype,
        softcap,
        has_gradients=torch.is_grad_enabled(),
        is_compiled=device == "cuda" and torch.compiler.is_compiling(),
    )
    return loss, losses


def _loss_and_gradients(
    features: Tensor,
    weight_VD: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    softcap: float | None,
    has_gradients: bool,
    is_compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The summed loss, that of each target, and the gradients of the sum by features and weight,
    which are empty if they are not wanted.

    `is_compiled` fuses what happens to the logits between the matrix products.
    """
    features_ND, targets_N = features.flatten(0, -2), targets.flatten()
    tokens_at_once = max(1, CHUNK_ELEMENTS[features_ND.device.type] // len(weight_VD))
    chunks = [
        slice(begin, begin + tokens_at_once) for begin in range(0, len(features_ND), tokens_at_once)
    ]
    exponentiate = _compiled_exponentiate() if is_compiled else _exponentiate
    outputs = _outputs(features, weight_VD, targets, has_gradients)
    loss, losses, gradient, gradient_VD = outputs
    loss.zero_()
    losses_N1 = losses.view(-1, 1)
    gradient_ND = gradient.view(-1, weight_VD.size(1))
    with torch.autocast(features_ND.device.type, enabled=False):
        matrix_VD = weight_VD.to(dtype)
        buffer_NV = matrix_VD.new_empty(min(tokens_at_once, len(features_ND)), len(weight_VD))
        slopes = []
        for number, chunk in enumerate(chunks):
            some_ND, targets_N1 = features_ND[chunk], targets_N[chunk].unsqueeze(1)
            work_NV = buffer_NV[: len(some_ND)]
            torch.mm(some_ND.to(dtype), matrix_VD.T, out=work_NV)
            if not (has_gradients or is_compiled):
                work_NV = work_NV.to(weight_VD.dtype)  # a loss alone is computed in full precision
            some_loss, losses_N1[chunk], sum_N1, slope_N1 = exponentiate(
                work_NV, targets_N1, softcap, weight_VD.dtype
            )
            loss += some_loss
            if has_gradients:
                right_ND = weight_VD[targets_N[chunk]]
                if slope_N1 is not None:
                    right_ND.mul_(slope_N1)
                    slopes.append(slope_N1)
                gradient_ND[chunk] = (work_NV @ matrix_VD).div(sum_N1).sub_(right_ND)
                _add_product(gradient_VD, work_NV, (some_ND / sum_N1).to(dtype), number == 0)
        for number, chunk in enumerate(chunks if has_gradients else ()):
            some_ND = features_ND[chunk].to(weight_VD.dtype)
            if slopes:
                some_ND = some_ND * slopes[number]
            gradient_VD.index_add_(0, targets_N[chunk], some_ND, alpha=-1)
    return outputs


def _outputs(
    features: Tensor, weight_VD: Tensor, targets: Tensor, has_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and gradients, uninitialised."""
    losses = weight_VD.new_empty(()), weight_VD.new_empty(targets.shape)
    if not has_gradients:
        return *losses, features.new_empty(0), weight_VD.new_empty(0)
    return *losses, features.new_empty(features.shape), weight_VD.new_empty(weight_VD.shape)


def _exponentiate(
    logits_NV: Tensor, targets_N1: Tensor, softcap: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Replaces logits by exp(logit - highest logit), times the derivative of the soft cap.

    Returns, in `dtype`, the summed loss, that of each token, the sum of its exponentials, and the
    derivative of the soft cap at its target (None without one).
    """
    slope_NV = None
    if softcap is not None:
        capped_NV = logits_NV.to(dtype).div(softcap).tanh_()  # bfloat16 is too coarse for the slope
        logits_NV.copy_(softcap * capped_NV)
        slope_NV = capped_NV.square_().neg_().add_(1)
    right_N1, highest_N1 = logits_NV.gather(1, targets_N1), logits_NV.amax(1, keepdim=True)
    logits_NV.sub_(highest_N1).exp_()
    sum_N1 = logits_NV.sum(1, keepdim=True, dtype=dtype)
    losses_N1 = sum_N1.log() + highest_N1 - right_N1
    if slope_NV is None:
        return losses_N1.sum(), losses_N1, sum_N1, None
    logits_NV.mul_(slope_NV)
    return losses_N1.sum(), losses_N1, sum_N1, slope_NV.gather(1, targets_N1)


@functools.cache
def _compiled_exponentiate() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    return torch.compile(_exponentiate, dynamic=False)


def _add_product(sum_VD: Tensor, work_NV: Tensor, some_ND: Tensor, is_first: bool) -> None:
    """Adds `work_NV.T @ some_ND` to `sum_VD`, or writes it there if it is the first."""
    if work_NV.dtype is sum_VD.dtype:
        sum_VD.addmm_(work_NV.T, some_ND, beta=0 if is_first else 1)
    elif is_first:
        sum_VD.copy_(work_NV.T @ some_ND)
    else:
        sum_VD += work_NV.T @ some_ND


def _fake(
    features: Tensor,
    weight_VD: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    softcap: float | None,
    has_gradients: bool,
    is_compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What torch.compile knows of the results: their shapes and dtypes."""
    return _outputs(features, weight_VD, targets, has_gradients)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gradients = output[2:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*gradients)


def _scaled_gradients(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    # In place: torch refuses to use a saved tensor after that, so a second backward is an error.
    gradient, gradient_VD = ctx.saved_tensors
    return gradient.mul_(scale), gradient_VD.mul_(scale), None, None, None, None, None


_OPERATOR = "gpt2::summed_cross_entropy"
# Not by torch.library.custom_op, which imports torch.compile's machinery at the first call.
torch.library.define(
    _OPERATOR,
    "(Tensor features, Tensor weight, Tensor targets, ScalarType dtype, float? softcap, "
    "bool has_gradients, bool is_compiled) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl(_OPERATOR, "default", _loss_and_gradients)
torch.library.register_fake(_OPERATOR, _fake)
torch.library.register_autograd(_OPERATOR, _scaled_gradients, setup_context=_keep_gradients)
