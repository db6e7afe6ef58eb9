import pytest
import torch
import torch.nn.functional as F

from gpt2 import model
from gpt2.base.errors import ConfigError
from gpt2.config.model import ModelConfig
from gpt2.model.mlp import MLP

WINDOW = 4
SHAPE = ModelConfig(
    architecture="mlp", n_layer=2, n_head=5, n_embd=12, block_size=16, window=WINDOW
)


@pytest.fixture
def net() -> MLP:
    torch.manual_seed(0)
    built = model.build(SHAPE).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return built


def reference(net: MLP, tokens: list[int]) -> torch.Tensor:
    """Logits, (V), of the token after these."""
    weights = net.state_dict()
    embedding = weights["token_embedding.weight"]
    window = [embedding[token] for token in reversed(tokens[-WINDOW:])]
    window += [torch.zeros(SHAPE.n_embd)] * (WINDOW - len(window))
    x = weights["join.weight"] @ torch.cat(window) + weights["join.bias"]

    def normed(name: str) -> torch.Tensor:
        return F.layer_norm(x, (SHAPE.n_embd,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    for layer in range(SHAPE.n_layer):
        part = f"blocks.{layer}.mlp"
        hidden = weights[f"{part}.up.weight"] @ normed(f"{part}_norm") + weights[f"{part}.up.bias"]
        hidden = F.gelu(hidden, approximate="tanh")
        x = x + weights[f"{part}.down.weight"] @ hidden + weights[f"{part}.down.bias"]
    return embedding @ normed("final_norm")


def test_logits_are_those_of_one_token_at_a_time(net: MLP):
    tokens = torch.randint(50257, (9,)).tolist()
    expected_TV = torch.stack([reference(net, tokens[: end + 1]) for end in range(9)])
    with torch.no_grad():
        assert torch.allclose(net.logits(torch.tensor([tokens]))[0], expected_TV, atol=1e-4)


def test_a_token_affects_the_logits_of_its_window_only(net: MLP):
    tokens_BT = torch.randint(50257, (1, 16))
    other_BT = tokens_BT.clone()
    other_BT[0, 3] += 1
    with torch.no_grad():
        differs_T = (net.logits(tokens_BT) != net.logits(other_BT))[0].any(dim=1)
    assert differs_T.nonzero().flatten().tolist() == list(range(3, 3 + WINDOW))


def test_without_biases():
    built = model.build(ModelConfig(**{**vars(SHAPE), "bias": False}))
    assert not [name for name, _ in built.named_parameters() if name.endswith("bias")]


def test_a_window_larger_than_the_context_is_refused():
    model.build(ModelConfig(**{**vars(SHAPE), "window": 16}))
    with pytest.raises(ConfigError, match=r"window=17 is larger than .*; use --window 16 or less"):
        ModelConfig(**{**vars(SHAPE), "window": 17})
    with pytest.raises(ConfigError, match="window=0 is too small"):
        ModelConfig(window=0)
    assert ModelConfig(block_size=8).window == 16  # which gpt2 ignores
