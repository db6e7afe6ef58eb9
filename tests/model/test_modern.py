import cmath
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from gpt2 import model
from gpt2.base.errors import ConfigError
from gpt2.config import flops
from gpt2.config.model import ModelConfig
from gpt2.model import modern
from gpt2.model.base import RESIDUAL_WRITERS
from gpt2.model.modern import Modern
from modern_parts import PARTS

SHAPE = ModelConfig(architecture="modern", n_layer=2, n_head=2, n_embd=12, block_size=16)
SUBSETS = [
    dict(chosen)
    for size in range(len(PARTS) + 1)
    for chosen in itertools.combinations(PARTS.items(), size)
]


@pytest.fixture(params=[{}, PARTS], ids=["plain", "whole"])
def net(request: pytest.FixtureRequest) -> Modern:
    return perturbed(replace(SHAPE, n_layer=3, **request.param))


def perturbed(shape: ModelConfig) -> Modern:
    torch.manual_seed(0)
    built = model.build(shape).double().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return built


def normed(vector: torch.Tensor) -> torch.Tensor:
    return vector / math.sqrt(sum(float(x) ** 2 for x in vector) / len(vector) + 1e-6)


def turned(head_K: torch.Tensor, position: int) -> list[complex]:
    """Pairs of a normed query or key as complex numbers, rotated."""
    half = len(head_K) // 2
    values = normed(head_K).tolist()
    return [
        complex(values[pair], values[pair + half])
        * cmath.exp(1j * position * 10000 ** (-2 * pair / len(head_K)))
        for pair in range(half)
    ]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-float(value)))


def reference(net: Modern, tokens: list[int]) -> torch.Tensor:
    """Logits, (T, V), token by token and head by head."""
    weights, shape = net.state_dict(), net.config
    heads, layers = shape.n_head, shape.n_layer
    embedding = weights["token_embedding.weight"]
    head_VD = weights["head.weight"] if shape.untied_head else embedding
    width = shape.n_embd // heads
    x = [embedding[token] for token in tokens]
    if shape.embedding_skip:
        x = [normed(vector) for vector in x]
    embedded, after = list(x), list[list[torch.Tensor]]()
    for layer in range(layers):
        block = {
            name.removeprefix(f"blocks.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"blocks.{layer}.")
        }
        if shape.embedding_skip:
            own, of_embedding = weights["stream_scales"], weights["embedding_scales"]
            x = [own[layer] * a + of_embedding[layer] * b for a, b in zip(x, embedded, strict=True)]
        opposite = layers - 1 - layer
        if shape.layer_skip and opposite < layer:
            scale = weights["skip_scales"][opposite]
            x = [a + scale * b for a, b in zip(x, after[opposite], strict=True)]
        joint = [block["attention.query_key_value.weight"] @ normed(vector) for vector in x]
        queries, keys, values = ([row.chunk(3)[part] for row in joint] for part in range(3))
        if shape.value_embeddings and layer in (0, 2):  # of three
            for t, token in enumerate(tokens):
                gates = block["attention.value_gate.weight"] @ normed(x[t])
                row = block["attention.value_embedding.weight"][token].split(width)
                added = [2 * sigmoid(gates[head]) * row[head] for head in range(heads)]
                values[t] = values[t] + torch.cat(added)
        seen = []
        window = shape.sliding_window if layer < 2 else None  # of three
        for t in range(len(tokens)):
            first = max(0, t + 1 - window) if window else 0
            parts = []
            for head in range(heads):
                place = slice(head * width, (head + 1) * width)
                query = turned(queries[t][place], t)
                scores = []
                for s in range(first, t + 1):
                    pairs = zip(query, turned(keys[s][place], s), strict=True)
                    product = sum((q * k.conjugate()).real for q, k in pairs)
                    scores.append(product / math.sqrt(width))
                total = sum(map(math.exp, scores))
                shares = [math.exp(score) / total for score in scores]
                parts.append(
                    sum(
                        share * row[place]
                        for share, row in zip(shares, values[first:], strict=False)
                    )
                )
            seen.append(block["attention.out.weight"] @ torch.cat(parts))
        x = [vector + new for vector, new in zip(x, seen, strict=True)]
        for t, vector in enumerate(x):
            hidden = (block["mlp.up.weight"] @ normed(vector)).clamp(min=0) ** 2
            x[t] = vector + block["mlp.down.weight"] @ hidden
        after.append(list(x))
    logits_TV = torch.stack([head_VD @ normed(vector) for vector in x])
    cap = shape.logit_softcap
    return logits_TV if cap is None else cap * torch.tanh(logits_TV / cap)


def test_logits_are_those_of_plain_loops(net: Modern):
    tokens = torch.randint(50257, (11,)).tolist()
    with torch.no_grad():
        logits_TV = net.logits(torch.tensor([tokens]))[0]
        assert torch.allclose(logits_TV, reference(net, tokens), atol=1e-9)
    assert logits_TV.std() > 0.5


def test_attention_depends_on_the_distance_of_tokens(net: Modern):
    """The same row at later positions, and with twice the distance between tokens."""
    tokens_BT = torch.randint(50257, (2, 8))
    with torch.no_grad():
        here_BTD = net.features(tokens_BT, torch.arange(8), None)
        later_BTD = net.features(tokens_BT, torch.arange(500, 508), None)
        rows_BTD = net.features(tokens_BT, torch.arange(8) + torch.tensor([[3], [70]]), None)
        wider_BTD = net.features(tokens_BT, torch.arange(0, 16, 2), None)
    assert torch.allclose(here_BTD, later_BTD, atol=1e-9)
    assert torch.allclose(here_BTD, rows_BTD, atol=1e-9)
    assert (here_BTD[:, 0] == wider_BTD[:, 0]).all()
    assert not torch.allclose(here_BTD[:, 1:], wider_BTD[:, 1:], atol=1e-2)


def test_queries_and_keys_are_normalised_in_bfloat16_too():
    rotation = modern.rotation_of(torch.arange(1000, 1016), 64, torch.float32)
    exact_BHTK = torch.randn(2, 3, 16, 64) * 50
    turned_BHTK = modern.normed_and_rotated(exact_BHTK, rotation)
    blurred_BHTK = modern.normed_and_rotated(exact_BHTK.bfloat16(), rotation)
    assert turned_BHTK.square().mean(-1) == pytest.approx(1, abs=1e-5)
    assert blurred_BHTK.dtype == torch.bfloat16
    assert (blurred_BHTK.float() - turned_BHTK).abs().max() < 0.05


@pytest.mark.parametrize("parts", SUBSETS, ids=lambda parts: "+".join(parts) or "plain")
def test_every_combination_of_parts_gives_the_same_logits_with_a_cache(parts: dict[str, Any]):
    """And its loss is that of its logits, and the count of its weights that of the estimate."""
    net = perturbed(replace(SHAPE, n_layer=5, vocab_size=128, **parts))
    tokens_BT = torch.randint(128, (3, 16))
    cache = net.empty_cache(3)
    with torch.no_grad():
        whole_BTV = net.logits(tokens_BT)
        found = [net.logits(part_BT, cache) for part_BT in tokens_BT.split([5, 1, 1, 9], dim=1)]
        torch.testing.assert_close(torch.cat(found, dim=1), whole_BTV)
        loss = net(tokens_BT, tokens_BT.flip(1))
        rows = torch.nn.functional.cross_entropy(
            whole_BTV.flatten(0, 1), tokens_BT.flip(1).flatten(), reduction="sum"
        )
        torch.testing.assert_close(loss, rows)
    assert flops.parameter_count(net.config) == sum(part.numel() for part in net.parameters())


def test_all_weights_have_gradients_and_parts_begin_as_if_they_were_not_there():
    torch.manual_seed(0)
    built = model.build(replace(SHAPE, n_layer=5, vocab_size=128, **PARTS))
    tokens_BT = torch.randint(128, (3, 16))
    loss = built(tokens_BT, tokens_BT.flip(1))
    assert float(loss.detach()) / 48 == pytest.approx(math.log(128), abs=0.05)
    for name, weight in built.named_parameters():
        if name.endswith(RESIDUAL_WRITERS):
            assert not weight.any()
    for weight in built.parameters():
        weight.data.add_(torch.randn_like(weight), alpha=0.1)
    built(tokens_BT, tokens_BT.flip(1)).backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in built.parameters())


