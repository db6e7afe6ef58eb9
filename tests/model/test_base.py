"""Tests of every architecture."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from gpt2 import model
from gpt2.config.model import ARCHITECTURES, ModelConfig
from gpt2.config.run import OptimConfig
from gpt2.model import layers
from gpt2.model.base import LanguageModel
from gpt2.optim.build import build_optimizer, set_learning_rate
from modern_parts import PARTS

SHAPE = ModelConfig(n_layer=3, n_head=4, n_embd=32, block_size=24, window=5)


def perturbed(architecture: str, **flags: Any) -> LanguageModel:
    torch.manual_seed(0)
    built = model.build(replace(SHAPE, architecture=architecture, **flags)).eval()
    with torch.no_grad():  # initial zeros would hide a bias or norm in the wrong place
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return built


@pytest.fixture(params=[*ARCHITECTURES, "modern, whole"])
def net(request: pytest.FixtureRequest) -> LanguageModel:
    architecture, _, parts = request.param.partition(", ")
    return perturbed(architecture, **(PARTS if parts else {}))


def test_loss_is_a_float32_sum(net: LanguageModel):
    tokens_BT = torch.randint(50257, (4, 24))
    targets_BT = torch.randint(50257, (4, 24))
    with torch.no_grad():
        exact = net(tokens_BT, targets_BT)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            whole = net(tokens_BT, targets_BT)
            halves = net(tokens_BT[:1], targets_BT[:1]) + net(tokens_BT[1:], targets_BT[1:])
    assert whole.dtype == torch.float32
    assert whole.shape == ()
    assert float(whole) == pytest.approx(float(halves), rel=1e-3)
    assert float(whole) == pytest.approx(float(exact), rel=1e-3)


def test_a_token_sees_nothing_after_it(net: LanguageModel):
    tokens_BT = torch.randint(50257, (1, 24))
    other_BT = tokens_BT.clone()
    other_BT[0, 12:] = torch.randint(50257, (12,))
    with torch.no_grad():
        before_BTV, after_BTV = net.logits(tokens_BT), net.logits(other_BT)
    assert torch.allclose(before_BTV[0, :12], after_BTV[0, :12], atol=1e-5)
    assert not torch.allclose(before_BTV[0, 12], after_BTV[0, 12], atol=1e-2)


@pytest.mark.parametrize("parts", [[24], [10, 1, 1, 12], [1] * 24])
def test_cached_logits_are_the_uncached_ones(net: LanguageModel, parts: list[int]):
    tokens_BT = torch.randint(50257, (2, 24))
    cache = net.empty_cache(batch_size=2)
    with torch.no_grad():
        expected_BTV = net.logits(tokens_BT)
        for _ in range(2):
            found = [net.logits(part, cache) for part in tokens_BT.split(parts, dim=1)]
            assert torch.allclose(torch.cat(found, dim=1), expected_BTV, atol=1e-4)
            cache.length = 0


def test_next_logits_are_the_last_ones(net: LanguageModel):
    tokens_BT = torch.randint(50257, (2, 24))
    with torch.no_grad():
        expected_BV = net.logits(tokens_BT)[:, -1]
        assert torch.allclose(net.next_logits(tokens_BT), expected_BV, atol=1e-5)


def test_a_shared_prefix_is_read_into_the_cache_as_one_row(net: LanguageModel):
    tokens_BT = torch.randint(50257, (3, 24))
    tokens_BT[:, :10] = tokens_BT[0, :10]
    cache = net.empty_cache(batch_size=3)
    with torch.no_grad():
        expected_BTV = net.logits(tokens_BT)
        first_BV = net.next_logits(tokens_BT[:1, :10], cache)
        rest_BTV = net.logits(tokens_BT[:, 10:], cache)
    assert torch.allclose(first_BV.expand(3, -1), expected_BTV[:, 9], atol=1e-4)
    assert torch.allclose(rest_BTV, expected_BTV[:, 10:], atol=1e-4)


def test_a_mask_and_positions_pack_two_texts_into_one_row(net: LanguageModel):
    """A prefix of 8 tokens with continuations of 6 and 4, and the prefix with the second alone."""
    tokens_BT = torch.randint(50257, (1, 18))
    hidden_BTT = torch.ones(1, 18, 18, dtype=torch.bool).tril()
    hidden_BTT[:, 14:, 8:14] = False
    positions_BT = torch.cat([torch.arange(14), torch.arange(8, 12)])[None]
    alone_BT = torch.cat([tokens_BT[:, :8], tokens_BT[:, 14:]], dim=1)
    with torch.no_grad():
        packed_BTD = net.features(tokens_BT, positions_BT, hidden_BTT)
        alone_BTD = net.features(alone_BT, torch.arange(12), None)
    assert torch.allclose(packed_BTD[:, 14:], alone_BTD[:, 8:], atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_cudnn_does_not_attend_where_lengths_vary(
    architecture: str, monkeypatch: pytest.MonkeyPatch
):
    """It prepares a plan for each shape. Training has one shape, and may use it."""
    net, allowed = perturbed(architecture), list[bool]()
    attend = layers.F.scaled_dot_product_attention

    def noted(*given: torch.Tensor, **options: Any) -> torch.Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*given, **options)

    monkeypatch.setattr(layers.F, "scaled_dot_product_attention", noted)
    tokens_BT, positions_T = torch.randint(50257, (2, 24)), torch.arange(24)
    mask_BTT = torch.ones(2, 24, 24, dtype=torch.bool).tril()
    with torch.no_grad():
        net(tokens_BT, tokens_BT)
        net.features(tokens_BT, positions_T, mask_BTT)
        net.logits(tokens_BT, net.empty_cache(2))
        net(tokens_BT, tokens_BT)
    assert allowed == [True] * 3 + [False] * 6 + [True] * 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_initialisation(architecture: str):
    """The loss is that of uniform probabilities; layers that write to the residual are small."""
    torch.manual_seed(0)
    shape = ModelConfig(architecture=architecture, n_layer=8, n_head=4, n_embd=128, block_size=64)
    built = model.build(shape)
    writers = 8 if architecture == "mlp" else 16
    for name, parameter in built.named_parameters():
        std = 0.02 / math.sqrt(writers) if name.endswith(("out.weight", "down.weight")) else 0.02
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
        else:
            assert (parameter == float(name.endswith("norm.weight"))).all(), name
    tokens_BT = torch.randint(50257, (4, 64))
    loss = float(built(tokens_BT, tokens_BT.roll(1, 1)).detach()) / tokens_BT.numel()
    assert loss == pytest.approx(math.log(50304), abs=0.3)


@pytest.mark.parametrize("architecture", ["modern", "mlp"])
def test_it_learns_more_than_the_frequencies_of_tokens(architecture: str):
    """Each token is three more than the one before it, modulo 8; all are equally frequent."""
    torch.manual_seed(0)
    net = model.build(replace(SHAPE, architecture=architecture, n_layer=2, vocab_size=8))
    optimizer = build_optimizer(net, OptimConfig())
    set_learning_rate(optimizer, 1e-2)
    for _ in range(40):
        rows_BT = (torch.randint(8, (4, 1)) + 3 * torch.arange(17)) % 8
        loss = net(rows_BT[:, :-1], rows_BT[:, 1:]) / (4 * 16)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < math.log(8) / 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout(architecture: str):
    net = model.build(replace(SHAPE, architecture=architecture, dropout=0.5))
    tokens_BT = torch.randint(50257, (2, 24))
    with torch.no_grad():
        assert not torch.equal(net.logits(tokens_BT), net.logits(tokens_BT))
        net.eval()
        assert torch.equal(net.logits(tokens_BT), net.logits(tokens_BT))


def test_evaluating_restores_the_mode():
    built = model.build(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8))
    with pytest.raises(KeyError), model.evaluating(built):
        assert not built.training
        raise KeyError
    assert built.training
