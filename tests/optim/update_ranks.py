"""Each rank updates the same model from the same gradients, and loads a state of the optimiser:
`update_ranks.py OUT STATE OPTIMIZER`."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpt2 import model
from gpt2.config.model import ModelConfig
from gpt2.config.run import OptimConfig
from gpt2.optim import build

SHAPE = ModelConfig(n_layer=3, n_head=1, n_embd=16, block_size=8, vocab_size=128)
"""three matrices of each shape: two ranks have two and one, four ranks one each and none"""


def updated(name: str, state: dict[str, Any] | None, updates: int) -> dict[str, Any]:
    """Weights and optimiser after some updates, from a state of the optimiser."""
    torch.manual_seed(0)
    net = model.build(SHAPE)
    options = OptimConfig(optimizer=name, shard_optimizer=True, embedding_lr_ratio=4.0)
    optimizer = build.build_optimizer(net, options)
    if state is not None:
        optimizer.load_state_dict(state)
    for number in range(updates):
        torch.manual_seed(number)
        for part in net.parameters():
            part.grad = torch.randn_like(part)
        build.set_learning_rate(optimizer, 0.02)
        optimizer.clip_and_step(build.gradient_norm(net), 1.0, torch.tensor(number != 1))
        optimizer.zero_grad()
    return {"weights": net.state_dict(), "optimizer": optimizer.state_dict()}


def main() -> None:
    dist.init_process_group("gloo")
    out, state, name = sys.argv[1:]
    found = updated(name, None, 3), updated(name, torch.load(state), 0)
    torch.save(found, Path(out) / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
