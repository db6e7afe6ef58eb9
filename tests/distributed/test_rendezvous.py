import os

import pytest
import torch

from gpt2.base.errors import ConfigError
from gpt2.config.run import MachineConfig
from gpt2.distributed import rendezvous


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_more_ranks_than_gpus(monkeypatch, wanted: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    expected = r"4 ranks on a machine with 2 GPUs; use --nproc_per_node=2, or --device cpu"
    with pytest.raises(ConfigError, match=expected), rendezvous.join(MachineConfig(device=wanted)):
        pass


def test_deterministic(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        with rendezvous.join(MachineConfig(device="cpu", deterministic=True)):
            assert torch.are_deterministic_algorithms_enabled()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_a_run_on_a_chosen_gpu(monkeypatch):
    chosen = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with rendezvous.join(MachineConfig(), gpu="2") as world:
        assert chosen == [world.device] == [torch.device("cuda", 2)]
    with rendezvous.join(MachineConfig(), gpu="cpu") as world:
        assert world.device.type == "cpu"
    for machine, gpu in [(MachineConfig(device="cuda"), "cpu"), (MachineConfig(), "4")]:
        with pytest.raises(ConfigError, match=f"gpu_id={gpu}"), rendezvous.join(machine, gpu):
            pass
