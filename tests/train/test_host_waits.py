"""Whether the host waits for the device within an update. Fake tensors have no values: reading one
on the host raises."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gpt2.distributed.gpu_usage import GpuUsage
from gpt2.distributed.world import World
from gpt2.train import trainer
from gpt2.train.replica import Replica
from support import small_config


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw"},
        {"optimizer": "muon", "architecture": "modern"},
        {"optimizer": "normuon", "cautious_decay": True, "momentum_warmup": 5},
        {"dtype": "float16"},
        {"dtype": "bfloat16", "residual_dtype": "bfloat16"},
        {"skip_spikes": True, "grad_clip": None},
    ],
)
def test_an_update_has_one_transfer_to_the_host_at_its_end(
    changes: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measured: list[GpuUsage] = []

    def measure() -> GpuUsage:  # right before the transfer
        measured.append(GpuUsage())
        return measured[0]

    world = World(0, 1, torch.device("cpu"), measure_gpu=measure)
    monkeypatch.setattr(torch.nn.Module, "to", lambda net, _: net)  # fake weights cannot be moved
    with FakeTensorMode():
        replica = Replica(small_config(tmp_path, tmp_path, **changes), world)
        tokens_BT = torch.zeros(4, 8, dtype=torch.long)
        batches = [(tokens_BT, tokens_BT.clone()) for _ in range(2)]
        with pytest.raises(DataDependentOutputException):
            trainer.train_step(replica, batches, 64, 1e-2)
    assert measured
