import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from gpt2 import model
from gpt2.config.model import ARCHITECTURES, ModelConfig
from gpt2.data import tokenizer
from gpt2.distributed import world as distributed
from gpt2.evaluation import choices
from gpt2.evaluation.choices import OtherWork, Question, ending_losses
from gpt2.model.base import LanguageModel
from gpt2.model.gpt2 import GPT2

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, window=7)
ALONE = distributed.World(0, 1, torch.device("cpu"))
FULL = torch.autocast("cpu", enabled=False)


def build(architecture: str = "gpt2", **parts: int) -> LanguageModel:
    torch.manual_seed(3)
    built = model.build(replace(CONFIG, architecture=architecture, **parts))
    for (
        part
    ) in built.parameters():  # far from the initial weights, which make all tokens equally likely
        part.data += 0.3 * torch.randn_like(part)
    return built


@pytest.fixture(scope="module")
def net() -> LanguageModel:
    return build()


def random_questions(count: int, longest: int = 18) -> list[Question]:
    generator = torch.Generator().manual_seed(5)

    def text(at_least: int) -> tuple[int, ...]:
        length = int(torch.randint(at_least, longest, (), generator=generator))
        return tuple(torch.randint(0, 50257, (length,), generator=generator).tolist())

    return [Question(text(1), tuple(text(1) for _ in range(4))) for _ in range(count)]


