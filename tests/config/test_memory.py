"""What the forward pass saves for the backward pass, counted, and what follows from it."""

import pytest
import torch
from torch import nn

from gpt2 import model
from gpt2.config import memory, options, presets
from gpt2.config.memory import Computation
from gpt2.config.model import ModelConfig
from modern_parts import PARTS

ROWS, LENGTH = 4, 64
SHAPES = {
    "gpt2": ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=LENGTH),
    "gpt2, deeper": ModelConfig(n_layer=5, n_head=8, n_embd=128, block_size=LENGTH),
    "gpt2, wide": ModelConfig(n_layer=2, n_head=4, n_embd=384, block_size=LENGTH, bias=False),
    "modern": ModelConfig("modern", n_layer=3, n_head=4, n_embd=128, block_size=LENGTH),
    "modern, whole": ModelConfig(
        "modern", n_layer=6, n_head=4, n_embd=128, block_size=LENGTH, **PARTS
    ),
    "mlp": ModelConfig("mlp", n_layer=3, n_head=4, n_embd=128, block_size=LENGTH, window=8),
}


class Features(nn.Module):
    """A model without its head, whose logits are not saved."""

    def __init__(self, config: ModelConfig, how: Computation) -> None:
        super().__init__()
        self.model = model.build(config)
        self.model.residual_dtype = torch.bfloat16 if how.is_half_residual else None

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return self.model.features(tokens_BT, torch.arange(tokens_BT.size(1)), None)


def counted_bytes(config: ModelConfig, how: Computation) -> int:
    """What a forward pass saves, without the weights' own memory."""
    plain = Features(config, how)
    net = plain
    if how.is_compiled:  # with the partitioner that decides for Inductor what is computed again
        backend = "aot_eager_decomp_partition"
        net = torch.compile(plain, dynamic=False, backend=backend)
    weights = {part.untyped_storage().data_ptr() for part in plain.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    tokens_BT = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how.is_half):
        net(tokens_BT)  # compiles
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            result = net(tokens_BT)
    assert result.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


def estimated_bytes(config: ModelConfig, how: Computation) -> int:
    """The same as `memory` has it: without what it counts for features and the head, which this
    pass has not, but with the matrices' copies in 16 bits."""
    tables = config.embedding_rows * (1 + config.untied_head + len(config.value_layers))
    embeddings = tables + (config.block_size if config.architecture == "gpt2" else 0)
    matrices = memory.flops.parameter_count(config) - embeddings * config.n_embd
    outside = (memory.OUTSIDE_WIDTHS[how.is_half] - 4) * config.n_embd
    per_token = memory.saved_bytes_per_token(config, how) - outside
    return ROWS * LENGTH * per_token + (2 * matrices if how.is_half else 0)


@pytest.mark.parametrize("is_half", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_much_is_saved_as_estimated(shape: str, is_half: bool):
    how = Computation(is_half, is_compiled=False)
    found = counted_bytes(SHAPES[shape], how)
    assert 0.98 * found < estimated_bytes(SHAPES[shape], how) < 1.1 * found


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch itself
@pytest.mark.parametrize(
    ("shape", "is_half_residual"),
    [
        ("gpt2", False),
        ("gpt2, deeper", True),
        pytest.param("modern", False, marks=pytest.mark.soak),
        pytest.param("modern", True, marks=pytest.mark.soak),
        pytest.param("modern, whole", True, marks=pytest.mark.soak),
    ],
)
def test_as_much_is_saved_as_estimated_when_compiled(shape: str, is_half_residual: bool):
    torch.compiler.reset()
    how = Computation(is_half=True, is_compiled=True, is_half_residual=is_half_residual)
    found = counted_bytes(SHAPES[shape], how)
    assert 0.98 * found < estimated_bytes(SHAPES[shape], how) < 1.1 * found


def test_the_bytes_of_gpt2_compiled_in_bfloat16():
    """38 bytes for each token, layer and unit of width (DataConfig's default at 64 rows: 23 GB)."""
    how = Computation(is_half=True, is_compiled=True)
    config = ModelConfig()
    blocks = memory.saved_bytes_per_token(config, how) - 14 * 768
    assert 64 * 1024 * blocks == pytest.approx(64 * 1024 * 12 * 38 * 768, rel=0.005)
    assert memory.head_bytes(config, how) < 1.6e9  # for any number of rows


@pytest.mark.parametrize("preset", ["gpt2-124m", "gpt2-350m", "gpt2-774m", "gpt2-1558m"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_more_memory_takes_larger_micro_batches(preset: str, ranks: int):
    run = presets.preset(preset)
    how = memory.computation(run, ranks)
    found = [memory.rows_on_card(run, size, ranks) for size in memory.CARDS_GB]
    assert found == sorted(found) and found[-1] > 0
    for size, rows in zip(memory.CARDS_GB, found, strict=True):
        used = memory.step_bytes(run.model, rows, how) + memory.overhead_bytes(ranks)
        assert used < size * 1e9 or rows == 0
        assert rows * run.model.block_size <= memory.MOST_TOKENS


def test_a_step_is_divided_evenly_where_that_costs_little():
    run = options.overlay(presets.preset("gpt2-124m"), {"total_batch_size": 1024 * 120})

    def automatic(most: int, ranks: int) -> int:
        how = Computation(is_half=True, is_compiled=True, ranks=ranks)
        enough = memory.step_bytes(run.model, most, how) / memory.USABLE
        return memory.automatic_rows(run, int(enough) + 1, how)

    assert automatic(50, ranks=1) == 40  # 3 micro-batches of 120 rows
    assert automatic(64, ranks=4) == 30  # all at once
    assert automatic(20, ranks=2) == 20
    assert automatic(25, ranks=7) == 18  # all of the largest share
    assert automatic(7, ranks=9) == 7  # of 14
    prime = options.overlay(run, {"total_batch_size": 1024 * 113})
    how = Computation(is_half=True, is_compiled=True)
    enough = int(memory.step_bytes(run.model, 50, how) / memory.USABLE) + 1
    assert memory.automatic_rows(prime, enough, how) == 38  # 38, 38, 37
    assert memory.automatic_rows(prime, 10**9, how) == 0


def test_an_architecture_that_is_not_listed_is_not_underestimated(monkeypatch):
    for name in memory.SAVED:
        config = ModelConfig(name, n_embd=768, window=8)
        how = Computation(is_half=True, is_compiled=False)
        known = memory.step_bytes(config, 8, how)
        with monkeypatch.context() as patch:
            patch.delitem(memory.SAVED, name)
            assert memory.step_bytes(config, 8, how) >= known


def test_muon_keeps_one_moment_of_hidden_matrices():
    sizes = {}
    for optimizer in ("adamw", "muon", "normuon"):
        for ranks in (1, 4):
            how = Computation(True, True, ranks, optimizer=optimizer)
            sizes[optimizer, ranks] = memory.state_bytes(ModelConfig(), how)
    hidden = 12 * 12 * 768 * 768
    neurons = 12 * 12 * 768
    assert sizes["adamw", 1] - sizes["muon", 1] == 4 * hidden
    assert sizes["adamw", 4] - sizes["muon", 4] == 7 * hidden  # 8 bytes, and 4 / 4
    assert sizes["normuon", 1] - sizes["muon", 1] == 4 * neurons
