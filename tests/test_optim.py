import subprocess
import sys

import pytest
import torch

from gpt2 import model, optim
from gpt2.config import ModelConfig, OptimConfig

SHAPE = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8)


def test_matrices_decay_and_vectors_do_not():
    net = model.build(SHAPE)
    decayed, plain = optim.build(net, OptimConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(part.dim() >= 2 for part in decayed["params"])
    assert all(part.dim() < 2 for part in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(net.parameters()))


def test_learning_rate_reaches_every_group():
    optimizer = optim.build(model.build(SHAPE), OptimConfig())
    optim.set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


@pytest.mark.parametrize(("limit", "expected"), [(1.0, 1.0), (100.0, 5.0), (None, 5.0)])
def test_clip_scales_to_the_limit_and_returns_the_norm_before(limit, expected):
    layer = torch.nn.Linear(1, 1)
    layer.weight.grad, layer.bias.grad = torch.tensor([[3.0]]), torch.tensor([4.0])
    assert float(optim.clip(layer, limit)) == pytest.approx(5.0)
    norm = (layer.weight.grad.square().sum() + layer.bias.grad.square().sum()).sqrt()
    assert float(norm) == pytest.approx(expected, rel=1e-4)


def test_an_update_loads_no_compiler():
    """It would cost every process two seconds."""
    program = (
        "import sys, torch\nfrom gpt2 import model, optim\nfrom gpt2.config import *\n"
        "net = model.build(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8))\n"
        "optimizer = optim.build(net, OptimConfig())\n"
        "net(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)).backward()\n"
        "optimizer.step()\noptimizer.zero_grad(set_to_none=True)\n"
        "optimizer.load_state_dict(optimizer.state_dict())\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
