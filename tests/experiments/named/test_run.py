"""Which slots named experiments have."""

import os

import pytest

from gpt2.experiments.named import run


@pytest.mark.parametrize("hidden", ["-1", "", "none", "NoDevFiles"])
def test_shares_of_the_cores_see_no_gpu(monkeypatch: pytest.MonkeyPatch, hidden: str):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    shares = run.slots_of()
    assert [slot.name for slot in shares] == ["cpu0", "cpu1"]
    assert shares[0].environment == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"}
    assert [slot.name for slot in run.slots_of(max_gpus=1)] == ["cpu0"]


def test_each_gpu_is_a_slot(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-89/1/0, 3,-1,4")
    named = run.slots_of()
    visible = [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in named]
    assert visible == ["MIG-GPU-89/1/0", "3"] and named[1].name == "gpu3"
    assert [slot.name for slot in run.slots_of(["5", "7", "8"], max_gpus=2)] == ["gpu5", "gpu7"]
