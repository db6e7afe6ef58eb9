import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2 import model
from gpt2.config import presets
from gpt2.config.model import ARCHITECTURES
from gpt2.config.options import overlay
from gpt2.distributed import rendezvous
from gpt2.model import base, cross_entropy
from gpt2.model.cross_entropy import summed_cross_entropy
from gpt2.train import trainer
from gpt2.train.replica import Replica
from support import losses, run_command, small_config


def plain(features_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(features_ND, weight_VD), targets_N, reduction="sum")


@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_loss_and_gradients_are_those_of_plain_operations(
    size: float, tokens: int, monkeypatch: pytest.MonkeyPatch
):
    """Also if one token has all the probability and the target has none."""
    monkeypatch.setattr(cross_entropy, "TOKENS_AT_ONCE", 7)
    torch.manual_seed(0)
    targets_N = torch.randint(101, (tokens,))
    found = []
    for loss_of in (plain, summed_cross_entropy):
        torch.manual_seed(1)
        features_ND = (size * torch.randn(tokens, 16)).requires_grad_()
        weight_VD = torch.randn(101, 16).requires_grad_()
        loss = loss_of(features_ND, weight_VD, targets_N)
        (loss * 0.25).backward()
        found.append((loss.detach(), features_ND.grad, weight_VD.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=2e-5, atol=1e-5 * size)


@pytest.mark.parametrize("size", [0.02, 0.1])
def test_bfloat16_is_as_close_to_float32_as_with_plain_operations(size: float):
    torch.manual_seed(0)
    weight_VD = (size * torch.randn(20000, 64)).requires_grad_()
    features_ND = torch.randn(64, 64).requires_grad_()
    logits_NV = features_ND.detach() @ weight_VD.detach().T
    targets_N = torch.distributions.Categorical(logits=logits_NV).sample()
    found = []
    for loss_of, in_bfloat16 in ((plain, False), (summed_cross_entropy, True)):
        features_ND.grad = weight_VD.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            loss = loss_of(features_ND, weight_VD, targets_N)
        loss.backward()
        assert features_ND.grad is not None and weight_VD.grad is not None
        found.append((loss.detach(), features_ND.grad, weight_VD.grad))
    (loss, *gradients), (rounded, *rounded_gradients) = found
    assert abs(rounded / loss - 1) < 2e-5
    for exact, gradient in zip(gradients, rounded_gradients, strict=True):
        assert gradient.dtype is torch.float32
        assert (gradient - exact).norm() < 0.005 * exact.norm()


def test_a_run_learns_the_same_with_it(data_root, tmp_path, monkeypatch: pytest.MonkeyPatch):
    ours, plain_one = (small_config(data_root, tmp_path / name) for name in "ab")
    trainer.run(ours)
    monkeypatch.setattr(base, "summed_cross_entropy", plain)
    trainer.run(plain_one)
    found = [losses(run.watch.log_dir / "log.txt") for run in (ours, plain_one)]
    assert found[0] == pytest.approx(found[1], rel=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_its_gradients_in_bfloat16(architecture: str):
    """Independent of the dtype of its features under autocast."""
    torch.manual_seed(0)
    sizes: dict[str, object] = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
    run = overlay(presets.preset("demo"), {**sizes, "architecture": architecture})
    net = model.build(run.model)
    tokens_BT = torch.randint(50257, (2, 16))
    found = []
    for net.fast_head in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(tokens_BT, tokens_BT.flip(1))
        loss.backward()
        found.append([part.grad.clone() for part in net.parameters()])
    for plain_one, ours in zip(*found, strict=True):
        assert ours.dtype is torch.float32
        assert (ours - plain_one).norm() < 0.02 * plain_one.norm()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_model_learns_as_well_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """300 steps on the standard library, three seeds. Sums have another order, so their last digits
    differ; with Muon, and at the highest learning rates of AdamW, that changes the loss by more."""
    data = tmp_path / "stdlib"
    gpt2 = [sys.executable, "-m", "gpt2"]
    run_command([*gpt2, "data", "python-stdlib", "--out", str(data), "--max_tokens", "2000000"])
    demo = {"data_root": str(data), "device": "cpu", "dtype": "float32", "sample_interval": None}
    demo |= {"optimizer": "adamw", "learning_rate": 2e-3, "max_steps": 300}
    found = []
    for loss_of in (summed_cross_entropy, plain):
        monkeypatch.setattr(base, "summed_cross_entropy", loss_of)
        for seed in range(3):
            out = tmp_path / f"{loss_of.__name__}_{seed}"
            folders = {name: out / name for name in ("checkpoint_dir", "log_dir", "runs_dir")}
            run = overlay(presets.preset("demo"), {**demo, **folders, "seed": seed})
            found.append(trainer.run(run).val_loss)
    print(found)
    for ours, plain_one in zip(found[:3], found[3:], strict=True):
        assert ours < 4.5 and abs(ours - plain_one) < 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_it_is_used(data_root, tmp_path, dtype: str):
    run = small_config(data_root, tmp_path, dtype=dtype)
    with rendezvous.join(run.machine) as world:
        assert Replica(run, world).model.fast_head
        assert not Replica(run, world, plain_head=True).model.fast_head
