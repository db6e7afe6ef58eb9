import logging
import os

import pytest
import torch

from gpt2.base.errors import ConfigError
from gpt2.experiments.pool import slots


def test_without_gpus_slots_share_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS")
    found = slots.of_machine()
    assert [slot.name for slot in found] == ["cpu0", "cpu1"]
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    assert [slot.environment for slot in found] == [hidden | {"OMP_NUM_THREADS": "6"}] * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert slots.of_machine(3)[2].environment == hidden | {"OMP_NUM_THREADS": "1"}
    for refused in ({"gpus": ["0"]}, {"device": "cuda"}):
        with pytest.raises(ConfigError, match="GPU"):
            slots.of_machine(**refused)


def test_each_gpu_is_a_slot_by_its_own_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5,GPU-8f3a-11")

    def seen(**options: object) -> dict[str, str]:
        found = slots.of_machine(**options)
        return {slot.name: slot.environment["CUDA_VISIBLE_DEVICES"] for slot in found}

    assert seen() == {"gpu2": "2", "gpu5": "5", "gpu-8f3a-11": "GPU-8f3a-11"}
    assert seen(gpus=["5"]) == {"gpu5": "5"}
    assert seen(max_gpus=2) == seen(count=2) == {"gpu2": "2", "gpu5": "5"}
    assert seen(gpus=["5"], count=2) == {"gpu5": "5", "gpu5_2": "5"}, "two share a GPU"
    assert [slot.name for slot in slots.of_machine(device="cpu")] == ["cpu0", "cpu1"]
    with pytest.raises(ConfigError, match="no GPU 0; available: 2, 5, GPU-8f3a-11"):
        slots.of_machine(gpus=["0"])
    assert seen(gpus=["GPU-8f"]) == {"gpu-8f3a-11": "GPU-8f3a-11"}, "the beginning of a UUID"
    assert [slot.name for slot in slots.of_machine(gpus=[])] == ["cpu0", "cpu1"]
    with pytest.raises(ConfigError, match="device=cuda, but --gpus chooses none"):
        slots.of_machine(gpus=[], device="cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1-2")
    assert seen() == {"gpu1": "1", "gpu2": "2"}
    with pytest.raises(ConfigError, match="no GPU GPU-8f; available: 1, 2"):
        slots.of_machine(gpus=["GPU-8f"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0 1")
    with pytest.raises(ConfigError, match="'0 1' is not a GPU"):
        slots.of_machine(device="cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert seen() == {"gpu0": "0", "gpu1": "1", "gpu2": "2"}
    assert seen(gpus=["GPU-8f", "1"]) == {"gpu-8f": "GPU-8f", "gpu1": "1"}


def test_ddp_gives_each_slot_several_gpus(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    gpus = ["0", "1", "2", "5", "7"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(gpus))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    monkeypatch.delenv("OMP_NUM_THREADS")
    caplog.set_level(logging.INFO, logger="gpt2")

    def seen(**options: object) -> dict[str, tuple[str, ...]]:
        found = slots.of_machine(ddp=2, **options)
        return {slot.name: tuple(slot.environment.values()) for slot in found}

    assert seen() == {"gpu0-1": ("0,1", "8"), "gpu2-5": ("2,5", "8")}
    assert caplog.messages == ["GPU 7 is left over: --ddp 2 takes 2 at a time"]
    assert seen(count=1) == seen(gpus=["0", "1"]) == {"gpu0-1": ("0,1", "16")}
    shared = {"gpu0-1": ("0,1", "5"), "gpu2-5": ("2,5", "5"), "gpu0-1_2": ("0,1", "5")}
    assert seen(count=3) == shared, "in turn"
    assert seen(gpus=["7", "2", "1"], max_gpus=2) == {"gpu7-2": ("7,2", "16")}
    assert seen(device="cpu") == {"cpu0": ("", "8"), "cpu1": ("", "8")}
    with pytest.raises(ConfigError, match=r"needs 2 GPUs, got 1 GPU \(5\); use --ddp 1"):
        seen(gpus=["5"])
    with pytest.raises(ConfigError, match=r"got 5 GPUs \(0, 1, 2, 5, 7\); use --ddp 5"):
        slots.of_machine(ddp=8)
    gpus[:] = ["GPU-8f3a-11", "GPU-77"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(gpus))
    assert seen() == {"gpu-8f3a-11-gpu-77": ("GPU-8f3a-11,GPU-77", "16")}
