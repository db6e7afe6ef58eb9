import pytest
import torch

from gpt2 import generate, model, tokenizer
from gpt2.config import ModelConfig
from gpt2.model.gpt2 import GPT2


@pytest.fixture
def net() -> GPT2:
    torch.manual_seed(0)
    built = model.build(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, dropout=0.2))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(8)
    return built


def sample(net: GPT2, prompt: list[int], **options) -> list[list[int]]:
    settings = {"num_samples": 2, "max_new_tokens": 8, "temperature": 1.0, "top_k": None} | options
    return generate.generate(net, prompt, generator=torch.Generator().manual_seed(1), **settings)


def test_greedy_with_the_cache_is_greedy_without(net: GPT2):
    prompt = [1, 2, 3]
    (cached,) = sample(net, prompt, temperature=0, num_samples=1, max_new_tokens=13)
    tokens = list(prompt)
    net.eval()
    for _ in range(13):
        logits_V = net.logits(torch.tensor([tokens]))[0, -1, : tokenizer.VOCAB_SIZE]
        tokens.append(int(logits_V.argmax()))
    assert cached == tokens[3:]


def test_past_the_context_it_goes_on(net: GPT2):
    long = sample(net, list(range(40)), max_new_tokens=50)
    assert [len(tokens) for tokens in long] == [50, 50]


def test_padded_vocabulary_is_never_drawn(net: GPT2):
    with torch.no_grad():
        net.token_embedding.weight[tokenizer.VOCAB_SIZE :] *= 1000
    drawn = sample(net, [], num_samples=20, max_new_tokens=15, temperature=5.0)
    assert max(token for tokens in drawn for token in tokens) < tokenizer.VOCAB_SIZE


def test_top_1_is_greedy(net: GPT2):
    assert sample(net, [5], top_k=1) == sample(net, [5], temperature=0)


def test_top_k_draws_from_the_likeliest(net: GPT2):
    net.eval()
    likeliest = net.logits(torch.tensor([[5]]))[0, -1, : tokenizer.VOCAB_SIZE].topk(3).indices
    drawn = sample(net, [5], top_k=3, num_samples=60, max_new_tokens=1, temperature=50.0)
    assert {token for (token,) in drawn} == set(likeliest.tolist())


def test_ends_before_end_of_text(net: GPT2):
    hidden_D = torch.ones(16)
    with torch.no_grad():  # every hidden state points at <|endoftext|>
        net.final_norm.weight.zero_()
        net.final_norm.bias.copy_(hidden_D)
        net.token_embedding.weight[tokenizer.END_OF_TEXT] = hidden_D * 100
    assert sample(net, [5], temperature=0) == [[], []]


def test_text_is_a_function_of_the_seed_and_moves_no_other_stream(net: GPT2):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = generate.generate_text(net, "def", seed=7, max_new_tokens=12)
    assert torch.rand(1) == expected
    assert first == generate.generate_text(net, "def", seed=7, max_new_tokens=12)
    assert first != generate.generate_text(net, "def", seed=8, max_new_tokens=12)
    assert len(first) == 3
    assert all(text.startswith("def") for text in first)
    assert net.training
