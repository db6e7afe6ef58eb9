"""Which graphs a run compiles."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

import forked_ranks
from gpt2.train import compile_cache, trainer
from run_compiled import RecordingBackend
from support import LOSS_TOLERANCE, ROOT, losses, small_config

SCRIPT = ROOT / "tests" / "run_compiled.py"


def test_each_shape_has_a_graph_of_its_own(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The validation before the first step has an odd last batch, and so has each step."""
    import torch._dynamo  # seconds to import

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    backend = RecordingBackend()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    changes = {"mini_batch_size": 3, "max_steps": 2, "eval_interval": 1, "compile": "on"}
    trainer.run(small_config(data_root, tmp_path, **changes))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    assert sorted(backend.shapes) == [(1, 8), (2, 8), (3, 8), (3, 8)]
    assert all(type(size) is int for shape in backend.shapes for size in shape)


def test_more_shapes_than_torch_compiles_by_default_have_graphs(monkeypatch: pytest.MonkeyPatch):
    """A ramp has shapes of its own in each phase; torch stops compiling after eight."""
    backend = RecordingBackend()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    embedding = compile_cache.compiled(torch.nn.Embedding(3, 2))
    for rows in range(1, 13):
        embedding(torch.zeros(rows, 8, dtype=torch.long))
    assert backend.shapes == [(rows, 8) for rows in range(1, 13)]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_compiled_ranks_train_as_one_that_is_not(ranks: int, data_root: Path, tmp_path: Path):
    """By the backend that differentiates as Inductor does, with gradients exchanged in parts."""
    options = {"max_steps": 3, "mini_batch_size": 3, "dropout": 0}
    trainer.run(small_config(data_root, tmp_path / "one", **options))
    values = [f"{name}={value}" for name, value in options.items()]
    out = tmp_path / "ranks"
    given = [str(data_root), str(out), "backend=aot_eager", *values]
    printed = forked_ranks.run(given, ranks, tmp_path, SCRIPT)
    assert printed.count("frames ") == ranks
    one, other = (losses(folder / "logs/log.txt") for folder in (tmp_path / "one", out))
    assert list(other) == [1, 2, 3]
    assert other == pytest.approx(one, abs=LOSS_TOLERANCE["float32"])


def test_gradients_are_exchanged_between_parts_of_a_graph_after_rows_are_fitted(
    gpt2_tokens: Path, tmp_path: Path
):
    arguments = [str(gpt2_tokens), str(tmp_path), "mini_batch_size=8", "total_batch_size=64"]
    printed = forked_ranks.run(
        [*arguments, "max_steps=2", "eval_interval=None", "n_layer=1", "block_size=4"],
        2,
        tmp_path,
        SCRIPT,
    )
    assert "--auto_mini_batch: 4 rows at once" in printed
    assert list(losses(tmp_path / "logs/log.txt")) == [1, 2]
    counts = re.findall(r"rank \d: frames (\d+), graphs (\d+)", printed)
    assert len(counts) == 2
    for frames, graphs in counts:
        assert int(frames) == 2  # of 8 rows, and of the 4 that fit
        assert int(graphs) > int(frames)