@torch.no_grad()
def one_by_one(net: LanguageModel, question: Question) -> list[float]:
    """The loss of each ending after its context, one forward pass each."""
    losses = []
    for ending in question.endings:
        whole = torch.tensor([*question.context, *ending])[-CONFIG.block_size - 1 :]
        count = min(len(ending), len(whole) - 1)
        logits = net.logits(whole[None, :-1])[0, -count:, : tokenizer.VOCAB_SIZE]
        losses.append(float(F.cross_entropy(logits, whole[-count:], reduction="sum")))
    return losses


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_tokens", [1, 150, 10_000])
def test_packed_endings_have_the_losses_of_each_ending_alone(architecture: str, batch_tokens: int):
    net = build(architecture)
    questions = random_questions(12)
    expected = [one_by_one(net, question) for question in questions]
    losses = ending_losses(net, questions, ALONE, FULL, batch_tokens)
    assert losses is not None
    for ours, theirs in zip(losses, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert len({round(loss, 3) for row in losses for loss in row}) == 48


def test_packed_endings_within_a_sliding_window():
    whole, net = build("modern"), build("modern", sliding_window=5)
    questions = random_questions(4)
    losses = ending_losses(net, questions, ALONE, FULL, 150)
    assert losses is not None
    for ours, question in zip(losses, questions, strict=True):
        assert ours == pytest.approx(one_by_one(net, question), rel=1e-5)
        assert ours != pytest.approx(one_by_one(whole, question), rel=1e-5)


def test_little_padding_and_no_more_tokens_than_the_limit(
    net: LanguageModel, monkeypatch: pytest.MonkeyPatch
):
    batches = []
    features = GPT2.features
    monkeypatch.setattr(
        GPT2,
        "features",
        lambda net, x, *rest: batches.append((x, *rest)) or features(net, x, *rest),
    )
    ending_losses(net, random_questions(40), ALONE, FULL, batch_tokens=150)
    assert max(tokens_BT.size(0) for tokens_BT, _, _ in batches) > 2
    for tokens_BT, positions_BT, _ in batches:
        assert tokens_BT.numel() <= 150
        padding_B = (positions_BT[:, 1:] == 0).sum(1)
        assert padding_B.max() <= (1 - choices.MIN_LENGTH_RATIO) * tokens_BT.size(1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lengths_rounded_up_give_few_shapes_and_the_same_losses(
    architecture: str, monkeypatch: pytest.MonkeyPatch
):
    """As on CUDA."""
    net, questions, shapes = build(architecture), random_questions(40), set()
    features = type(net).features
    monkeypatch.setattr(
        type(net), "features", lambda net, x, *rest: shapes.add(x.shape) or features(net, x, *rest)
    )
    exact = ending_losses(net, questions, ALONE, FULL, 256)
    assert len({length for _, length in shapes}) > 5
    shapes.clear()
    monkeypatch.setitem(choices.LENGTH_STEP, "cpu", 16)
    rounded = ending_losses(net, questions, ALONE, FULL, 256)
    assert exact is not None and rounded is not None
    assert max(rows * length for rows, length in shapes) <= 256
    assert {length % 16 for _, length in shapes} == {0}
    assert len({length for _, length in shapes}) <= 5
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_near_ties_are_computed_without_tf32(net: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    """On CUDA, where the context changes torch's setting; here it notes what is computed in it."""
    depth, computed = [0], list[int]()

    @contextlib.contextmanager
    def noted(_: torch.device) -> Iterator[None]:
        depth[0] += 1
        yield
        depth[0] -= 1

    unembed = GPT2.unembed
    monkeypatch.setattr(choices.precision, "without_tf32", noted)
    monkeypatch.setattr(
        GPT2, "unembed", lambda net, x: computed.append(depth[0]) or unembed(net, x)
    )
    ending_losses(net, random_questions(9), ALONE, FULL, batch_tokens=100)
    assert computed and set(computed) == {1} and depth == [0]


@pytest.mark.parametrize(("context", "ending"), [(32, 1), (32, 2), (60, 9), (3, 32), (2, 50)])
def test_texts_longer_than_the_context_are_cut_at_the_beginning(
    net: LanguageModel, context: int, ending: int
):
    question = Question(tuple(range(context)), (tuple(range(100, 100 + ending)), (7,)))
    (losses,) = ending_losses(net, [question], ALONE, FULL)
    assert losses == pytest.approx(one_by_one(net, question), rel=1e-5)


def test_padded_ids_get_no_probability(net: LanguageModel):
    question = Question((1, 2), ((3,),))
    (((before,),)) = ending_losses(net, [question], ALONE, FULL)
    louder = model.build(CONFIG)
    louder.load_state_dict(net.state_dict())
    louder.token_embedding.weight.data[tokenizer.VOCAB_SIZE :] *= 100
    assert ending_losses(louder, [question], ALONE, FULL) == [[before]]
    (((of_fewer,),)) = ending_losses(louder, [question], ALONE, FULL, vocab_size=500)
    with torch.no_grad():
        logits_V = louder.logits(torch.tensor([[1, 2]]))[0, -1, :500]
    assert of_fewer == pytest.approx(float(-logits_V.log_softmax(0)[3]), rel=1e-5)


def test_dropout_is_off_and_the_mode_is_as_before():
    net = model.build(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=16, dropout=0.5))
    net.train()
    questions = random_questions(3, longest=6)
    assert ending_losses(net, questions, ALONE, FULL) == ending_losses(net, questions, ALONE, FULL)
    assert net.training


@pytest.mark.parametrize("other_rounds", [None, 1, 100])
def test_ranks_share_the_batches(
    net: LanguageModel, other_rounds: int | None, monkeypatch: pytest.MonkeyPatch
):
    """The sum over three ranks is bit-identical to the result of one rank, also while the first one
    does other work."""
    questions, advanced = random_questions(7), list[int]()
    whole = ending_losses(net, questions, ALONE, FULL, batch_tokens=100)
    parts = []
    monkeypatch.setattr(
        distributed.World, "all_reduce_sum", lambda _, tensor: parts.append(tensor) or tensor
    )
    monkeypatch.setattr(distributed.World, "all_reduce_max", lambda _, value: value)
    for rank in range(3):
        world = distributed.World(rank, 3, torch.device("cpu"))
        other = other_rounds and OtherWork(other_rounds, lambda rank=rank: advanced.append(rank))
        ending_losses(net, questions, world, FULL, batch_tokens=100, other_work=other or None)
    assert set(advanced) == ({0} if other_rounds else set())
    assert all((part == 0).any() for part in parts)
    assert bool((parts[0] == 0).all()) is (other_rounds == 100)
    assert sum(parts[:3]).tolist() == [loss for row in whole for loss in row]


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("without_rank0", [0, 1, 3, 100])
@pytest.mark.parametrize("batches", [0, 1, 9])
def test_each_batch_is_computed_once(batches: int, without_rank0: int, ranks: int):
    rounds = list(choices._rounds(batches, ranks, without_rank0))
    assert sorted(number for found in rounds for number in found.values()) == list(range(batches))
    assert all(set(found) <= set(range(ranks)) for found in rounds)
    if ranks > 1:
        without = [number for number, found in enumerate(rounds) if 0 not in found]
        assert without == list(range(min(without_rank0, len(rounds))))


def test_a_stop_ends_the_evaluation(net: LanguageModel):
    stops = iter([0, 0, 15])
    questions = random_questions(9)
    losses = ending_losses(net, questions, ALONE, FULL, batch_tokens=1, stop=lambda: next(stops))
    assert losses is None


def test_only_the_logits_that_are_needed(net: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    places = []
    unembed = GPT2.unembed
    monkeypatch.setattr(
        GPT2, "unembed", lambda net, x: places.append(x.numel() // CONFIG.n_embd) or unembed(net, x)
    )
    ending_losses(net, [Question((1, 2, 3), ((4, 5), (6,), (7, 8, 9)))], ALONE, FULL)
    assert sum(places) == 1 + 1 + 0 + 2  # after the text; within the endings


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_logits_in_parts(net: LanguageModel, monkeypatch: pytest.MonkeyPatch, at_once: int):
    questions = random_questions(4)
    expected = ending_losses(net, questions, ALONE, FULL)
    monkeypatch.setitem(choices.LOGITS_AT_ONCE, "cpu", at_once)
    for ours, theirs in zip(ending_losses(net, questions, ALONE, FULL), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_no_questions(net: LanguageModel):
    assert ending_losses(net, [], ALONE, FULL) == []
