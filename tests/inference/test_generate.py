from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2 import model
from gpt2.config.model import ARCHITECTURES, ModelConfig
from gpt2.data import tokenizer
from gpt2.inference import generate
from gpt2.inference.sampling import Sampling
from gpt2.model.base import LanguageModel

CONTEXT = 16


def build(**shape: Any) -> LanguageModel:
    torch.manual_seed(0)
    built = model.build(
        ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=CONTEXT, dropout=0.2, **shape)
    )
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(8)
    return built


@pytest.fixture
def net() -> LanguageModel:
    return build()


def sample(net: LanguageModel, prompt: list[int], **options) -> list[list[int]]:
    """The new tokens of each sample."""
    settings = {"num_samples": 2, "max_new_tokens": 8, "temperature": 1.0, "top_k": None} | options
    generator = torch.Generator().manual_seed(1)
    steps = generate.generate(net, prompt, Sampling(**settings), generator)
    return torch.stack(list(steps), dim=1).tolist()


def greedy_without_a_cache(net: LanguageModel, prompt: list[int], count: int) -> list[int]:
    """Past the context, the newer half of it is kept and grows again."""
    net.eval()
    seen, new = prompt[-CONTEXT:], []
    for _ in range(count):
        if len(seen) > CONTEXT:
            seen = seen[-(CONTEXT // 2) :]
        logits_V = net.logits(torch.tensor([seen]))[0, -1, : tokenizer.VOCAB_SIZE]
        new.append(int(logits_V.argmax()))
        seen.append(new[-1])
    return new


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("prompt", "count"), [(3, 13), (3, 50), (CONTEXT, 20), (40, 20)])
def test_greedy_with_the_cache_is_greedy_without(architecture: str, prompt: int, count: int):
    net = build(architecture=architecture, window=5)
    tokens = list(range(1, prompt + 1))
    expected = greedy_without_a_cache(net, tokens, count)
    drawn = sample(net, tokens, temperature=0, num_samples=3, max_new_tokens=count)
    assert drawn == [expected] * 3


@pytest.mark.parametrize(
    ("prompt", "count", "words"),
    [
        (6, CONTEXT - 5, []),  # the last token that is drawn need not be read
        (6, CONTEXT - 4, ["past the context of 16 tokens"]),
        (6, 100, ["past the context of 16 tokens"]),
        (40, 1, ["the prompt has 40 tokens; the model sees only the last 16"]),
        (40, 2, ["the prompt has 40 tokens", "the model sees only the last 8 to 16 tokens"]),
    ],
)
def test_what_the_model_does_not_see_is_warned_of(prompt: int, count: int, words: list[str]):
    sampling = Sampling(max_new_tokens=count)
    found = generate.context_warnings(CONTEXT, "a" + " a" * (prompt - 1), sampling)
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))


@pytest.mark.parametrize(("count", "passes"), [(CONTEXT - 5, False), (CONTEXT - 4, True)])
def test_the_context_is_passed_where_the_warning_says(
    net: LanguageModel, monkeypatch, count: int, passes: bool
):
    caches = []
    empty_cache = net.empty_cache

    def spy(samples: int):
        caches.append(empty_cache(samples))
        return caches[-1]

    monkeypatch.setattr(net, "empty_cache", spy)
    sample(net, list(range(6)), max_new_tokens=count)
    assert (caches[0].length < 6 + count - 1) == passes


def test_past_the_context_it_goes_on(net: LanguageModel):
    long = sample(net, list(range(40)), max_new_tokens=50)
    assert [len(tokens) for tokens in long] == [50, 50]


def test_padded_vocabulary_is_never_drawn(net: LanguageModel):
    with torch.no_grad():
        net.token_embedding.weight[tokenizer.VOCAB_SIZE :] *= 1000
    drawn = sample(net, [], num_samples=20, max_new_tokens=15, temperature=5.0)
    assert max(token for tokens in drawn for token in tokens) < tokenizer.VOCAB_SIZE


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-40}])
def test_these_are_greedy_too(net: LanguageModel, options: dict[str, float]):
    assert sample(net, [5], **options) == sample(net, [5], temperature=0)


def test_top_k_draws_from_the_likeliest(net: LanguageModel):
    net.eval()
    likeliest = net.logits(torch.tensor([[5]]))[0, -1, : tokenizer.VOCAB_SIZE].topk(3).indices
    drawn = sample(net, [5], top_k=3, num_samples=60, max_new_tokens=1, temperature=50.0)
    assert {token for (token,) in drawn} == set(likeliest.tolist())


