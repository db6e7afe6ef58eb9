"""Several GPUs: ranks in real processes under torchrun, with NCCL."""

from pathlib import Path

import pytest
import torch

from support import losses, run_command, small_flags, train_command


def test_two_gpus_train_as_one(device: str, data_root: Path, tmp_path: Path):
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    found = {}
    for ranks in (None, 2):
        out = tmp_path / str(ranks)
        options = {"device": device, "dtype": "float32", "compile": "off", "dropout": 0.0}
        flags = small_flags(data_root, out, **options, max_steps=8)
        run_command(train_command(flags, ranks=ranks))
        found[ranks] = losses(out / "logs" / "log.txt")
    assert list(found[2]) == list(range(1, 9))
    assert found[2][8] < found[2][1] - 0.1  # they learn at all
    assert found[2] == pytest.approx(found[None], abs=5e-4)
