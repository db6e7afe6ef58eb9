import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import forked_ranks
from gpt2 import model
from gpt2.optim import muon
from gpt2.optim.muon import Muon
from gpt2.train import trainer
from optim.update_ranks import SHAPE, updated
from same_state import assert_same
from support import ROOT, losses, small_config, small_flags

SCRIPT = ROOT / "tests/optim/update_ranks.py"


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 16, 64), (2, 64, 16), (1, 1, 7)])
def test_orthogonalising_keeps_the_directions_and_makes_singular_values_alike(
    shape: tuple[int, int, int],
):
    torch.manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(shape[0], shape[1], min(shape[1:])))
    right, _ = torch.linalg.qr(torch.randn(shape[0], shape[2], min(shape[1:])))
    sizes = torch.logspace(-2, 0, min(shape[1:]))
    for scale in (1e-12, 1.0, 1e6):
        found = left.mT @ muon.orthogonalised(scale * (left * sizes) @ right.mT) @ right
        diagonal = torch.diagonal(found, dim1=-2, dim2=-1)
        assert float(diagonal.min()) > 0.85 and float(diagonal.max()) < 1.15
        assert float((found - torch.diag_embed(diagonal)).abs().max()) < 1e-3
    assert not muon.orthogonalised(torch.zeros(shape)).any()


def test_products_in_bfloat16_are_nearly_as_good():
    torch.manual_seed(0)
    matrices = torch.randn(2, 32, 96)
    exact = muon.orthogonalised(matrices)
    found = muon.orthogonalised(matrices, torch.bfloat16)
    assert found.dtype is torch.float32
    assert float((found - exact).norm() / exact.norm()) < 0.03


def test_momentum_is_that_of_torch_and_so_are_size_and_decay():
    """Only the orthogonalisation differs."""
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(8, 24))] for _ in range(2))
    one = Muon(ours, lr=0.1, weight_decay=0.3)
    other = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours[0].grad = torch.randn(8, 24)
        theirs[0].grad = ours[0].grad.clone()
        one.step()
        other.step()
    moments = [item.state_dict()["state"][0]["momentum_buffer"] for item in (one, other)]
    torch.testing.assert_close(*moments)
    one_weight, other_weight = ours[0].detach(), theirs[0].detach()
    assert float((one_weight - other_weight).norm() / (one_weight - 1).norm()) < 0.25
    again = Muon(ours, lr=1.0, weight_decay=0.0)
    again.load_state_dict(other.state_dict())
    assert again.param_groups[0]["lr"] == 0.1
    torch.testing.assert_close(again.state_dict()["state"], one.state_dict()["state"])
    again.load_state_dict(torch.optim.Muon(theirs).state_dict())  # as before the first update
    assert not again.state_dict()["state"][0]["momentum_buffer"].any()


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (8, 8)])
def test_every_neuron_moves_alike_in_the_long_run(shape: tuple[int, int]):
    """By hand, after Li et al. 2025, algorithm 1: rows of a tall matrix, columns of a wide one."""
    torch.manual_seed(0)
    directions = torch.randn(3, *shape)
    tall = shape[0] >= shape[1]
    squares = torch.zeros(1, *((shape[0], 1) if tall else (1, shape[1])))
    means = torch.zeros(max(shape))
    for direction in directions:
        found = muon.normalised_by_neuron(direction[None], squares, torch.tensor(0.05))[0]
        rows = direction if tall else direction.mT
        means = 0.95 * means + 0.05 * rows.square().mean(1)
        wanted = rows / means.sqrt()[:, None]
        wanted = wanted / wanted.norm() * min(shape) ** 0.5
        torch.testing.assert_close(found if tall else found.mT, wanted)
    kept = squares.clone()
    zeros = muon.normalised_by_neuron(torch.zeros(1, *shape), squares, torch.tensor(0.0))
    assert not zeros.any() and torch.equal(squares, kept)


def test_a_warm_up_of_the_momentum_is_of_the_first_updates_and_goes_on_after_a_load():
    assert [muon.momentum_at(update, 4) for update in (1, 2, 4, 9)] == pytest.approx(
        [0.875, 0.9, 0.95, 0.95]
    )
    assert muon.momentum_at(1, 0) == 0.95
    gradients = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))

    def updated(updates: slice, state: dict[str, Any] | None = None) -> dict[str, Any]:
        weight = torch.nn.Parameter(torch.ones(6, 8))
        optimizer = Muon([weight], lr=0.01, weight_decay=0.0, momentum_warmup=8)
        if state:
            optimizer.load_state_dict(state)
        for gradient in gradients[updates]:
            weight.grad = gradient
            optimizer.step()
        return optimizer.state_dict()

    whole = updated(slice(None))
    assert_same(whole, updated(slice(2, 3), updated(slice(2))))
    expected = torch.zeros(6, 8)
    for gradient, momentum in zip(gradients, (0.8625, 0.875, 0.8875), strict=True):
        expected = momentum * expected + (1 - momentum) * gradient
    torch.testing.assert_close(whole["state"][0]["momentum_buffer"], expected)


