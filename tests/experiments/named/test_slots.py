"""Which slots named experiments have."""

import os

import pytest

from gpt2.experiments.named import slots


@pytest.mark.parametrize(
    ("text", "ids", "all_valid"),
    [
        ("0,2", ["0", "2"], True),
        (" 3 ,-1,4", ["3"], False),
        ("1,", ["1"], True),
        ("", [], False),
    ],
)
def test_ids_end_at_the_first_invalid_one(text: str, ids: list[str], all_valid: bool):
    assert slots.valid_ids(text) == (ids, all_valid)


def test_shares_of_the_cores_see_no_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    shares = slots.of_machine()
    assert [slot.name for slot in shares] == ["cpu0", "cpu1"]
    assert shares[0].environment == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"}


def test_each_gpu_is_a_slot(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-89/1/0, 3,-1,4")
    named = slots.of_machine()
    visible = [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in named]
    assert visible == ["MIG-GPU-89/1/0", "3"] and named[1].name == "gpu3"
