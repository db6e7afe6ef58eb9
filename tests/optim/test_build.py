import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from gpt2 import model
from gpt2.base.errors import ConfigError
from gpt2.config.model import ModelConfig
from gpt2.config.run import OPTIMIZERS, OptimConfig
from gpt2.model.base import LanguageModel
from gpt2.optim import build, combined

SHAPE = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8)


def test_matrices_decay_and_vectors_do_not():
    net = model.build(SHAPE)
    decayed, plain = build.build_optimizer(net, OptimConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(part.dim() >= 2 for part in decayed["params"])
    assert all(part.dim() < 2 for part in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(net.parameters()))


def test_learning_rate_reaches_every_group():
    optimizer = build.build_optimizer(model.build(SHAPE), OptimConfig())
    build.set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_embeddings_head_and_vectors_may_have_rates_of_their_own(optimizer: str):
    """A weight decays by the same share in a step, whatever its rate is."""
    ratios = {"embedding_lr_ratio": 8.0, "head_lr_ratio": 0.5, "scalar_lr_ratio": 2.0}
    shape = replace(SHAPE, architecture="modern", untied_head=True, embedding_skip=True)
    net = model.build(shape)
    ours = build.build_optimizer(net, OptimConfig(optimizer=optimizer, weight_decay=0.4, **ratios))
    build.set_options(ours, OptimConfig(optimizer=optimizer, weight_decay=0.1, **ratios))
    build.set_learning_rate(ours, 0.125)
    names = {id(part): name for name, part in net.named_parameters()}
    found = {
        names[id(part)].partition(".")[0]: (group["lr"], group["weight_decay"] * group["lr"])
        for group in ours.param_groups
        for part in group["params"]
    }
    assert found == {
        "token_embedding": (1.0, 0.0125),
        "head": (0.0625, 0.0125),
        "stream_scales": (0.25, 0.0),
        "embedding_scales": (0.25, 0.0),
        "blocks": (0.125, 0.0125),
    }


def test_an_unknown_optimizer_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"optimizer=adam is unknown.*adamw.*expected one of"):
        OptimConfig(optimizer="adam")


def with_gradients(optimizer: str, seed: int = 0) -> tuple[LanguageModel, Any]:
    torch.manual_seed(seed)
    net = model.build(SHAPE)
    for part in net.parameters():
        part.grad = torch.randn_like(part)
    return net, build.build_optimizer(net, OptimConfig(optimizer=optimizer))


@pytest.mark.parametrize("limit", [1.0, 1e9, None])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_update_is_a_step_with_clipped_gradients(optimizer: str, limit: float | None):
    (net, ours), (other, theirs) = with_gradients(optimizer), with_gradients(optimizer)
    for _ in range(2):  # the second one shows what the first has left
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), limit or float("inf"))
        assert float(norm) > 10
        for part in theirs.parts if isinstance(theirs, combined.CombinedOptimizer) else [theirs]:
            part.step()
        assert float(build.gradient_norm(net)) == pytest.approx(float(norm))
        ours.clip_and_step(build.gradient_norm(net), limit, torch.tensor(True))
        for one, two in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
            one.grad, two.grad = torch.full_like(one, 0.1), torch.full_like(two, 0.1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_update_that_is_no_good_changes_nothing(optimizer: str):
    net, ours = with_gradients(optimizer)
    ours.clip_and_step(build.gradient_norm(net), 1.0, torch.tensor(True))
    parts = ours.parts if isinstance(ours, combined.CombinedOptimizer) else [ours]

    def all_that_changes() -> list[Any]:
        return [net.state_dict(), *(part.state_dict()["state"] for part in parts)]

    before = copy.deepcopy(all_that_changes())
    next(net.parameters()).grad[0, 0] = float("nan")
    ours.clip_and_step(build.gradient_norm(net), 1.0, torch.tensor(False))
    torch.testing.assert_close(all_that_changes(), before, rtol=0, atol=0)


@pytest.mark.parametrize("limit", [1.0, None])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_update_from_scaled_gradients_is_that_from_the_gradients(
    optimizer: str, limit: float | None
):
    (net, ours), (scaled_net, scaled) = with_gradients(optimizer), with_gradients(optimizer)
    norm, scale = build.gradient_norm(net), torch.tensor(2.0**12)
    for part in scaled_net.parameters():
        part.grad *= scale
    ours.clip_and_step(norm, limit, torch.tensor(True))
    scaled.clip_and_step(norm, limit, torch.tensor(True), scale)
    for one, two in zip(net.parameters(), scaled_net.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["gpt2", "modern", "mlp"])
def test_muon_has_the_hidden_matrices_and_adamw_the_rest(architecture: str):
    net = model.build(replace(SHAPE, architecture=architecture, window=8))
    optimizer = build.build_optimizer(
        net, OptimConfig(optimizer="muon", weight_decay=0.3, beta2=0.9)
    )
    hidden, decayed, plain = optimizer.param_groups
    names = {id(part): name for name, part in net.named_parameters()}
    found = [[names[id(part)] for part in group["params"]] for group in (hidden, decayed, plain)]
    assert sorted([name for group in found for name in group]) == sorted(names.values())
    assert all("embedding" in name for name in found[1]) and found[1]
    assert all(part.dim() == 2 for part in hidden["params"]) and len(found[0]) >= 3
    assert hidden["weight_decay"] == decayed["weight_decay"] == 0.3 and plain["weight_decay"] == 0
    build.set_options(optimizer, OptimConfig(weight_decay=0.5, beta1=0.8))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5, 0.0]
    assert decayed["betas"] == (0.8, 0.95) and "betas" not in hidden


def test_an_update_of_muon_is_orthogonal_and_as_large_as_one_of_adamw():
    """Singular values are alike, and the root mean square is near 0.2 (Liu et al. 2025, section
    2.2); five iterations leave both inexact."""
    torch.manual_seed(0)
    net = model.build(replace(SHAPE, n_embd=32))
    before = net.blocks[0].mlp.up.weight.detach().clone()
    optimizer = build.build_optimizer(
        net, OptimConfig(optimizer="muon", learning_rate=1.0, weight_decay=0.0)
    )
    for part in net.parameters():
        part.grad = torch.randn_like(part)
    optimizer.clip_and_step(build.gradient_norm(net), None, torch.tensor(True))
    change = net.blocks[0].mlp.up.weight.detach() - before
    sizes = torch.linalg.svdvals(change)
    assert float(sizes.max() / sizes.min()) < 2.5, "those of the gradient differ by more"
    assert float(change.square().mean().sqrt()) == pytest.approx(0.2, rel=0.25)