def test_cautious_decay_is_of_weights_that_the_update_moves_towards_zero():
    torch.manual_seed(0)
    start, gradient = torch.randn(6, 8), torch.randn(6, 8)
    moved = {}
    for name, decay, is_cautious in (
        ("none", 0.0, False),
        ("all", 0.5, False),
        ("some", 0.5, True),
    ):
        weight = torch.nn.Parameter(start.clone())
        weight.grad = gradient
        Muon([weight], lr=0.01, weight_decay=decay, is_cautious=is_cautious).step()
        moved[name] = weight.detach()
    agrees = (moved["none"] - start) * start < 0
    assert agrees.any() and not agrees.all()
    assert torch.equal(moved["some"], torch.where(agrees, moved["all"], moved["none"]))


@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_any_number_of_ranks_makes_the_same_update(name: str, tmp_path: Path):
    """Each updates its share; the moments of a checkpoint are whole, on any number of ranks."""
    one = updated(name, None, 3)
    assert {"AdamW", "Muon"} == one["optimizer"].keys()
    torch.save(one["optimizer"], tmp_path / "state.pt")
    for ranks in (2, 4) if name == "muon" else (4,):
        forked_ranks.run([str(tmp_path), str(tmp_path / "state.pt"), name], ranks, tmp_path, SCRIPT)
        of_ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(ranks)]
        for found, loaded in of_ranks:
            torch.testing.assert_close(found["weights"], one["weights"], rtol=1e-6, atol=1e-6)
            assert_same(loaded["optimizer"]["Muon"]["state"], one["optimizer"]["Muon"]["state"])
        for (found, _), (other, _) in itertools.pairwise(of_ranks):
            assert_same(found["weights"], other["weights"])


def test_each_rank_has_the_momentum_of_its_share_alone(monkeypatch: pytest.MonkeyPatch):
    hidden = list(model.build(SHAPE).hidden_matrices())
    count = sum(matrix.numel() for matrix in hidden)
    for ranks, places in ((1, 3), (2, 2), (3, 1), (4, 1)):
        numbers = []
        for rank in range(ranks):
            monkeypatch.setattr(muon, "_ranks", lambda of=(ranks, rank): of)
            stacks = Muon(hidden, 0.1, 0.0)._stacks
            assert sum(stack.momentum.numel() for stack in stacks) == count * places // 3
            numbers += [number for stack in stacks for number in stack.own]
        assert sorted(numbers) == list(range(len(hidden)))


def test_a_compiled_orthogonalisation_is_the_same(monkeypatch: pytest.MonkeyPatch):
    """As on CUDA, where it is in bfloat16."""
    torch.manual_seed(0)
    matrices = torch.randn(2, 16, 48)
    monkeypatch.setitem(muon.PRODUCTS, "cpu", torch.bfloat16)
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda net, **kinds: compile(net, backend="aot_eager", **kinds)
    )
    muon._orthogonalise.cache_clear()
    try:
        found = muon._orthogonalise("cpu")(matrices)
    finally:
        muon._orthogonalise.cache_clear()
    assert torch.equal(found, muon.orthogonalised(matrices, torch.bfloat16))


@pytest.mark.soak
def test_a_run_on_ranks_stops_and_goes_on_as_one(data_root: Path, tmp_path: Path):
    """Bit-identical on the same number of ranks, with the losses of one rank on another one. AdamW
    is divided, too."""
    options = {
        "optimizer": "muon",
        "shard_optimizer": True,
        "dropout": 0,
        "checkpoint_interval": 4,
        "decay_steps": 8,
    }
    whole, parts, one = (tmp_path / name for name in ("whole", "parts", "one"))
    trainer.run(small_config(data_root, one, **options, max_steps=8))
    for out, *parts_of in ((whole, (8,)), (parts, (4, 8))):
        for steps in parts_of[0]:
            flags = small_flags(data_root, out, **options, max_steps=steps, resume="latest")
            forked_ranks.run(flags, 3, tmp_path)
    kept = [
        torch.load(out / "checkpoints/step_000008.pt", weights_only=False) for out in (whole, parts)
    ]
    for name in ("model", "optimizer"):
        assert_same(kept[0][name], kept[1][name])
    trainer.run(small_config(data_root, parts, **options, max_steps=8, resume="4"))
    assert losses(parts / "logs/log.txt") == pytest.approx(losses(one / "logs/log.txt"), abs=1e-4)