def test_parts_of_another_architecture_are_refused_by_name():
    with pytest.raises(
        ConfigError, match=r"layer_skip: only architecture=modern has .* or --no_layer_skip$"
    ):
        ModelConfig(layer_skip=True)


def test_a_sliding_window_is_within_the_context_and_can_be_turned_off():
    with pytest.raises(ConfigError) as caught:
        replace(SHAPE, sliding_window=17)
    assert str(caught.value) == (
        "sliding_window=17 is larger than block_size=16; use --sliding_window 16 or less"
    )
    with pytest.raises(ConfigError, match=r"modern, or --sliding_window None$"):
        ModelConfig(sliding_window=16)
    with pytest.raises(ConfigError, match=r"has no effect with n_layer=1: .* None$"):
        replace(SHAPE, sliding_window=16, n_layer=1)
    with pytest.raises(ConfigError, match="sliding_window=0"):
        replace(SHAPE, sliding_window=0)


def test_a_window_as_long_as_the_row_changes_nothing():
    whole, windowed = (perturbed(replace(SHAPE, sliding_window=window)) for window in (None, 16))
    tokens_BT = torch.randint(50257, (3, 16))
    losses = [net(tokens_BT, tokens_BT.flip(1)) for net in (whole, windowed)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(windowed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_all_weights_are_matrices():
    built = model.build(ModelConfig(**{**vars(SHAPE), "bias": True}))
    assert {parameter.dim() for parameter in built.parameters()} == {2}


def test_heads_of_odd_width_are_refused():
    with pytest.raises(ConfigError) as caught:
        ModelConfig(architecture="modern", n_embd=768, n_head=256)
    assert str(caught.value) == (
        "n_embd=768 is not a multiple of 2 × n_head=512: rotary positions need heads of even "
        "width; nearest: 512 or 1024"
    )
