from pathlib import Path

import pytest
import torch

import forked_ranks
from gpt2.config import memory
from gpt2.config.memory import Computation
from gpt2.config.model import ModelConfig
from gpt2.optim import sharded
from optim.update_ranks import updated
from same_state import assert_same
from support import ROOT

SCRIPT = ROOT / "tests/optim/update_ranks.py"


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_it_is_adamw_bit_by_bit_on_any_number_of_ranks(name: str, tmp_path: Path):
    """Also its state, which is whole on rank 0 and loads on any number of ranks."""
    one = updated(name, None, 3)
    torch.save(one["optimizer"], tmp_path / "state.pt")

    def of_adamw(found: dict) -> dict:
        return found["optimizer"]["AdamW"] if name == "muon" else found["optimizer"]

    ranks = 3 if name == "adamw" else 2
    forked_ranks.run([str(tmp_path), str(tmp_path / "state.pt"), name], ranks, tmp_path, SCRIPT)
    of_ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(ranks)]
    for found, _ in of_ranks:
        assert_same(found["weights"], of_ranks[0][0]["weights"])
        if name == "adamw":
            assert_same(found["weights"], one["weights"])
    first, loaded = of_ranks[0]
    assert of_adamw(one)["state"]
    assert_same(of_adamw(first)["state"], of_adamw(one)["state"])
    assert_same(of_adamw(loaded), of_adamw(one))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shares_are_as_equal_as_whole_weights_allow(ranks: int):
    sizes = [100, 7, 40, 40, 40, 1, 1, 60]
    owners = sharded.owners(sizes, ranks)
    of_ranks = [
        sum(s for s, owner in zip(sizes, owners, strict=True) if owner == rank)
        for rank in range(ranks)
    ]
    assert max(of_ranks) == sharded.largest_share(sizes, ranks)
    assert sum(of_ranks) == sum(sizes)
    assert max(of_ranks) <= max(100, sum(sizes) / ranks + 60)
    assert 0 in owners


def test_its_memory_is_estimated():
    whole, shared = (Computation(True, True, ranks=4, is_sharded=is_on) for is_on in (False, True))
    model = ModelConfig(vocab_size=50304)
    saved = memory.state_bytes(model, whole) - memory.state_bytes(model, shared)
    assert saved == memory.state_bytes(model, whole) * 6 // 22
