"""Several optimisers, each of other weights, as one."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt2.config.run import OptimConfig
from gpt2.model.base import LanguageModel
from gpt2.optim import adamw
from gpt2.optim.adamw import AdamW
from gpt2.optim.muon import NEURON_BETA2, Muon
from gpt2.optim.sharded import ShardedAdamW


class CombinedOptimizer:
    """Several optimisers, each of other weights, with one state: `AdamW`, `Muon`, or any of
    torch's, for which the host waits, as they can neither scale gradients nor skip a step."""

    def __init__(self, parts: Sequence[AdamW | ShardedAdamW | Muon | Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def clip_and_step(
        self,
        norm: Tensor,
        max_norm: float | None,
        is_finite: Tensor,
        scale: Tensor | None = None,
    ) -> None:
        """As `TrainOptimizer.clip_and_step`."""
        for part in self.parts:
            if isinstance(part, AdamW | ShardedAdamW | Muon):
                part.clip_and_step(norm, max_norm, is_finite, scale)
            elif is_finite:
                _clip(part, norm, max_norm, scale)
                part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {_name(part): part.state_dict() for part in self.parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for part in self.parts:
            part.load_state_dict(state[_name(part)])


def _name(part: object) -> str:
    """In a checkpoint, which is the same for any number of ranks."""
    return "AdamW" if isinstance(part, ShardedAdamW) else type(part).__name__


def _clip(optimizer: Optimizer, norm: Tensor, max_norm: float | None, scale: Tensor | None) -> None:
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if scale is not None:
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        torch._foreach_div_(gradients, scale)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(weights, max_norm, norm)


def build_adamw(model: LanguageModel, config: OptimConfig) -> AdamW | ShardedAdamW:
    """AdamW for all weights."""
    return _adamw_of(model, model.parameters(), config)


def build_muon(
    model: LanguageModel, config: OptimConfig, beta2: float | None = None
) -> AdamW | ShardedAdamW | CombinedOptimizer:
    """Muon for the matrices between embedding and head, and AdamW for the rest. A model without
    hidden matrices gets AdamW. `beta2` is as in `Muon`."""
    hidden = [matrix for matrix in model.hidden_matrices() if matrix.requires_grad]
    if not hidden:
        return build_adamw(model, config)
    taken = {id(part) for part in hidden}
    others = (part for part in model.parameters() if id(part) not in taken)
    muon = Muon(
        hidden,
        config.learning_rate,
        config.weight_decay,
        beta2=beta2,
        is_cautious=config.cautious_decay,
        momentum_warmup=config.momentum_warmup,
    )
    return CombinedOptimizer([muon, _adamw_of(model, others, config)])


def build_normuon(
    model: LanguageModel, config: OptimConfig
) -> AdamW | ShardedAdamW | CombinedOptimizer:
    """As `build_muon`, with updates that are normalised by neuron."""
    return build_muon(model, config, NEURON_BETA2)


def _adamw_of(
    model: LanguageModel, weights: Iterable[nn.Parameter], config: OptimConfig
) -> AdamW | ShardedAdamW:
    groups = adamw.parameter_groups(model, weights, config)
    if config.shard_optimizer and dist.is_initialized() and dist.get_world_size() > 1:
        return ShardedAdamW(groups, config)
    return adamw.of_groups(groups, config)
