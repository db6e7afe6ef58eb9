import itertools
from pathlib import Path

import pytest
import torch

import forked_ranks
from same_state import assert_same
from support import ROOT, losses, small_flags

SCRIPT = ROOT / "tests/train/gradient_ranks.py"


@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_are_exchanged_in_half_the_bytes(ranks: int, data_root: Path, tmp_path: Path):
    """They are the same on all ranks, and those of float32 but for their rounding; what a rank adds
    up before the exchange is not rounded."""
    flags = small_flags(data_root, tmp_path / "run", vocab_size=128)
    forked_ranks.run([str(tmp_path), *flags], ranks, tmp_path, SCRIPT)
    of_ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(ranks)]
    for found, other in itertools.pairwise(of_ranks):
        assert_same(found, other)
    exact, rounded = (of_ranks[0][dtype]["gradients"] for dtype in ("float32", "bfloat16"))
    for name, gradient in exact.items():
        assert rounded[name].dtype is torch.float32
        apart = (rounded[name] - gradient).norm()
        assert 0 < apart < 2**-8 * ranks * gradient.norm()
    assert 2 * of_ranks[0]["bfloat16"]["bytes"] == of_ranks[0]["float32"]["bytes"]


@pytest.mark.parametrize(
    "options",
    [{"optimizer": "adamw"}, {"optimizer": "normuon", "shard_optimizer": True}],
    ids=["adamw", "normuon, all moments divided"],
)
def test_a_run_stops_and_goes_on_bit_by_bit(options: dict, data_root: Path, tmp_path: Path):
    """On three ranks, whose sums depend on the layout of the buckets; one of them has fewer
    micro-batches than the others. The losses are those of float32, nearly."""
    more = {**options, "mini_batch_size": 1, "checkpoint_interval": 3, "decay_steps": 6}
    whole, parts, exact = (tmp_path / name for name in ("whole", "parts", "exact"))
    for out, ends, dtype in (
        (whole, (6,), "bfloat16"),
        (parts, (3, 6), "bfloat16"),
        (exact, (6,), "float32"),
    ):
        for steps in ends:
            values = {**more, "max_steps": steps, "resume": "latest"}
            if steps == ends[0]:  # then it is that of the checkpoint
                values["grad_dtype"] = dtype
            flags = small_flags(data_root, out, **values)
            forked_ranks.run(flags, 3, tmp_path)
    kept = [
        torch.load(out / "checkpoints/step_000006.pt", weights_only=False)
        for out in (whole, parts, exact)
    ]
    for name in ("model", "optimizer"):
        assert_same(kept[0][name], kept[1][name])
    found, expected = (losses(out / "logs/log.txt") for out in (whole, exact))
    assert found != expected
    assert found == pytest.approx(expected, abs=0.01)
