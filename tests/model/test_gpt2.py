from typing import Any

import pytest
import torch

from gpt2 import model
from gpt2.config.model import ModelConfig
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


def reference_of(net: GPT2) -> Any:
    """transformers' GPT-2 with the same weights; its linear layers keep (in, out) matrices."""
    import transformers  # takes seconds

    shape = net.config
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=shape.embedding_rows,
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


def test_no_biases():
    built = model.build(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, bias=False))
    assert not [name for name, _ in built.named_parameters() if name.endswith("bias")]
