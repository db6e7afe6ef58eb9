"""A batch that does not fit into the GPU's memory."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpt2.base.errors import TrainingError
from gpt2.train import trainer
from support import losses, small_config

# Float32 logits of a row take 50 MB, of all 32 rows 1.6 GB; the model itself 3 MB.
WIDE: dict[str, object] = {
    "block_size": 256,
    "total_batch_size": 32 * 256,
    "mini_batch_size": 32,
    "dtype": "float32",
    "compile": "off",
    "dropout": 0.0,
    "eval_interval": None,
    "max_steps": 2,
}
ROOM_BYTES = 700e6


@pytest.fixture
def little_memory(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Limits this process to ROOM_BYTES more of the GPU's memory."""
    monkeypatch.setattr(
        "gpt2.distributed.device.peak_flops", lambda *_: 1e12
    )  # measuring it takes more
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + ROOM_BYTES) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("little_memory")
def test_out_of_memory_names_what_fits(device: str, data_root: Path, tmp_path: Path):
    message = (
        r"32 rows of block_size=256 at once do not fit into the memory; use --mini_batch_size 16 "
        r"\(the total batch stays\), or --auto_mini_batch"
    )
    with pytest.raises(TrainingError, match=message):
        trainer.run(small_config(data_root, tmp_path, **WIDE, device=device))


def test_auto_mini_batch_finds_what_fits(
    device: str, data_root: Path, tmp_path: Path, caplog, request: pytest.FixtureRequest
):
    caplog.set_level("INFO")
    flags: dict[str, object] = {**WIDE, "device": device}
    trainer.run(small_config(data_root, tmp_path / "2", **{**flags, "mini_batch_size": 2}))
    request.getfixturevalue("little_memory")
    config = small_config(data_root, tmp_path / "auto", **flags, auto_mini_batch=True)
    assert trainer.run(config).state == "finished"
    found = re.search(r"--auto_mini_batch: (\d+) rows at once", caplog.text)
    assert found is not None
    assert 1 <= int(found[1]) < 32
    one, other = (losses(tmp_path / name / "logs/log.txt") for name in ("auto", "2"))
    assert one == pytest.approx(other, abs=1e-4)
