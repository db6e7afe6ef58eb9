import os
import time

import pytest
import torch

from gpt2.base.errors import ConfigError
from gpt2.distributed import device
from gpt2.distributed.world import World


def test_measured_peak_is_a_plausible_rate():
    world = World(0, 1, torch.device("cpu"))
    assert 1e8 < device.peak_flops(world, torch.float32) < 1e14


def test_time_between_moments():
    first = device.DeviceTimestamp(torch.device("cpu"))
    time.sleep(0.02)
    second = device.DeviceTimestamp(torch.device("cpu"))
    assert second.since(first) >= 0.02


def test_the_id_of_the_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.gpu_id("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert (device.gpu_id("auto"), device.gpu_id("cpu")) == ("1", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert (device.gpu_id("auto"), device.gpu_id("cpu")) == ("3", "3")


@pytest.mark.parametrize("wanted", ["auto", "cpu", "cuda"])
def test_a_list_of_gpus_that_cuda_would_misread_is_refused(monkeypatch, wanted: str):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0 1")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES '0 1': '0 1' is not a GPU"):
        device.choose(wanted, 0, 1, None)
    with pytest.raises(ConfigError, match="is not a GPU"):
        device.gpu_id(wanted)


def test_cuda_reads_a_range_as_it_was_meant(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1-3")
    seen = []

    def device_count() -> int:
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        return 3

    monkeypatch.setattr(torch.cuda, "is_available", lambda: device_count() > 0)
    monkeypatch.setattr(torch.cuda, "device_count", device_count)
    assert device.choose("auto", 0, 1, "2") == torch.device("cuda", 1)
    assert set(seen) == {"1,2,3"}


def test_ranks_share_the_cores_unless_the_environment_sets_their_threads(monkeypatch):
    monkeypatch.delenv(device.THREADS, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    for given, threads in (("", 4), ("1", 4), ("2", 2), ("no number", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert device.threads_per_rank(3) == threads
    monkeypatch.setenv(device.THREADS, "1")
    assert device.threads_per_rank(3) == 1, "of a slot, not torchrun's default"
