"""The GPU computes the same loss and gradients as the CPU, from the same weights and tokens."""

from pathlib import Path

import pytest
import torch

from gpt2.distributed.world import World
from gpt2.train.replica import Replica
from support import small_config

ROWS, LENGTH = 4, 128


def loss_and_gradients(
    device: str, dtype: str, folder: Path, architecture: str = "gpt2"
) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss of one batch, and the gradient of every weight."""
    shape = {"n_layer": 3, "n_head": 2, "n_embd": 128, "block_size": LENGTH, "dropout": 0.0}
    shape["total_batch_size"] = ROWS * LENGTH
    machine = {"device": device, "dtype": dtype, "compile": "off", "architecture": architecture}
    config = small_config(folder, folder, **shape, **machine)
    replica = Replica(config, World(0, 1, torch.device(device)))
    with torch.no_grad():
        for part in replica.model.parameters():
            if part.dim() == 2:  # a new model predicts all tokens alike, even with a bug
                part.mul_(4)
    drawn = torch.randint(50257, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    tokens_BT, targets_BT = replica.world.to_device(drawn[:, :-1], drawn[:, 1:].contiguous())
    with replica.autocast:
        loss = replica.model(tokens_BT, targets_BT) / targets_BT.numel()
    loss.backward()
    gradients = {
        name: part.grad.double().cpu()
        for name, part in replica.model.named_parameters()
        if part.grad is not None
    }
    assert gradients.keys() == dict(replica.model.named_parameters()).keys()
    return loss.item(), gradients


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], name: str) -> float:
    """Relative L2 distance of a gradient from that of `other`."""
    return float((one[name] - other[name]).norm() / other[name].norm())


@pytest.fixture
def no_tf32(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize(
    ("dtype", "of_loss", "of_gradient"), [("float32", 2e-5, 3e-4), ("bfloat16", 5e-3, 5e-2)]
)
@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_loss_and_gradients_are_those_of_the_cpu(
    device: str, architecture: str, dtype: str, of_loss: float, of_gradient: float, tmp_path: Path
):
    """Float32 on the CPU against either dtype on the GPU. TF32 instead of float32 would change the
    gradients by 1e-3, and the exact form of gelu by 6e-4."""
    expected, their_gradients = loss_and_gradients("cpu", "float32", tmp_path, architecture)
    loss, gradients = loss_and_gradients(device, dtype, tmp_path, architecture)
    assert loss == pytest.approx(expected, rel=of_loss)
    for name in gradients:
        assert distance(gradients, their_gradients, name) < of_gradient, name
