import cmath
import math

import pytest
import torch

from gpt2 import model
from gpt2.base.errors import ConfigError
from gpt2.config.model import ModelConfig
from gpt2.model import modern
from gpt2.model.modern import Modern

SHAPE = ModelConfig(architecture="modern", n_layer=2, n_head=2, n_embd=12, block_size=16)


@pytest.fixture
def net() -> Modern:
    torch.manual_seed(0)
    built = model.build(SHAPE).double().eval()
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


def reference(net: Modern, tokens: list[int]) -> torch.Tensor:
    """Logits, (T, V), token by token and head by head."""
    weights, heads = net.state_dict(), SHAPE.n_head
    embedding = weights["token_embedding.weight"]
    width = SHAPE.n_embd // heads
    x = [embedding[token] for token in tokens]
    for layer in range(SHAPE.n_layer):
        block = {
            name.removeprefix(f"blocks.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"blocks.{layer}.")
        }
        joint = [block["attention.query_key_value.weight"] @ normed(vector) for vector in x]
        queries, keys, values = ([row.chunk(3)[part] for row in joint] for part in range(3))
        seen = []
        for t in range(len(tokens)):
            parts = []
            for head in range(heads):
                place = slice(head * width, (head + 1) * width)
                query = turned(queries[t][place], t)
                scores = []
                for s in range(t + 1):
                    pairs = zip(query, turned(keys[s][place], s), strict=True)
                    product = sum((q * k.conjugate()).real for q, k in pairs)
                    scores.append(product / math.sqrt(width))
                total = sum(map(math.exp, scores))
                parts.append(
                    sum(math.exp(scores[s]) / total * values[s][place] for s in range(t + 1))
                )
            seen.append(block["attention.out.weight"] @ torch.cat(parts))
        x = [vector + new for vector, new in zip(x, seen, strict=True)]
        for t, vector in enumerate(x):
            hidden = (block["mlp.up.weight"] @ normed(vector)).clamp(min=0) ** 2
            x[t] = vector + block["mlp.down.weight"] @ hidden
    return torch.stack([embedding @ normed(vector) for vector in x])


def test_logits_are_those_of_plain_loops(net: Modern):
    tokens = torch.randint(50257, (11,)).tolist()
    with torch.no_grad():
        logits_TV = net.logits(torch.tensor([tokens]))[0]
        assert torch.allclose(logits_TV, reference(net, tokens), atol=1e-9)
    assert logits_TV.std() > 1


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
