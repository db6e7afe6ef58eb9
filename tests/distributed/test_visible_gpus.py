import os

import pytest

from gpt2.base.errors import ConfigError
from gpt2.distributed import visible_gpus


@pytest.mark.parametrize(
    ("given", "ids", "left"),
    [
        ("0-2,5", ["0", "1", "2", "5"], "0,1,2,5"),
        ("all", None, None),
        ("NoDevFiles", [], ""),
        (" 3 ,-1,4", ["3"], "3"),
        ("GPU-8f3a", ["GPU-8f3a"], "GPU-8f3a"),
    ],
)
def test_cuda_reads_what_was_meant(monkeypatch, given: str, ids: list[str] | None, left):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    for _ in range(2):
        assert visible_gpus.ids() == ids
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == left


def test_an_invalid_list_is_refused_and_stays(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0 1")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES '0 1': '0 1' is not a GPU"):
        visible_gpus.ids()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0 1"


def test_the_ids_of_the_gpus_that_cuda_counts(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus.ids_of(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,9")
    assert visible_gpus.ids_of(2) == ["7", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-8f,MIG-9e")
    assert visible_gpus.ids_of(1) == ["MIG-8f", "MIG-9e"], "CUDA shows a process one of them"
    assert visible_gpus.ids_of(0) == []
