"""Each rank updates the same model from the same gradients, and loads a state of the optimiser:
`muon_ranks.py OUT STATE`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from gpt2 import model
from gpt2.config.model import ModelConfig
from gpt2.config.run import OptimConfig
from gpt2.optim import build

SHAPE = ModelConfig(n_layer=3, n_head=1, n_embd=16, block_size=8)
"""three matrices of each shape: two ranks have two and one, four ranks one each and none"""


def updated(state: dict | None, updates: int) -> dict[str, object]:
    """Weights and optimiser after some updates, from a state of the optimiser."""
    torch.manual_seed(0)
    net = model.build(SHAPE)
    optimizer = build.build_optimizer(net, OptimConfig(optimizer="muon"))
    if state is not None:
        optimizer.load_state_dict(state)
    for number in range(updates):
        torch.manual_seed(number)
        for part in net.parameters():
            part.grad = torch.randn_like(part)
        build.set_learning_rate(optimizer, 0.02)
        optimizer.clip_and_step(build.gradient_norm(net), 1.0, torch.tensor(number != 1))
    return {"weights": net.state_dict(), "optimizer": optimizer.state_dict()}


def main() -> None:
    dist.init_process_group("gloo")
    out, state = map(Path, sys.argv[1:])
    found = updated(None, 3), updated(torch.load(state), 0)
    torch.save(found, out / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
