import os
import time

import pytest
import torch

from gpt2.base.errors import ConfigError
from gpt2.config import peak_rates
from gpt2.distributed import device
from gpt2.distributed.world import World


def test_measured_peak_is_a_plausible_rate():
    world = World(0, 1, torch.device("cpu"))
    assert 1e8 < device.peak_flops(world, torch.float32) < 1e14


ON_CUDA = World(0, 1, torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H100 NVL", torch.bfloat16, peak_rates.PEAK_FLOPS["H100 NVL"]),
        ("NVIDIA H100 NVL", torch.float32, 12e12),
        ("NVIDIA H100 NVL MIG 1g.12gb", torch.bfloat16, 12e12),
        ("NVIDIA H999", torch.bfloat16, 12e12),
    ],
)
def test_the_rate_of_a_gpu_is_measured_where_no_data_sheet_says_it(
    monkeypatch, caplog, name: str, dtype: torch.dtype, expected: float
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(device, "measured_flops", lambda *_: 12e12)
    caplog.set_level("INFO")
    assert device.peak_flops(ON_CUDA, dtype) == expected
    is_unknown = expected == 12e12 and dtype is torch.bfloat16
    assert (f"measured rate: that of {name} is not listed" in caplog.text) == is_unknown


@pytest.mark.parametrize("is_new", [True, False])
def test_segments_of_the_allocator_expand_unless_the_user_has_configured_it(monkeypatch, is_new):
    settings: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", None, raising=False)
    owner, name = (
        (torch._C, "_accelerator_setAllocatorSettings")
        if is_new
        else (torch.cuda.memory, "_set_allocator_settings")
    )
    monkeypatch.setattr(owner, name, settings.append, raising=False)
    for given in device.ALLOCATOR_VARIABLES:
        for variable in device.ALLOCATOR_VARIABLES:
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv(given, "max_split_size_mb:128")
        device.use_expandable_segments()
    assert not settings, "the user's own"
    monkeypatch.delenv(given)
    device.use_expandable_segments()
    assert settings == ["expandable_segments:True"]
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")


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


def test_the_memory_of_a_gpu_is_what_this_process_may_have(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 15)
    share = 1.0
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: share)
    gpu = torch.device("cuda", 0)
    assert device.memory(gpu) == (100, 75)  # other processes have 25
    share = 0.5
    assert device.memory(gpu) == (100, 50)
    assert device.memory(torch.device("cpu")) is None
