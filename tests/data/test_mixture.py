"""Mixtures, held against a reading of the definition row by row."""

from collections import Counter
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpt2.data.batch_ramp import RampPhase
from gpt2.data.mixture import BLOCK_ROWS, Mixture, Phase
from gpt2.data.sampler import Sampler

weights = st.lists(st.integers(0, 1000), min_size=1, max_size=5).filter(any).map(tuple)


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    corpora = draw(st.integers(1, 4))
    one = st.tuples(*[st.integers(0, 200)] * corpora).filter(any)
    lengths = draw(st.lists(st.integers(1, 3500), max_size=3))
    starts = np.cumsum([0, *lengths]).tolist()
    return Mixture(
        tuple(Phase(start, draw(one)) for start in starts), seed=draw(st.integers(0, 2**63 - 1))
    )


def all_before(mixture: Mixture, end: int) -> tuple[list[int], list[int]]:
    corpora, positions = mixture.at(np.arange(end))
    return corpora.tolist(), positions.tolist()


def by_definition(phase: Phase, blocks: int) -> list[list[int]]:
    """The rows of each corpus in each block, by largest remainders with carry, block by block."""
    total = sum(phase.weights)
    carry = [Fraction(0)] * len(phase.weights)
    found = []
    for _ in range(blocks):
        wanted = [
            Fraction(weight, total) * phase.block_rows + rest
            for weight, rest in zip(phase.weights, carry, strict=True)
        ]
        counts = [share.numerator // share.denominator for share in wanted]
        order = sorted(range(len(wanted)), key=lambda corpus: counts[corpus] - wanted[corpus])
        for corpus in order[: phase.block_rows - sum(counts)]:
            counts[corpus] += 1
        carry = [share - count for share, count in zip(wanted, counts, strict=True)]
        found.append(counts)
    return found


@given(weights)
def test_a_block_has_the_largest_remainder_rounding_with_carry(weights: tuple[int, ...]):
    phase = Phase(0, weights)
    assert phase.block_rows >= BLOCK_ROWS
    counts = by_definition(phase, blocks=12)
    assert min(map(min, counts)) >= 0
    for block, so_far in enumerate(np.cumsum(counts, axis=0).tolist(), 1):
        assert list(phase.rows_before(block)) == so_far
        exact = [Fraction(weight, sum(weights)) * block * phase.block_rows for weight in weights]
        assert all(abs(count - share) < 1 for count, share in zip(so_far, exact, strict=True))


@given(mixtures())
def test_every_block_of_every_phase_has_its_counts_and_no_corpus_skips_a_row(mixture: Mixture):
    end = mixture.phases[-1].first_row + 2 * mixture.phases[-1].block_rows
    corpora, positions = all_before(mixture, min(end, 20_000))
    read = [0] * len(mixture.phases[0].weights)
    for corpus, position in zip(corpora, positions, strict=True):
        assert position == read[corpus], "each corpus is read row after row"
        read[corpus] += 1
    ends = [*(phase.first_row for phase in mixture.phases[1:]), len(corpora)]
    for phase, end in zip(mixture.phases, ends, strict=True):
        rows = corpora[phase.first_row : end]
        blocks = len(rows) // phase.block_rows
        for block, counts in enumerate(by_definition(phase, blocks)):
            part = Counter(rows[block * phase.block_rows : (block + 1) * phase.block_rows])
            assert [part[corpus] for corpus in range(len(counts))] == counts


@given(mixtures(), st.integers(0, 30_000))
def test_rows_before_a_row_and_the_row_of_a_position(mixture: Mixture, row: int):
    corpora, positions = mixture.at(np.array([row]))
    before = mixture.rows_before(row)
    assert before[corpora[0]] == positions[0]
    assert sum(before) == row
    assert mixture.row_of(int(corpora[0]), int(positions[0])) == row


def test_a_corpus_that_has_no_weight_any_more_is_not_read_again():
    mixture = Mixture((Phase(0, (1, 1)), Phase(500, (0, 1))), seed=1)
    read = mixture.rows_before(500)[0]
    assert mixture.rows_before(10**9)[0] == read
    assert mixture.row_of(0, read) is None
    assert mixture.row_of(0, read - 1) is not None


def test_the_order_within_a_block_is_random_and_of_its_own_for_seeds_blocks_and_phases():
    rows = np.arange(1000)

    def order(seed: int, block: int, first_row: int = 0) -> tuple[int, ...]:
        phases = (Phase(0, (1, 1)), Phase(7_000, (1, 1)))
        corpora, _ = Mixture(phases, seed).at(first_row + block * 1000 + rows)
        return tuple(corpora.tolist())

    orders = [order(1, 0), order(2, 0), order(1, 1), order(1, 0, 7_000), order(1, 1, 7_000)]
    assert len(set(orders)) == len(orders)
    for found in orders:
        changes = np.count_nonzero(np.diff(found))
        assert 400 < changes < 600, "half of the neighbours differ"


def test_a_far_row_is_found_without_reading_those_before_it():
    mixture = Mixture((Phase(0, (70, 20, 10)), Phase(10**12, (1, 1, 1))), seed=3)
    rows = 10**15 + np.arange(3000)
    corpora, positions = mixture.at(rows)
    assert mixture.row_of(2, int(positions[corpora == 2][5])) == rows[corpora == 2][5]


def test_the_order_never_changes_between_versions():
    """A run that is resumed after an upgrade must see the rows that it would have seen."""
    mixture = Mixture((Phase(0, (7, 2, 1)), Phase(1500, (1, 1, 1))), seed=1337)
    corpora, positions = mixture.at(np.array([7, 8, 9, 10, 999, 1000, 1499, 1500, 1501, 2499]))
    assert corpora.tolist() == [0, 1, 2, 0, 0, 1, 0, 2, 0, 1]
    assert positions.tolist() == [7, 0, 0, 8, 699, 200, 1043, 148, 1044, 640]


@given(mixtures(), st.integers(0, 200), st.integers(1, 8), st.data())
def test_a_step_of_several_corpora_is_the_same_for_every_number_of_ranks(
    mixture: Mixture, step: int, world_size: int, data: st.DataObject
):
    counts = [data.draw(st.integers(1, 3)) for _ in mixture.phases[0].weights]
    rows = tuple(data.draw(st.integers(1, 40)) for _ in range(sum(counts)))
    shuffle = data.draw(st.sampled_from(["shards", "rows", "global", "none"]))
    ramp = (RampPhase(10, 5), RampPhase(30, 20))
    sampler = Sampler(rows, 37, mixture.seed, shuffle, mixture, tuple(counts), ramp)
    whole = sampler.rows(step)
    shares = [sampler.rows(step, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(shares), whole)
    sizes = 10 * [5] + 20 * [20] + 200 * [37]
    first = sum(sizes[:step])
    corpora, positions = mixture.at(np.arange(first, first + sizes[step]))
    assert sampler.corpus_of(whole[:, 0]).tolist() == corpora.tolist()
    for corpus, position, (shard, row) in zip(corpora, positions, whole.tolist(), strict=True):
        alone = sampler.corpora[corpus].at(np.array([position]))
        assert (alone[0] + (sampler.first_shards[corpus], 0)).tolist() == [shard, row]


@given(mixtures(), st.integers(0, 5), st.data())
def test_the_first_step_with_a_shard(mixture: Mixture, shard: int, data: st.DataObject):
    counts = [data.draw(st.integers(1, 3)) for _ in mixture.phases[0].weights]
    rows = tuple(data.draw(st.integers(1, 60)) for _ in range(sum(counts)))
    shuffle = data.draw(st.sampled_from(["shards", "rows", "none"]))
    ramp = (RampPhase(20, 4),)
    sampler = Sampler(rows, 11, mixture.seed, shuffle, mixture, tuple(counts), ramp)
    shard %= len(rows)
    steps = 60
    having = (step for step in range(steps) if shard in sampler.rows(step)[:, 0])
    expected = next(having, None)
    first = sampler.first_step_with(shard)
    if expected is None:
        assert first is None or first >= steps
    elif shuffle == "rows":
        assert first is not None and first <= expected
    else:
        assert first == expected
