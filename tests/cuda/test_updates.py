"""Updates of the weights on the GPU."""

from pathlib import Path

import pytest
import torch

from gpt2.distributed.world import World
from gpt2.optim.build import gradient_norm
from gpt2.train import trainer
from gpt2.train.replica import Replica
from support import small_config

TOKENS = 64


def replica_on(device: str, folder: Path, **changes: object) -> Replica:
    given = {"device": device, "dtype": "float32", "compile": "off", **changes}
    config = small_config(folder, folder, **given)
    return Replica(config, World(0, 1, torch.device(device, 0)))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_updates_in_float16_are_those_in_float32(device: str, optimizer: str, tmp_path: Path):
    scaled, plain = (
        replica_on(device, tmp_path, optimizer=optimizer, dropout=0.0, dtype=dtype)
        for dtype in ("float16", "float32")
    )
    for _ in range(4):
        drawn = batch(scaled)
        one, other = (trainer.train_step(item, [drawn], TOKENS, 1e-2) for item in (scaled, plain))
        assert one.applied and one.loss_scale == 2.0**16
        assert one.loss == pytest.approx(other.loss, abs=1e-2)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-2)


def batch(replica: Replica) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randint(50257, (8, replica.config.model.block_size + 1))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_without_a_finite_gradient_is_left_out(
    device: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    replica = replica_on(device, tmp_path, optimizer=optimizer)
    assert trainer.train_step(replica, [batch(replica)], TOKENS, 1e-2).applied
    before = {name: part.clone() for name, part in replica.model.state_dict().items()}
    whole = gradient_norm

    def poisoned(net: torch.nn.Module) -> torch.Tensor:
        next(iter(net.parameters())).grad[0, 0] = float("nan")
        return whole(net)

    monkeypatch.setattr(trainer, "gradient_norm", poisoned)
    assert not trainer.train_step(replica, [batch(replica)], TOKENS, 1e-2).applied
    monkeypatch.undo()
    for name, part in replica.model.state_dict().items():
        assert torch.equal(part, before[name]), name
    assert trainer.train_step(replica, [batch(replica)], TOKENS, 1e-2).applied
    changed = replica.model.state_dict()
    assert all(not torch.equal(changed[name], before[name]) for name in before)