def test_a_top_p_of_1_is_off(net: LanguageModel):
    assert sample(net, [5], top_p=1.0) == sample(net, [5])


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=60),
    st.floats(1e-6, 1, exclude_max=True),
)
def test_the_nucleus_is_the_smallest_set_of_that_mass(logits: list[float], top_p: float):
    probabilities_BV = torch.tensor([logits]).softmax(dim=1)
    (kept_V,) = generate.nucleus(probabilities_BV, top_p, None)
    inside = kept_V > 0
    assert torch.equal(kept_V, probabilities_BV[0].where(inside, 0))
    mass_inside = float(kept_V.double().sum())
    assert mass_inside - float(kept_V[inside].min()) < top_p + 1e-12
    assert mass_inside >= min(top_p, float(probabilities_BV.double().sum())) - 1e-12
    outside_V = probabilities_BV[0][~inside]
    assert not len(outside_V) or outside_V.max() <= kept_V[inside].min()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.5, 8, 0.9), (2.0, None, 0.6), (1.0, 12, 0.3)]
)
def test_temperature_top_k_and_top_p_work_together_as_in_transformers(
    temperature: float, top_k: int | None, top_p: float
):
    logits_V = torch.randn(40, generator=torch.Generator().manual_seed(2)) * 2
    import transformers  # takes seconds

    warpers = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    warpers.append(transformers.TopPLogitsWarper(top_p))
    expected_V = warpers(None, logits_V[None])[0].softmax(dim=0)
    draws = 20_000
    drawn_B1 = generate.pick(
        logits_V.expand(draws, -1),
        Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
        torch.Generator().manual_seed(3),
    )
    shares_V = drawn_B1[:, 0].bincount(minlength=40) / draws
    assert not shares_V[expected_V == 0].any()
    assert (shares_V - expected_V).abs().max() < 0.02


@pytest.mark.parametrize("prompt", ["def", ""])
def test_streamed_pieces_are_the_text_of_the_tokens(net: LanguageModel, prompt: str):
    sampling = Sampling(num_samples=4, max_new_tokens=20, temperature=3.0, top_k=None)
    steps = list(generate.stream_text(net, prompt, sampling, seed=1))
    assert steps[0] == [prompt] * 4
    texts = ["".join(pieces) for pieces in zip(*steps, strict=True)]
    drawn = sample(net, tokenizer.encode(prompt), num_samples=4, max_new_tokens=20, temperature=3.0)
    assert texts == [prompt + tokenizer.decode(tokens) for tokens in drawn]
    assert texts == generate.generate_text(net, prompt, sampling, seed=1)


def test_each_text_ends_before_its_end_of_text(net: LanguageModel, monkeypatch):
    end, (a,), parrot = tokenizer.END_OF_TEXT, tokenizer.encode("a"), tokenizer.encode("🦜")
    assert len(parrot) == 3
    rows = [[*parrot, end, a, a], [a, end, a, a, a, a], [a, a, a, a, end, a]]
    taken = []

    def scripted(*_: object):
        for step in zip(*rows, strict=True):
            taken.append(step)
            yield torch.tensor(step)

    monkeypatch.setattr(generate, "generate", scripted)
    assert generate.generate_text(net, ">") == [">🦜", ">a", ">aaaa"]
    assert len(taken) == 5  # nothing more is made when all have ended


def test_ends_before_end_of_text(net: LanguageModel):
    hidden_D = torch.ones(16)
    with torch.no_grad():  # every hidden state points at <|endoftext|>
        net.final_norm.weight.zero_()
        net.final_norm.bias.copy_(hidden_D)
        net.token_embedding.weight[tokenizer.END_OF_TEXT] = hidden_D * 100
    assert generate.generate_text(net, "def", Sampling(num_samples=2)) == ["def", "def"]


def test_text_is_a_function_of_the_seed_and_moves_no_other_stream(net: LanguageModel):
    sampling = Sampling(num_samples=3, max_new_tokens=8)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = generate.generate_text(net, "def", sampling, seed=7)
    assert torch.rand(1) == expected
    assert first == generate.generate_text(net, "def", sampling, seed=7)
    assert first != generate.generate_text(net, "def", sampling, seed=8)
    assert len(first) == 3
    assert all(text.startswith("def") for text in first)
    assert net.training


def test_a_stream_that_is_left_leaves_the_model_as_it_was(net: LanguageModel):
    steps = generate.stream_text(net, "def", Sampling(), seed=1)
    next(steps), next(steps)
    assert not net.training
    steps.close()
    assert net.training
    assert not torch.is_inference_mode_enabled()
