import os
import time

import torch

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


def test_ranks_share_the_cores_unless_the_environment_sets_their_threads(monkeypatch):
    monkeypatch.delenv(device.THREADS, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    for given, threads in (("", 4), ("1", 4), ("2", 2), ("no number", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert device.threads_per_rank(3) == threads
    monkeypatch.setenv(device.THREADS, "1")
    assert device.threads_per_rank(3) == 1, "of a slot, not torchrun's default"
