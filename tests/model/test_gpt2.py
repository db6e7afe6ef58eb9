import math

import pytest
import torch
import transformers

from gpt2 import model
from gpt2.config import ModelConfig
from gpt2.model.gpt2 import GPT2

SHAPE = ModelConfig(n_layer=3, n_head=4, n_embd=32, block_size=24)


@pytest.fixture
def net() -> GPT2:
    torch.manual_seed(0)
    built = model.build(SHAPE).eval()
    with torch.no_grad():  # initial zeros would hide a bias or norm in the wrong place
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return built


def reference_of(net: GPT2) -> transformers.GPT2LMHeadModel:
    """transformers' GPT-2 with the same weights; its linear layers keep (in, out) matrices."""
    shape = net.config
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.block_size,
            n_embd=shape.n_embd,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            attn_implementation="eager",
        )
    ).eval()
    names = {
        "token_embedding": "wte",
        "position_embedding": "wpe",
        "final_norm": "ln_f",
        "blocks": "h",
        "attention_norm": "ln_1",
        "mlp_norm": "ln_2",
        "attention.query_key_value": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    weights = {}
    for name, value in net.state_dict().items():
        linear = value.dim() == 2 and "embedding" not in name
        for ours, theirs in names.items():
            name = name.replace(f"{ours}.", f"{theirs}.")
        weights[name] = value.T if linear else value
    reference.transformer.load_state_dict(weights)
    return reference


def test_logits_and_loss_are_those_of_transformers(net: GPT2):
    tokens_BT = torch.randint(50257, (3, 24))
    reference = reference_of(net)
    with torch.no_grad():
        expected = reference(tokens_BT, labels=tokens_BT)
        logits_BTV = net.logits(tokens_BT)
        loss = net(tokens_BT[:, :-1], tokens_BT[:, 1:]) / (3 * 23)
    assert (logits_BTV - expected.logits).abs().max() < 1e-4
    assert loss == pytest.approx(expected.loss.item(), abs=1e-5)


def test_loss_is_a_float32_sum(net: GPT2):
    tokens_BT = torch.randint(50257, (4, 24))
    targets_BT = torch.randint(50257, (4, 24))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        whole = net(tokens_BT, targets_BT)
        halves = net(tokens_BT[:1], targets_BT[:1]) + net(tokens_BT[1:], targets_BT[1:])
    assert whole.dtype == torch.float32
    assert whole.shape == ()
    assert float(whole) == pytest.approx(float(halves), rel=1e-3)


def test_a_token_sees_nothing_after_it(net: GPT2):
    tokens_BT = torch.randint(50257, (1, 24))
    other_BT = tokens_BT.clone()
    other_BT[0, 12:] = torch.randint(50257, (12,))
    with torch.no_grad():
        assert torch.allclose(
            net.logits(tokens_BT)[0, :12], net.logits(other_BT)[0, :12], atol=1e-5
        )


@pytest.mark.parametrize("portions", [[24], [10, 1, 1, 12], [1] * 24])
def test_cached_logits_are_the_uncached_ones(net: GPT2, portions: list[int]):
    tokens_BT = torch.randint(50257, (2, 24))
    cache = net.empty_cache(batch_size=2)
    with torch.no_grad():
        expected_BTV = net.logits(tokens_BT)
        parts = [net.logits(part, cache) for part in tokens_BT.split(portions, dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), expected_BTV, atol=1e-4)


def test_next_logits_are_the_last_ones(net: GPT2):
    tokens_BT = torch.randint(50257, (2, 24))
    with torch.no_grad():
        expected_BV = net.logits(tokens_BT)[:, -1]
        assert torch.allclose(net.next_logits(tokens_BT), expected_BV, atol=1e-5)


def test_a_shared_beginning_goes_through_the_cache_as_one_row(net: GPT2):
    tokens_BT = torch.randint(50257, (3, 24))
    tokens_BT[:, :10] = tokens_BT[0, :10]
    cache = net.empty_cache(batch_size=3)
    with torch.no_grad():
        expected_BTV = net.logits(tokens_BT)
        first_BV = net.next_logits(tokens_BT[:1, :10], cache)
        rest_BTV = net.logits(tokens_BT[:, 10:], cache)
    assert torch.allclose(first_BV.expand(3, -1), expected_BTV[:, 9], atol=1e-4)
    assert torch.allclose(rest_BTV, expected_BTV[:, 10:], atol=1e-4)


def test_initialisation():
    torch.manual_seed(0)
    built = model.build(ModelConfig(n_layer=8, n_head=4, n_embd=128, block_size=64))
    block = built.blocks[3]
    assert built.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.down.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
    assert block.attention.out.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
    assert not block.mlp.up.bias.any()
    assert (block.mlp_norm.weight == 1).all()


def test_no_biases():
    built = model.build(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, bias=False))
    assert not [name for name, _ in built.named_parameters() if name.endswith("bias")]


def test_evaluating_restores_the_mode():
    built = model.build(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8))
    with pytest.raises(KeyError), model.evaluating(built):
        assert not built.training
        raise KeyError
    assert built.training
